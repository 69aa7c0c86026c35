// SPDX-License-Identifier: MIT
// expect: zamba::Tensor: the rank must be 1 to 4
// refused: lines come before the expected text
#include <zamba/tensor.hpp>

#ifdef ZAMBA_EXPECT_FAILURE
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
zamba::Tensor<float, 5> view;
#endif
