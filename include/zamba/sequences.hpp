// SPDX-License-Identifier: MIT
// Sequences: which tokens of a packed batch belong together.
#pragma once

#include <zamba/device.hpp>

namespace zamba {

/// A ragged batch: `tokens` positions in one array, row r owning [offsets[r], offsets[r + 1]).
/// A row may be empty. Row r continues a sequence of which starts[r] positions are in its state already; where that is
/// 0, operators begin from zero without reading the state. The pointers are readable by the device that computes.
///
/// On CUDA, where `longest` is 1, `tokens` may be more than offsets[rows]: for a step that was queued before the host
/// knows which rows have a token. The places beyond hold any finite input and ids of the vocabulary; what forward
/// passes write there has no meaning, and they change nothing that belongs to a row.
struct Sequences {
  const Index* offsets = nullptr;  // (rows + 1)
  const Index* starts = nullptr;   // (rows); null: every row starts at position 0
  Index rows = 0;
  Index tokens = 0;   // places for tokens: offsets[rows]
  Index longest = 0;  // the largest number of tokens of one row

  ZAMBA_HOST_DEVICE constexpr Index begin(Index row) const { return offsets[row]; }
  ZAMBA_HOST_DEVICE constexpr Index length(Index row) const { return offsets[row + 1] - offsets[row]; }
  ZAMBA_HOST_DEVICE constexpr Index start(Index row) const { return starts ? starts[row] : 0; }
};

/// The row of a ragged batch that owns a token.
ZAMBA_HOST_DEVICE inline Index row_of(const Sequences& sequences, Index token) {
  Index low = 0, high = sequences.rows;  // offsets[low] <= token < offsets[high]
  while (high - low > 1) {
    const Index middle = (low + high) / 2;
    (sequences.offsets[middle] <= token ? low : high) = middle;
  }
  return low;
}

}  // namespace zamba
