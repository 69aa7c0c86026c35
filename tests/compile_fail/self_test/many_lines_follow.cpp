// SPDX-License-Identifier: MIT
// expect: zamba::Tensor: the rank must be 1 to 4
// lines: 20
// refused: lines, at most 20 were to be
#include <zamba/tensor.hpp>

#ifdef ZAMBA_EXPECT_FAILURE
zamba::Tensor<float, 5> view;
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#warning "before it"
#endif
