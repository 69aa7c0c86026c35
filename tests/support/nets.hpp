// SPDX-License-Identifier: MIT
// Small networks of every kind, with weights large enough that every factor shows in the result.
#pragma once

#include <cmath>
#include <vector>

#include <zamba/blocks/mamba2_block.hpp>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/blocks/transformer_block.hpp>
#include <zamba/model.hpp>
#include <zamba/testing/report.hpp>

namespace zamba_test {

using namespace zamba;

inline constexpr Index vocabulary = 29;

using Mixer = MambaBlock<MambaConfig{.d_model = 16, .d_state = 4, .n_heads = 2}>;
using WideMixer = MambaBlock<MambaConfig{.d_model = 20, .d_state = 5, .d_conv = 3, .proj_bias = true}>;
using Shared = SharedAttention<SharedAttentionConfig{.d_model = 16, .n_heads = 4, .n_kv_heads = 2, .d_ff = 24}>;
/// With parameters of each use, as Zamba2 has them.
using Adapted = SharedAttention<SharedAttentionConfig{.d_model = 16,
                                                      .n_heads = 4,
                                                      .n_kv_heads = 2,
                                                      .d_ff = 24,
                                                      .rope = true,
                                                      .mlp_adapter_rank = 3,
                                                      .qkv_adapter_rank = 2}>;

/// m h m h, one shared block.
using Hybrid = LanguageModel<vocabulary, HybridStack<4, 2, Mixer, Shared>>;
/// h m h h, two shared blocks in turn: one is used twice, and the first layer is hybrid.
using TwoCopies = LanguageModel<vocabulary, PatternStack<"hmhh", Mixer, Shared, 2>>;
/// The same with adapters and rope.
using TwoAdapted = LanguageModel<vocabulary, PatternStack<"hmhh", Mixer, Adapted, 2>>;
/// Mamba layers only.
using Plain = LanguageModel<vocabulary, UniformStack<2, WideMixer>>;
/// A stack whose layers are stacks, with shared blocks inside and outside.
using Nested = LanguageModel<vocabulary, PatternStack<"mhm", HybridStack<2, 2, Mixer, Shared>, Shared>>;
using NestedAdapted = LanguageModel<vocabulary, PatternStack<"mhm", HybridStack<2, 2, Mixer, Adapted>, Adapted>>;

using Mixer2 = Mamba2Block<Mamba2Config{.d_model = 16, .d_state = 4, .n_heads = 4, .n_groups = 2}>;
using Attending =
    TransformerBlock<TransformerConfig{.d_model = 16, .n_heads = 4, .n_kv_heads = 2, .d_ff = 24, .rope_theta = 50}>;

/// Mamba-2 layers in groups, m h m h, one shared block.
using Hybrid2 = LanguageModel<vocabulary, HybridStack<4, 2, Mixer2, Shared>>;
/// Zamba2: Mamba-2 layers in two groups, two shared blocks in turn with rope and adapters.
using Second = LanguageModel<
    vocabulary,
    PatternStack<"mhmhhm", Mamba2Block<Mamba2Config{.d_model = 24, .d_state = 40, .n_heads = 4, .n_groups = 2}>,
                 SharedAttention<SharedAttentionConfig{.d_model = 24,
                                                       .n_heads = 4,
                                                       .n_kv_heads = 2,
                                                       .d_ff = 40,
                                                       .rope = true,
                                                       .mlp_adapter_rank = 3,
                                                       .qkv_adapter_rank = 5}>,
                 2>>;
/// Zamba2 of the widths that tensor cores take: heads of 64 channels, a d_state of 128.
using SecondWide =
    LanguageModel<vocabulary,
                  HybridStack<2, 2, Mamba2Block<Mamba2Config{.d_model = 96, .d_state = 128, .n_heads = 3}>,
                              SharedAttention<SharedAttentionConfig{
                                  .d_model = 96, .n_heads = 3, .d_ff = 200, .rope = true, .mlp_adapter_rank = 8}>>>;
/// Transformer layers, and a head of its own.
using Transformer = LanguageModel<vocabulary, UniformStack<2, Attending>, Head::own>;
/// Stacks of transformer layers as the layers of a stack with a shared block: t enters their first layer.
using NestedTransformer = LanguageModel<vocabulary, PatternStack<"mh", UniformStack<2, Attending>, Shared>>;

/// Draws every parameter anew: products normal with deviation 1 / sqrt(columns), so that they keep their input's size;
/// decay rates between 0.2 and 8; other vectors near what they usually are.
template <class ModelType>
void randomise(ModelType& model, Seed seed) {
  for (std::size_t i = 0; i < model.entries().size(); ++i) {
    const ParameterEntry& entry = model.entries()[i];
    Random random(seed, 1000 + i);
    const auto ends_with = [&](const char* end) { return entry.name.ends_with(end); };
    std::vector<double> values(static_cast<std::size_t>(entry.size));
    for (double& value : values) {
      if (ends_with("A_log"))
        value = std::log(0.2) + random.uniform() * std::log(8 / 0.2);
      else if (ends_with("norm.weight") || ends_with(".D"))
        value = 1 + 0.3 * random.normal();
      else if (ends_with("bias"))
        value = 0.5 * random.normal();
      else
        value = random.normal() / std::sqrt(static_cast<double>(entry.shape.back()));
    }
    model.write(entry, values);
  }
}

template <class Net, class T, class Device = cpu>
Model<Net, T, Device> random_model(Seed seed = {5}) {
  Model<Net, T, Device> model(seed);
  randomise(model, seed);
  return model;
}

inline std::vector<Token> random_tokens(Index count, std::uint64_t stream = 0) {
  Random random(Seed{6}, stream);
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (Token& token : tokens) token = static_cast<Token>(random.below(vocabulary));
  return tokens;
}

/// The elements of a matrix in a device's memory.
template <class Device = cpu, class T>
std::vector<double> values(Matrix<T> matrix) {
  std::vector<std::remove_const_t<T>> row(static_cast<std::size_t>(matrix.cols()));
  std::vector<double> all;
  for (Index i = 0; i < matrix.rows(); ++i) {
    Memory<Device>::copy_to_host(row.data(), matrix[i].data, row.size() * sizeof(T));
    for (const T value : row) all.push_back(static_cast<double>(value));
  }
  return all;
}

inline void append(std::vector<double>& all, const std::vector<double>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

/// f(tensor, row, first unused position or 0, width) for every tensor and row of a state; only caches have an unused
/// end.
template <class Net, class T, class Device, class F>
void for_each_row(const State<Net, T, Device>& state, F&& f) {
  auto views = state.views();
  visit_state<Net>(views, [&](const Name&, auto& tensor, Index rows, Index) {
    for (Index row = 0; row < state.batch(); ++row) {
      const Index used = rows == per_position ? state.length(row) : state.length(row) > 0 ? rows : 0;
      f(tensor[row], used);
    }
  });
}

/// Fills with NaN what no position has written yet: everything in a new state, the end of the caches later.
template <class Net, class T, class Device>
void poison(const State<Net, T, Device>& state) {
  for_each_row(state, [](auto part, Index used) {
    const std::size_t bytes = sizeof(*part.data) * static_cast<std::size_t>((part.rows() - used) * part.cols());
    if (bytes == 0) return;
    const std::vector<unsigned char> ones(bytes, 0xff);  // all bits set is a NaN in every type
    Memory<Device>::copy_from_host(part.data + used * part.cols(), ones.data(), bytes);
  });
}

/// Fills with NaN all that an arena holds.
template <class Device>
void poison(Arena<Device>& arena) {
  const auto generation = arena.generation();
  const std::vector<unsigned char> ones(arena.capacity(), 0xff);
  ArenaScope scope(arena);
  Memory<Device>::copy_from_host(arena.template tensor<unsigned char>(static_cast<Index>(ones.size())).data,
                                 ones.data(), ones.size());
  require(arena.generation() == generation, "poison: the arena is of several blocks");
}

/// What the positions so far have written.
template <class Net, class T, class Device>
std::vector<double> values(const State<Net, T, Device>& state) {
  std::vector<double> all;
  for_each_row(state, [&](auto part, Index used) { append(all, values<Device>(part.slice(0, used))); });
  return all;
}

using zamba::testing::relative_error;

/// A model in which what a token embeds as is NaN. Where the head is its own, rows without the token do not meet it.
template <class Net, class T, class Device = cpu>
Model<Net, T, Device> nan_where_read(Token token) {
  auto model = random_model<Net, T, Device>();
  const ParameterEntry& table = model.entries().front();
  std::vector<double> values_of_table = model.read(table);
  std::fill_n(values_of_table.begin() + token * table.shape[1], table.shape[1],
              std::numeric_limits<double>::quiet_NaN());
  model.write(table, values_of_table);
  return model;
}

}  // namespace zamba_test
