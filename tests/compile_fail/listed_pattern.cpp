// SPDX-License-Identifier: MIT
// expect: zamba::listed_pattern: hybrid layers are counted from 0, below the number of layers
// expect: detail::at_most<6, 5>
#include <zamba/pattern_stack.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
constexpr auto pattern = zamba::listed_pattern<6, 2, 5>;
#else
constexpr auto pattern = zamba::listed_pattern<6, 2, 6>;
#endif
static_assert(pattern.uses() == 2);
