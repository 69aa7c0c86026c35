// SPDX-License-Identifier: MIT
// What a block computes from and to, and how much of it is kept for the way back.
#pragma once

#include <zamba/tensor.hpp>

namespace zamba {

/// The residual stream around a block, (tokens, d) each. out may be x itself unless the block says otherwise.
template <class A>
struct ResidualIO {
  Matrix<const A> x;
  Matrix<const A> t;  // optional
  Matrix<A> out;
};

/// What forward keeps for backward. Kept memory stays taken from the context's arena; whoever asked for it rewinds the
/// arena. Each level keeps more than the one before it; gradients are the same bits. A block for which there is nothing
/// between layer_inputs and everything may take all levels but `nothing` for the last.
enum class Keep {
  nothing,       // inference
  layer_inputs,  // a stack keeps what enters each layer and computes the rest again: one layer's activations at a time
  costly,        // what products, scans and attention gave; norms, convolutions and activations are computed again
  everything,
};

}  // namespace zamba
