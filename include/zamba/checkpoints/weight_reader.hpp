// SPDX-License-Identifier: MIT
// From the tensors of a checkpoint to the memory of a model: which belongs to which parameter, and the values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include <zamba/buffer.hpp>
#include <zamba/checkpoints/format.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/io/sharded_safetensors.hpp>
#include <zamba/weight.hpp>

namespace zamba::detail {

/// "(96, 4)".
inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "(";
  for (const Index extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + ")";
}

inline bool same_shape(std::vector<Index> a, std::vector<Index> b) {
  std::erase(a, 1);
  std::erase(b, 1);
  return a == b;
}

/// A part of a parameter, its tensor, and further ones that must hold the same.
struct MatchedPart {
  ParameterPart part;
  const TensorEntry* tensor;
  std::vector<const TensorEntry*> copies;
};

/// What is wrong with one tensor of a file, or nothing.
inline std::string problem_of(const TensorEntry& tensor, const CheckpointTensor& wanted) {
  const DType dtype = tensor.dtype;
  if (dtype != DType::F64 && dtype != DType::F32 && dtype != DType::F16 && dtype != DType::BF16)
    return "wanted F64, F32, F16 or BF16, came " + std::string(name_of(dtype));
  if (!same_shape(tensor.shape, wanted.shape))
    return "wanted shape " + shape_text(wanted.shape) + ", came " + shape_text(tensor.shape);
  return {};
}

inline std::string not_a_copy(const TensorEntry& copy, const TensorEntry& tensor) {
  return copy.name + ": wanted the same values as in " + tensor.name + ", of which it is a copy, came others";
}

/// The tensors of all parts. Throws one Error with everything that is missing, surplus, or of another shape or type.
inline std::vector<MatchedPart> match_tensors(const ShardedSafetensors& files, const std::vector<ParameterPart>& parts,
                                              const std::vector<std::string>& derived, const std::string& origin) {
  std::vector<MatchedPart> matched;
  std::set<std::string> surplus = files.names();
  for (const std::string& name : derived) surplus.erase(name);
  Problems problems;
  for (const ParameterPart& part : parts) {
    const CheckpointTensor& wanted = *part.tensor;
    MatchedPart& match = matched.emplace_back(MatchedPart{part, files.find(wanted.name), {}});
    surplus.erase(wanted.name);
    if (!match.tensor)
      problems.add(wanted.name + ": missing, wanted with shape " + shape_text(wanted.shape));
    else if (const auto problem = problem_of(*match.tensor, wanted); !problem.empty())
      problems.add(wanted.name + ": " + problem);
    for (const std::string& name : wanted.copies) {
      surplus.erase(name);
      const TensorEntry* copy = files.find(name);
      if (!copy || !match.tensor) continue;
      if (copy->dtype != match.tensor->dtype || !same_shape(copy->shape, match.tensor->shape))
        problems.add(not_a_copy(*copy, *match.tensor));
      match.copies.push_back(copy);
    }
  }
  for (const std::string& name : surplus) problems.add(quote(name) + ": surplus, the model has no such parameter");
  problems.check(origin + " does not fit this model:");
  return matched;
}

template <class Stored>
Index count_non_finite(const Stored* values, Index count) {
  Index found = 0;
  for (Index i = 0; i < count; ++i) found += !is_finite(static_cast<compute_t<Stored>>(values[i]));
  return found;
}

/// Reads the tensors of a checkpoint once, piece by piece: tells of its progress, and lets go of what it has read.
class WeightReader {
 public:
  /// Called with bytes done and all bytes; false cancels.
  using Progress = std::function<bool(std::uint64_t, std::uint64_t)>;

  WeightReader(const ShardedSafetensors& files, const std::vector<MatchedPart>& parts, const Progress& progress,
               const std::string& origin)
      : files_(files), progress_(progress), origin_(origin) {
    for (const auto& [part, tensor, copies] : parts) total_ += tensor->bytes.size() * (1 + copies.size());
    tell();
  }

