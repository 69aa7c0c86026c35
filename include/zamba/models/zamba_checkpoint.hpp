// SPDX-License-Identifier: MIT
// Checkpoints of model_type "zamba" (Zamba-7B-v1, arXiv 2405.16712): the keys of config.json and the tensors' names.
//
//   embedding, tied head    model.embed_tokens.weight         lm_head.weight: absent, or equal
//   final norm              model.final_layernorm.weight
//   layer i, plain          model.layers.i.{input_layernorm.weight, mamba.*}
//   layer i, hybrid         model.layers.i.linear.weight, model.layers.i.mamba_decoder.{input_layernorm.weight,
//   mamba.*} shared block            model.layers.i.shared_transf.*    i: the first hybrid layer, perhaps again at the
//   others
//
// The rows of in_proj alternate in these files between u's channels and z's.
#pragma once

#include <cctype>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/io/checkpoint_format.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

namespace detail {

template <class Block>
inline constexpr bool is_mamba_block = false;
template <MambaConfig C>
inline constexpr bool is_mamba_block<MambaBlock<C>> = true;
template <class Block>
inline constexpr bool is_shared_attention = false;
template <SharedAttentionConfig C>
inline constexpr bool is_shared_attention<SharedAttention<C>> = true;

/// Mamba layers, and one attention block that hybrid layers share.
template <class Net>
concept ZambaNetwork = is_mamba_block<typename Net::Stack::MixerType> &&
                       is_shared_attention<typename Net::Stack::SharedType> && Net::Stack::copies == 1;

/// What a type of this family says, as data.
struct ZambaFacts {
  Index vocabulary;
  std::string_view pattern;
  MambaConfig mixer;
  SharedAttentionConfig shared;

