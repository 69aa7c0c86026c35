// SPDX-License-Identifier: MIT
// expect: zamba::Tensor: the rank must be 1 to 4
// lines: 20
// refused: lines, at most 20 were to be
#include <zamba/tensor.hpp>

#ifdef ZAMBA_EXPECT_FAILURE
zamba::Tensor<float, 5> view;
int number0 = "text";
int number1 = "text";
int number2 = "text";
int number3 = "text";
int number4 = "text";
int number5 = "text";
int number6 = "text";
int number7 = "text";
#endif
