// SPDX-License-Identifier: MIT
// A model that ../model.cu instantiates and split_model.cpp uses.
#pragma once

#include <vector>

#include "../support/nets.hpp"

namespace zamba_test {

/// Logits of a prompt in two chunks and of three single tokens, one after the other: the same lines for both compilers.
template <class M>
std::vector<double> split_logits(const M& model) {
  auto state = model.new_state({.batch = 2, .max_length = 40});
  std::vector<double> all;
  for (const std::vector<Index>& lengths : {std::vector<Index>{20, 7}, {0, 5}, {1, 1}, {1, 1}, {1, 1}})
    append(all, values<typename M::DeviceType>(
                    model.extend(state, {random_tokens(lengths[0] + lengths[1]), lengths}, Positions::all)));
  return all;
}

/// What the .cu computes.
std::vector<double> split_logits_by_nvcc();

}  // namespace zamba_test
