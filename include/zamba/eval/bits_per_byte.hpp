// SPDX-License-Identifier: MIT
// Held-out loss, and its unit that does not depend on the tokenizer.
//
//   bits per byte = sum of losses (nats) / ln 2 / bytes of the predicted tokens
//
// The text is cut into windows of `length` tokens, each read from an empty state: what a model knows at the beginning
// of a window is nothing, so longer windows give lower values. Compare values of equal length only.
// Numeric contract: the sum is in double, window after window, so a rerun is bit-equal.
#pragma once

#include <numbers>

#include <zamba/data/mixture.hpp>
#include <zamba/model.hpp>

namespace zamba {

/// The loss of all tokens of a range, `rows` windows of `length` at a time. `batch` is scratch, and may be used again.
/// Throws before anything is computed where an id is outside the vocabulary, or no token of the range has a target.
template <class Net, class T, class Device>
LossSum held_out_loss(Context<Device>& ctx, const Model<Net, T, Device>& model, const TokenRange& range, Index length,
                      Index rows, PackedBatch& batch) {
  const Index windows = window_count(range, length);
  require(windows > 0, "held_out_loss: the range has ", range.size(), " tokens, at least 2 are needed");
  require(range.has_target(), "held_out_loss: '", range.file->path().string(), "' has nothing but document ends in [",
          range.first, ", ", range.last, "), so no target");
  range.file->check_vocabulary(Net::vocabulary, range.first, range.last);
  LossSum total;
  for (Index window = 0; window < windows; window += rows) {
    read_windows(range, length, window, rows, batch);
    const LossSum loss = model.loss(ctx, {batch.tokens, batch.targets, batch.offsets});
    total.sum += loss.sum;
    total.count += loss.count;
  }
  return total;
}

/// bytes_per_token: the bytes of the text over its tokens; 1 for a byte tokenizer.
inline double bits_per_byte(const LossSum& loss, double bytes_per_token = 1) {
  require(bytes_per_token > 0, "bits_per_byte: bytes_per_token must be positive, got ", bytes_per_token);
  return loss.mean() / std::numbers::ln2 / bytes_per_token;
}

}  // namespace zamba
