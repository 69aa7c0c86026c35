// SPDX-License-Identifier: MIT
// The file of a reference case as check_reference reads it: its tensors, and its caches in the order of our states.
#pragma once

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include <zamba/error.hpp>
#include <zamba/io/safetensors.hpp>

namespace zamba::testing::detail {

using Values = std::vector<double>;

/// The tensors of reference.safetensors, and which of them were compared.
class ReferenceCase {
 public:
  explicit ReferenceCase(const std::filesystem::path& directory)
      : file_(Safetensors::open(directory / "reference.safetensors")) {}

  const TensorEntry* find(const std::string& name) {
    const TensorEntry* entry = file_.find(name);
    if (entry) used_.insert(name);
    return entry;
  }
  /// Names that begin with `prefix`, without it.
  std::vector<std::string> names(const std::string& prefix) const {
    std::vector<std::string> found;
    for (const TensorEntry& entry : file_.tensors())
      if (entry.name.starts_with(prefix)) found.push_back(entry.name.substr(prefix.size()));
    return found;
  }
  /// Tensors whose names begin with `prefix` need not be compared.
  void leave_out(const std::string& prefix) {
    for (const std::string& name : names(prefix)) used_.insert(prefix + name);
  }
  std::vector<std::string> unused() const {
    std::vector<std::string> names;
    for (const TensorEntry& entry : file_.tensors())
      if (!used_.contains(entry.name)) names.push_back(entry.name);
    return names;
  }
  /// Token ids of a matrix (batch, length).
  std::vector<Token> ids(const std::string& name, Index& batch, Index& length) {
    const TensorEntry* entry = find(name);
    require(entry, "reference.safetensors: there is no ", name);
    require(entry->shape.size() == 2 && entry->count() > 0, "reference.safetensors: ", name,
            " must be (batch, length)");
    batch = entry->shape[0];
    length = entry->shape[1];
    return read_values<Token>(*entry);
  }

 private:
  Safetensors file_;
  std::set<std::string> used_;
};

/// Elements of a tensor (outer, a, b, inner) as (outer, b, a, inner).
inline Values swap_extents(const Values& from, Index outer, Index a, Index b, Index inner) {
  Values to(from.size());
  for (Index o = 0; o < outer; ++o)
    for (Index i = 0; i < a; ++i)
      for (Index j = 0; j < b; ++j)
        std::copy_n(from.begin() + ((o * a + i) * b + j) * inner, inner, to.begin() + ((o * b + j) * a + i) * inner);
  return to;
}

/// One tensor of a state, (batch, rows, width), by its name in visit_state: "layers.3.conv".
struct StateValues {
  std::string name;
  Index rows, width;
  Values values;
};

/// The reference's form of a layer's cache, in the order of ours; empty where the shapes do not fit.
inline Values cache_in_our_order(const TensorEntry& entry, const std::string& part, Index batch, Index rows,
                                 Index width) {
  const auto& shape = entry.shape;
  Values values = read_values<double>(entry);
  const Index size = batch * rows * width;
  if (part == "conv") {  // (batch, D, K), oldest first: the oldest input is one more than a state holds
    if (shape.size() != 3 || shape[0] != batch || shape[1] != width || (shape[2] != rows && shape[2] != rows + 1))
      return {};
    values = swap_extents(values, batch, width, shape[2], 1);
    Values kept;
    for (Index row = 1; row <= batch; ++row)
      kept.insert(kept.end(), values.begin() + (row * shape[2] - rows) * width,
                  values.begin() + row * shape[2] * width);
    return kept;
  }
  if (shape.size() < 3 || shape[0] != batch || static_cast<Index>(values.size()) != size) return {};
  if (part == "scan") {  // (batch, heads, head_dim, N), or (batch, D, N)
    if (shape.back() != rows) return {};
    return swap_extents(values, batch, width, rows, 1);
  }
  if (shape.size() != 4 || shape[2] != rows) return {};  // keys, values: (batch, kv_heads, length, head_dim)
  return swap_extents(values, batch, shape[1], rows, shape[3]);
}

/// A convolution's inputs with, before them, the oldest of those one token earlier: what a reference keeps.
inline StateValues with_oldest(const StateValues& before, const StateValues& now, Index batch) {
  StateValues all{now.name, now.rows + 1, now.width, {}};
  for (Index row = 0; row < batch; ++row) {
    const auto oldest = before.values.begin() + row * now.rows * now.width;
    const auto kept = now.values.begin() + row * now.rows * now.width;
    all.values.insert(all.values.end(), oldest, oldest + now.width);
    all.values.insert(all.values.end(), kept, kept + now.rows * now.width);
  }
  return all;
}

}  // namespace zamba::testing::detail
