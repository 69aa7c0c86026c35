// SPDX-License-Identifier: MIT
// Matrices of seeded random numbers, optionally strided, and the error of a result by norm.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include <zamba/number.hpp>
#include <zamba/random.hpp>
#include <zamba/tensor.hpp>

namespace zamba::testing {

/// Normal numbers, the same for the same stream.
template <class T>
std::vector<T> random_values(Index count, std::uint64_t stream) {
  Random random(Seed{7}, stream);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (auto& v : values) v = static_cast<T>(static_cast<compute_t<T>>(random.normal()));
  return values;
}

/// Owned elements of a matrix whose rows lie `gap` elements apart from each other: a column slice of a wider one.
template <class T>
struct Strided {
  Strided(Index rows, Index cols, Index gap, std::uint64_t stream)
      : values(random_values<T>(rows * (cols + gap), stream)), view(values.data(), rows, cols + gap) {
    view = view.columns(gap / 2, cols);
  }
  Strided(const Strided&) = delete;
  std::vector<T> values;
  Matrix<T> view;
};

/// By norm, of what the plain loop `wanted(i, j)` gives.
template <class T, class F>
double relative_error(Matrix<T> got, F&& wanted) {
  double difference = 0, norm = 0;
  for (Index i = 0; i < got.rows(); ++i)
    for (Index j = 0; j < got.cols(); ++j) {
      const double w = wanted(i, j);
      difference += (static_cast<double>(got(i, j)) - w) * (static_cast<double>(got(i, j)) - w);
      norm += w * w;
    }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

/// The error by norm of contiguous values against others.
template <class T, class U>
double relative_error(const std::vector<T>& got, const std::vector<U>& wanted) {
  if (got.size() != wanted.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double w = static_cast<double>(wanted[i]), d = static_cast<double>(got[i]) - w;
    difference += d * d;
    norm += w * w;
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

/// `at` with each element moved by +-step in turn: the central differences of loss().
template <class F>
std::vector<double> finite_differences(std::vector<double>& at, double step, F&& loss) {
  std::vector<double> gradient;
  for (double& value : at) {
    const double centre = value;
    value = centre + step;
    const double up = loss();
    value = centre - step;
    const double down = loss();
    value = centre;
    gradient.push_back((up - down) / (2 * step));
  }
  return gradient;
}

}  // namespace zamba::testing
