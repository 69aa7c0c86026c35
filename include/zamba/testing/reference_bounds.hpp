// SPDX-License-Identifier: MIT
// What a reference case may differ by: bounds by storage type, with the greatest errors met in the cases zamba and
// zamba-gqa (7 and 9 layers):
//   double     3e-7 (gradients 1.2e-6): the reference holds float32, and computes its norms in float32. Allowed: 5e-6,
//              gradients 2e-5, losses 1e-5, trained parameters 1e-4
//   float      1.0e-6 (gradients 4.6e-6, losses 1.1e-6, trained parameters 2.3e-6): rounding of float32 in every layer,
//              growing with depth. Allowed: ten times that
//   bf16       1.3e-2 (gradients 6.2e-2, losses 9.8e-3, trained parameters 4.2e-3): every weight is rounded to 8 bits,
//              2^-9 at most. Allowed: three to five times that. A greedy choice between near equals may differ, so the
//              reference's token must be within the logits' bound of the best, along the reference's continuation
// A caller may give other bounds: on CUDA activations are bf16 too, and what that costs depends on the case.
#pragma once

#include <type_traits>

#include <zamba/number.hpp>

namespace zamba::testing {

/// What check_reference allows.
struct ReferenceBounds {
  double logits;
  double hidden_states;
  double caches;
  double gradients;  // per tensor
  double losses;
  double parameters;  // after training
  bool greedy_identical;
};

namespace detail {

template <class T, class N>
inline constexpr bool all_stored_as = std::conjunction_v<std::is_same<weight_t<T>, N>, std::is_same<cache_t<T>, N>,
                                                         std::is_same<activation_t<T, cuda>, N>>;

}  // namespace detail

/// Of a model of T: those of its coarsest number. A weight type of its own brings bounds of its own.
template <class T>
constexpr ReferenceBounds reference_bounds() {
  if constexpr (detail::all_stored_as<T, double>)
    return {5e-6, 5e-6, 5e-6, 2e-5, 1e-5, 1e-4, true};
  else if constexpr (detail::all_stored_as<T, float>)
    return {1e-5, 1e-5, 1e-5, 5e-5, 1e-5, 2e-5, true};
  else
    static_assert(Number<weight_t<T>>, "zamba::testing: a weight type of its own brings bounds of its own");
  return {5e-2, 5e-2, 5e-2, 2e-1, 3e-2, 2e-2, false};
}

}  // namespace zamba::testing
