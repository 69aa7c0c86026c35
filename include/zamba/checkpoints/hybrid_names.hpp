// SPDX-License-Identifier: MIT
// What checkpoints of model_type "zamba" and "zamba2" have alike: the names of a PatternStack's tensors, the list of
// layers in config.json, and most keys of attention.
//
//   embedding               model.embed_tokens.weight
//   head                    lm_head.weight                    where it is tied: absent, or equal
//   final norm              model.final_layernorm.weight
//   layer i, plain          model.layers.i.{input_layernorm.weight, mamba.*}
//   layer i, hybrid         model.layers.i.linear.weight,
//                           model.layers.i.mamba_decoder.{input_layernorm.weight, mamba.*}
//   shared block            model.layers.i.SHARED.*           i: its first hybrid layer, perhaps again at its others
//
// Where the head is tied, transformers ties shared blocks, too, and they are saved once. Where it is not, transformers
// 5 gives each layer a block of its own and draws what the file lacks at random: they are saved at every layer.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/blocks/shared_attention.hpp>
#include <zamba/checkpoints/format.hpp>

namespace zamba::detail {

template <class Block>
inline constexpr bool is_shared_attention = false;
template <SharedAttentionConfig C>
inline constexpr bool is_shared_attention<SharedAttention<C>> = true;

/// Names of the tensors of one network.
class HybridNames {
 public:
  /// shared: what stands for SHARED above.
  HybridNames(std::string_view pattern, Index copies, bool tied, std::string shared)
      : pattern_(pattern), copies_(copies), tied_(tied), shared_(std::move(shared)) {}

  /// A parameter of a stack by its owner, "shared" or "layers", with the owner's number, and its name there.
  struct Place {
    std::string_view owner;
    Index number;
    std::string_view own;
  };
  /// "layers.3.A_log" is {"layers", 3, "A_log"}. A name without a number is its own owner.
  static Place place_of(std::string_view name) {
    const std::size_t dot = name.find('.'), next = name.find('.', dot + 1);
    const std::string_view owner = name.substr(0, dot);
    if (owner != "shared" && owner != "layers") return {name, 0, {}};
    require(next != name.npos, "HybridNames: parameter ", name, " has no name in its layer");
    return {owner, std::stoll(std::string(name.substr(dot + 1, next - dot - 1))), name.substr(next + 1)};
  }

  bool hybrid(Index layer) const { return pattern_[static_cast<std::size_t>(layer)] == 'h'; }
  /// The ordinal of a hybrid layer among them.
  Index use(Index layer) const {
    return std::count(pattern_.begin(), pattern_.begin() + static_cast<std::ptrdiff_t>(layer), 'h');
  }
  Index block(Index layer) const { return use(layer) % copies_; }

  /// A tensor of shared block number `block`.
  CheckpointTensor of_block(Index block, const std::string& own, std::vector<Index> shape) const {
    CheckpointTensor tensor{.name = "", .shape = std::move(shape), .save_copies = !tied_};
    for (Index layer = 0; layer < static_cast<Index>(pattern_.size()); ++layer) {
      if (!hybrid(layer) || this->block(layer) != block) continue;
      std::string name = of_layer(layer) + shared_ + "." + own;
      if (tensor.name.empty())
        tensor.name = std::move(name);
      else
        tensor.copies.push_back(std::move(name));
    }
    return tensor;
  }
  /// A tensor of a layer's mixer and the norm before it. A convolution's weight has an extent of 1 in files.
  CheckpointTensor of_mixer(Index layer, const std::string& own, std::vector<Index> shape) const {
    if (own.ends_with("conv1d.weight")) shape.insert(shape.begin() + 1, 1);
    return {of_layer(layer) + (hybrid(layer) ? "mamba_decoder." : "") + own, std::move(shape)};
  }
  /// What is neither a shared block's nor a mixer's.
  CheckpointTensor of_rest(const ParameterEntry& entry) const {
    const auto [owner, number, own] = place_of(entry.name);
    CheckpointTensor embedding{"model.embed_tokens.weight", entry.shape};
    if (tied_) embedding.copies = {"lm_head.weight"};
    if (owner == "embedding.weight") return embedding;
    if (owner == "head.weight") return {"lm_head.weight", entry.shape};
    if (owner == "final_norm.weight") return {"model.final_layernorm.weight", entry.shape};
    require(own == "linear.weight", "HybridNames: no name is known for parameter ", entry.name);
    return {of_layer(number) + "linear.weight", entry.shape};
  }

 private:
  static std::string of_layer(Index layer) { return "model.layers." + std::to_string(layer) + "."; }

  std::string_view pattern_;
  Index copies_;
  bool tied_;
  std::string shared_;
};

/// The name of a parameter of SharedAttention in a shared block; without its MLP's first product, in which files
/// differ.
inline std::string hybrid_shared_name(std::string_view own) {
  if (own == "input_norm.weight") return "input_layernorm.weight";
  if (own == "pre_ff_norm.weight") return "pre_ff_layernorm.weight";
  if (own == "down_proj.weight") return "feed_forward.down_proj.weight";
  return "self_attn." + std::string(own);  // q_proj, k_proj, v_proj, o_proj
}

/// Letters of the layers, 'm' or 'h', from layers_block_type; what is there instead, where that is no list.
inline nlohmann::json hybrid_pattern_of(const nlohmann::json& list) {
  if (!list.is_array()) return list;
  std::string pattern;
  for (const auto& layer : list) {
    const bool plain = layer == "mamba" || layer == "linear_attention";
    pattern += plain ? 'm' : layer == "hybrid" ? 'h' : '?';
  }
  return pattern;
}

/// layers_block_type as every release reads it.
inline nlohmann::json hybrid_layer_types(std::string_view pattern) {
  nlohmann::json types = nlohmann::json::array();
  for (const char letter : pattern) types.push_back(letter == 'h' ? "hybrid" : "mamba");
  return types;
}

/// Keys that mean the same in both families, absent ones too.
inline std::vector<ConfigKey> hybrid_config(const SharedAttentionConfig& shared, bool tied) {
  return {{"num_key_value_heads", shared.kv_heads(), shared.n_heads},
          {"attention_head_dim", shared.head_dim(), shared.head_dim(), nullptr, {}, {"head_dim"}},
          {"attention_hidden_size", 2 * shared.d_model, 2 * shared.d_model},
          {"hidden_act", "gelu", "gelu"},
          {"rms_norm_eps", shared.norm_eps, 1e-5},
          {"tie_word_embeddings", tied, true}};
}

/// Keys that other programs expect, as both families publish them.
inline nlohmann::json hybrid_saved_only() {
  return {{"attention_dropout", 0.0}, {"bos_token_id", 1},         {"eos_token_id", 2},
          {"pad_token_id", 0},        {"initializer_range", 0.02}, {"max_position_embeddings", 4096},
          {"num_logits_to_keep", 1},  {"use_cache", true}};
}

}  // namespace zamba::detail
