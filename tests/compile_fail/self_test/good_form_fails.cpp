// SPDX-License-Identifier: MIT
// expect: zamba::Tensor: the rank must be 1 to 4
// refused: the good form does not compile
#include <zamba/tensor.hpp>

zamba::Tensor<float, 5> view;
