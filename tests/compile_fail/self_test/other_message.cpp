// SPDX-License-Identifier: MIT
// expect: the rank must be prime
// refused: the compiler did not print the expected text
#include <zamba/tensor.hpp>

#ifdef ZAMBA_EXPECT_FAILURE
zamba::Tensor<float, 5> view;
#endif
