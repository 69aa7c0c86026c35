// SPDX-License-Identifier: MIT
// TrainingBytes: what training a model takes, told before anything is taken (Model::training_bytes).
#pragma once

#include <cstddef>

#include <zamba/device.hpp>
#include <zamba/residual_io.hpp>

namespace zamba {

/// A micro-batch of `rows` windows of `length` tokens, and what its forward pass keeps.
struct TrainingShape {
  Index rows = 1, length = 1;
  Keep keep = Keep::everything;
};

/// In bytes on the device. On CUDA what cuBLAS and the driver take for themselves comes on top.
struct TrainingBytes {
  std::size_t weights = 0;
  std::size_t gradients = 0;
  std::size_t moments = 0;      // of AdamW, and the lower halves of masters of bf16 weights
  std::size_t activations = 0;  // what forward keeps
  std::size_t workspace = 0;    // what is taken beside it at the most, on the way back

  std::size_t total() const { return weights + gradients + moments + activations + workspace; }
};

}  // namespace zamba
