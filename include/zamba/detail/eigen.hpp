// SPDX-License-Identifier: MIT
// Eigen as host code, under nvcc too: its own support of CUDA would turn vectorisation off there, and one program must
// not hold two versions of the same template.
#pragma once

#ifndef EIGEN_NO_CUDA
#define EIGEN_NO_CUDA
#endif
#include <Eigen/Core>
