// SPDX-License-Identifier: MIT
// SingleTokens: a warp's loop over rows of one token each, the decode step of operators with a state. It is software
// pipelined: what the next row needs is on its way while one is computed, and rows without a token cost nothing.
#pragma once

#include <zamba/kernel/block_reduce.cuh>
#include <zamba/sequences.hpp>

namespace zamba::kernel {

/// Up to 32 rows from `first` on, of which lane l knows the l-th; `count` may reach beyond the last. Rows are named by
/// their place in this range. All lanes of the warp construct it and call its members.
class SingleTokens {
 public:
  static constexpr int most_rows = warp_size;

  /// stateful: whether there is a state from which rows may continue.
  __device__ SingleTokens(const Sequences& sequences, Index first, int count, bool stateful) {
    const auto lane = static_cast<int>(threadIdx.x % warp_size);
    const Index row = first + lane;
    const bool known = lane < count && row < sequences.rows;
    begin_ = known ? sequences.begin(row) : 0;
    const Index length = known ? sequences.length(row) : 0, start = known && stateful ? sequences.start(row) : 0;
    continued_ = __ballot_sync(all_lanes, start > 0);
    occupied_ = __ballot_sync(all_lanes, length > 0);
  }

  /// Where the token of a row lies in the batch.
  __device__ Index token(int row) const { return __shfl_sync(all_lanes, begin_, row); }
  /// Whether the row continues from its state.
  __device__ bool continued(int row) const { return continued_ >> row & 1; }

  /// step(row, load(row)) for each row that has a token, in order; the next row's load comes before a row's step.
  template <class Load, class Step>
  __device__ void for_each(Load&& load, Step&& step) const {
    unsigned left = occupied_;
    decltype(load(0)) next{};
    if (left) next = load(lowest(left));
    while (left) {
      auto now = next;
      const int row = lowest(left);
      left &= left - 1;
      if (left) next = load(lowest(left));
      step(row, now);
    }
  }

 private:
  static constexpr unsigned all_lanes = ~0u;
  __device__ static int lowest(unsigned rows) { return __ffs(static_cast<int>(rows)) - 1; }

  Index begin_;
  unsigned continued_, occupied_;  // a bit a row
};

}  // namespace zamba::kernel