  bool hybrid(std::size_t layer) const { return pattern[layer] == 'h'; }
};

/// Letters of the layers, 'm' or 'h', from layers_block_type or, where that is absent, from period and offset.
inline nlohmann::json zamba_pattern_of(const nlohmann::json& config, const nlohmann::json& wanted) {
  const auto list = config.find("layers_block_type");
  std::string pattern;
  if (list != config.end() && !list->is_null()) {
    if (!list->is_array()) return *list;
    for (const auto& layer : *list) {
      const bool plain = layer == "mamba" || layer == "linear_attention";
      pattern += plain ? 'm' : layer == "hybrid" ? 'h' : '?';
    }
    return pattern;
  }
  // For as many layers as the type has: their number in the file is compared by itself.
  const nlohmann::json period = config.value("attn_layer_period", nlohmann::json(6)),
                       offset = config.value("attn_layer_offset", nlohmann::json(4));
  if (!period.is_number_integer() || !offset.is_number_integer() || period.get<Index>() <= 0) return nullptr;
  for (Index i = 0; i < static_cast<Index>(wanted.get_ref<const std::string&>().size()); ++i)
    pattern += i == 2 || (i > 2 && (i - 3) % period.get<Index>() == offset.get<Index>()) ? 'h' : 'm';
  return pattern;
}

inline nlohmann::json zamba_dt_rank_of(const nlohmann::json& config, const nlohmann::json&) {
  const auto rank = config.find("mamba_dt_rank"), width = config.find("hidden_size");
  const bool automatic = rank == config.end() || rank->is_null() || *rank == "auto";
  if (!automatic || width == config.end() || !width->is_number_integer()) return automatic ? "auto" : *rank;
  return width->get<Index>() / 16 + (width->get<Index>() % 16 != 0);
}

inline std::vector<ConfigKey> zamba_config(const ZambaFacts& facts) {
  const auto& [vocabulary, pattern, mixer, shared] = facts;
  nlohmann::json types = nlohmann::json::array();
  for (const char layer : pattern) types.push_back(layer == 'h' ? "hybrid" : "mamba");
  // What an absent key means is the default of ZambaConfig in transformers.
  return {{"model_type", "zamba"},
          {"vocab_size", vocabulary},
          {"hidden_size", mixer.d_model},
          {"num_hidden_layers", pattern.size()},
          {"layers_block_type", std::string(pattern), {}, zamba_pattern_of, types},
          {"intermediate_size", shared.ff()},
          {"num_attention_heads", shared.n_heads},
          {"num_key_value_heads", shared.kv_heads(), shared.n_heads},
          {"attention_head_dim", shared.head_dim(), shared.head_dim()},
          {"attention_hidden_size", 2 * shared.d_model, 2 * shared.d_model},
          {"n_mamba_heads", mixer.n_heads, 2},
          {"mamba_d_state", mixer.d_state, 16},
          {"mamba_d_conv", mixer.d_conv, 4},
          {"mamba_expand", mixer.expand, 2},
          {"mamba_dt_rank", mixer.rank(), {}, zamba_dt_rank_of},
          {"mamba_conv_bias", mixer.conv_bias, true},
          {"mamba_proj_bias", mixer.proj_bias, false},
          {"hidden_act", "gelu", "gelu"},
          {"hidden_mamba_act", "silu", "silu"},
          {"rms_norm_eps", mixer.norm_eps, 1e-5},
          {"tie_word_embeddings", true, true}};
}

/// The part of a name after its layer or shared block, as files of this family spell it.
inline std::string zamba_mixer_name(std::string_view name) {
  if (name == "norm.weight") return "input_layernorm.weight";
  if (name == "x_proj.weight") return "mamba.x_proj_weight";
  if (name == "dt_proj.weight") return "mamba.dt_proj_weight";
  if (name == "dt_proj.bias") return "mamba.dt_proj_bias";
  return "mamba." + std::string(name);
}

inline std::string zamba_shared_name(std::string_view name) {
  if (name == "input_norm.weight") return "input_layernorm.weight";
  if (name == "pre_ff_norm.weight") return "pre_ff_layernorm.weight";
  const bool attention = name.size() > 1 && name[1] == '_';  // q_proj, k_proj, v_proj, o_proj
  return (attention ? "self_attn." : "feed_forward.") + std::string(name);
}

inline CheckpointTensor zamba_tensor(const ZambaFacts& facts, const ParameterEntry& entry) {
  const std::string_view name = entry.name;
  if (name == "embedding.weight") return {"model.embed_tokens.weight", entry.shape, {"lm_head.weight"}};
  if (name == "final_norm.weight") return {"model.final_layernorm.weight", entry.shape};

  const auto layer_name = [](std::size_t i) { return "model.layers." + std::to_string(i) + "."; };
  if (name.starts_with("shared.0.")) {
    CheckpointTensor tensor{"", entry.shape};
    for (std::size_t i = 0; i < facts.pattern.size(); ++i) {
      if (!facts.hybrid(i)) continue;
      std::string at = layer_name(i) + "shared_transf." + zamba_shared_name(name.substr(9));
      if (tensor.name.empty())
        tensor.name = std::move(at);
      else
        tensor.copies.push_back(std::move(at));
    }
    return tensor;
  }

  require(name.starts_with("layers."), "checkpoint of model_type zamba: no name is known for parameter ", name);
  const std::string_view rest = name.substr(7);
  const std::size_t dot = rest.find('.'), layer = std::stoul(std::string(rest.substr(0, dot)));
  const std::string_view own = rest.substr(dot + 1);
  if (own == "linear.weight") return {layer_name(layer) + "linear.weight", entry.shape};
  CheckpointTensor tensor{layer_name(layer) + (facts.hybrid(layer) ? "mamba_decoder." : "") + zamba_mixer_name(own),
                          entry.shape};
  if (own == "conv1d.weight") tensor.shape.insert(tensor.shape.begin() + 1, 1);
  tensor.interleaved = own.starts_with("in_proj.");
  return tensor;
}

inline CheckpointLayout zamba_layout(const ZambaFacts& facts, const std::vector<ParameterEntry>& entries) {
  CheckpointLayout layout;
  layout.config = zamba_config(facts);
  // The slow path of transformers computes the same on every machine; users who have its kernels switch them on.
  layout.saved_only = {{"architectures", {"ZambaForCausalLM"}},
                       {"attention_dropout", 0.0},
                       {"bos_token_id", 1},
                       {"eos_token_id", 2},
                       {"pad_token_id", 0},
                       {"initializer_range", 0.02},
                       {"max_position_embeddings", 4096},
                       {"num_logits_to_keep", 1},
                       {"use_cache", true},
                       {"use_mamba_kernels", false}};
  for (const ParameterEntry& entry : entries) layout.parameters.push_back(zamba_tensor(facts, entry));
  return layout;
}

}  // namespace detail

template <detail::ZambaNetwork Net>
struct CheckpointFormat<Net> {
  using Stack = typename Net::Stack;
  static constexpr MambaConfig mixer = Stack::MixerType::config;
  static constexpr SharedAttentionConfig shared = Stack::SharedType::config;
  static_assert(mixer.norm_eps == shared.norm_eps && mixer.norm_eps == Net::norm_eps,
                "zamba::CheckpointFormat: files of model_type zamba have one rms_norm_eps; give MambaConfig and "
                "SharedAttentionConfig the same norm_eps");
  static_assert(shared.softmax_scale == 0,
                "zamba::CheckpointFormat: files of model_type zamba cannot say softmax_scale; leave it 0");

  static CheckpointLayout layout(const std::vector<ParameterEntry>& entries) {
    const std::string_view pattern(Stack::pattern.letters, static_cast<std::size_t>(Stack::layers));
    return detail::zamba_layout({Net::vocabulary, pattern, mixer, shared}, entries);
  }
};

}  // namespace zamba