  /// Writes the values of a part of a parameter of W to `to`, where its first row is, converted and with the rows in
  /// our order. Returns how many are not finite. Numbers are staged as they are stored, others as double.
  template <class W, class Device>
  Index read(const MatchedPart& match, std::byte* to) {
    using Stored = std::conditional_t<Number<W>, W, double>;
    const auto& [place, entry, before, rows, cols] = match.part;
    const Index row_bytes = entry->row_bytes();
    const TensorEntry& tensor = *match.tensor;
    // Rows that alternate in the file are two blocks of ours.
    const Index blocks = place->interleaved ? 2 : 1;
    const Index at_once = std::max<Index>(1, piece_elements / cols / blocks) * blocks;
    staged_.resize(static_cast<std::size_t>(std::min(rows, at_once) * cols) * sizeof(Stored));
    auto* const staged = reinterpret_cast<Stored*>(staged_.data());
    Index non_finite = 0;
    for (Index first = 0; first < rows; first += at_once) {
      const Index count = std::min(at_once, rows - first), of_block = count / blocks;
      if (blocks == 1)
        read_values(tensor, first * cols, count * cols, staged);
      else
        for (Index row = 0; row < count; ++row)
          read_values(tensor, (first + row) * cols, cols, staged + (row % blocks * of_block + row / blocks) * cols);
      non_finite += count_non_finite(staged, count * cols);
      for (Index block = 0; block < blocks; ++block) {
        const Index target = block * (rows / blocks) + first / blocks;
        const auto* const ready = stored<W>(staged + block * of_block * cols, of_block * cols, entry->cols());
        Memory<Device>::copy_from_host(to + target * row_bytes, ready, static_cast<std::size_t>(of_block * row_bytes));
      }
      advance(tensor, first * cols, count * cols);
    }
    return non_finite;
  }

  /// Whether a tensor holds the bytes of another of its size.
  bool same(const TensorEntry& copy, const TensorEntry& tensor) {
    bool same = true;
    for (Index first = 0; first < copy.count(); first += piece_elements) {
      const Index count = std::min(piece_elements, copy.count() - first);
      const auto piece = piece_of(copy, first, count), wanted = piece_of(tensor, first, count);
      same = same && std::memcmp(piece.data(), wanted.data(), piece.size()) == 0;
      files_.release(wanted);
      advance(copy, first, count);
    }
    return same;
  }

 private:
  static constexpr Index piece_elements = 1 << 18;
  static constexpr std::uint64_t told_every = 4 << 20;  // bytes

  static std::span<const std::byte> piece_of(const TensorEntry& tensor, Index first, Index count) {
    const std::size_t size = size_of(tensor.dtype);
    return tensor.bytes.subspan(static_cast<std::size_t>(first) * size, static_cast<std::size_t>(count) * size);
  }

  /// The values as they are stored, in rows of `cols`.
  template <class W, class Staged>
  const void* stored(const Staged* values, Index count, Index cols) {
    if constexpr (std::is_same_v<W, Staged>) {
      return values;
    } else {
      encoded_.resize(weight_bytes<W>(count, cols));
      encode_rows<W>(values, count, cols, encoded_.data());
      return encoded_.data();
    }
  }

  void advance(const TensorEntry& tensor, Index first, Index count) {
    const auto piece = piece_of(tensor, first, count);
    files_.release(piece);
    done_ += piece.size();
    if (done_ - told_ >= told_every || done_ == total_) tell();
  }

  void tell() {
    told_ = done_;
    require(!progress_ || progress_(done_, total_), "loading ", origin_, " was cancelled after ", done_, " of ", total_,
            " bytes");
  }

  const ShardedSafetensors& files_;
  const Progress& progress_;
  const std::string& origin_;
  std::uint64_t done_ = 0, told_ = 0, total_ = 0;
  std::vector<std::byte> staged_, encoded_;
};

}  // namespace zamba::detail
