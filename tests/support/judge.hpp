// SPDX-License-Identifier: MIT
// The model that judges texts in tests/eval, and how near two sums of its losses are.
#pragma once

#include <doctest/doctest.h>

#include "nets.hpp"

namespace zamba_test {

inline const Model<Hybrid, double>& model() {
  static const auto model = random_model<Hybrid, double>();
  return model;
}

/// Sums of about a hundred terms of float64, each of which depends on how its sequence is split, to 1e-13.
inline doctest::Approx near(double value) { return doctest::Approx(value).epsilon(1e-11); }

}  // namespace zamba_test
