// SPDX-License-Identifier: MIT
// Derivatives by central differences, that a gradient is compared with. In double with a step of 1e-5 they are right to
// 1e-10 of the third derivative, and to 1e-11 of the function's size, which is its rounding over the step.
#pragma once

#include <cstddef>
#include <vector>

namespace zamba::testing {

/// (f(step) - f(-step)) / (2 step): the derivative at 0 of a function of one number.
template <class F>
double central_difference(double step, F&& f) {
  const double above = f(step);
  return (above - f(-step)) / (2 * step);
}

/// That of loss(), which reads `value`. The value is what it was, afterwards.
template <class F>
double finite_difference(double& value, double step, F&& loss) {
  const double centre = value;
  const double slope = central_difference(step, [&](double move) {
    value = centre + move;
    return loss();
  });
  value = centre;
  return slope;
}

/// That of loss() along each of the values, or along every `stride`-th.
template <class F>
std::vector<double> finite_differences(std::vector<double>& values, double step, F&& loss, std::size_t stride = 1) {
  std::vector<double> gradient;
  for (std::size_t i = 0; i < values.size(); i += stride) gradient.push_back(finite_difference(values[i], step, loss));
  return gradient;
}

/// Every `stride`-th of the values, the first among them.
inline std::vector<double> every(std::size_t stride, const std::vector<double>& values) {
  std::vector<double> some;
  for (std::size_t i = 0; i < values.size(); i += stride) some.push_back(values[i]);
  return some;
}

}  // namespace zamba::testing
