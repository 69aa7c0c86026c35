// SPDX-License-Identifier: MIT
// ScanRunner: a class template over the device, as a user's own would be, whose CUDA members are compiled in one .cu.
// It includes what any compiler can read; members that compute are defined below the class, not in it.
#pragma once

#include <vector>

#include <zamba/buffer.hpp>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/ops/selective_scan.hpp>

namespace zamba::testing {

/// Normalises (tokens, D) and runs a scan of one head over it, keeping the state between calls.
template <class Device>
class ScanRunner {
 public:
  ScanRunner(Index channels, Index states)
      : channels_(channels), states_(states), state_(static_cast<std::size_t>(channels * states) * sizeof(float)) {
    Memory<Device>::zero(state_.data(), state_.size());
  }

  /// x (tokens, D) to y (tokens, D), on the host.
  std::vector<float> run(const std::vector<float>& x);
  Index position() const { return position_; }
  /// (N, D)
  std::vector<float> state() const {
    std::vector<float> values(static_cast<std::size_t>(channels_ * states_));
    Memory<Device>::copy_to_host(values.data(), state_.data(), state_.size());
    return values;
  }
  ScanRunner clone() const {
    ScanRunner copy(channels_, states_);
    copy.state_ = state_.clone();
    copy.position_ = position_;
    return copy;
  }

 private:
  Index channels_, states_, position_ = 0;
  Buffer<Device> state_;
};

template <class Device>
std::vector<float> ScanRunner<Device>::run(const std::vector<float>& x) {
  Context<Device>& ctx = this_thread_context<Device>();
  auto& arena = ctx.arena();
  ArenaScope scope(arena);
  const Index D = channels_, N = states_, tokens = static_cast<Index>(x.size()) / D;
  const Index offsets[] = {0, tokens};
  const Sequences sequences{ctx.readable(offsets, 2), ctx.readable(&position_, 1), 1, tokens, tokens};
  const Matrix<const float> input(ctx.readable(x.data(), tokens * D), tokens, D);
  const auto ones = arena.template tensor<float>(D);
  const auto h = arena.template tensor<float>(tokens, D), y = arena.template tensor<float>(tokens, D);
  const auto rstd = arena.template tensor<float>(tokens);
  const auto A_log = arena.template tensor<float>(D, N);
  ctx.fill(ones, 1.0f);
  ctx.zero(A_log);
  rms_norm(ctx, input, {}, ones, 1e-5, h, rstd);
  Tensor<const float, 3> B(h.data, tokens, 1, N);
  B.stride[0] = D;  // the first N channels of h
  const SelectiveScanInputs<float, float> in{h, h, h, B, B, A_log, ones, ones};
  selective_scan(ctx, in, sequences, Tensor<float, 3>(reinterpret_cast<float*>(state_.data()), 1, N, D), y);
  position_ += tokens;
  std::vector<float> out(x.size());
  Memory<Device>::copy_to_host(out.data(), y.data, out.size() * sizeof(float));
  return out;
}

}  // namespace zamba::testing
