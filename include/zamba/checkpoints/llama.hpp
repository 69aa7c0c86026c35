// SPDX-License-Identifier: MIT
// Checkpoints of model_type "llama" (Llama 2, arXiv 2307.09288), and of "mistral" without a sliding window (arXiv
// 2310.06825), which is the same: the keys of config.json and the tensors' names.
//
//   embedding      model.embed_tokens.weight
//   head           lm_head.weight                  where it is tied: absent, or equal
//   final norm     model.norm.weight
//   layer i        model.layers.i.{input_layernorm, self_attn.{q,k,v,o}_proj, post_attention_layernorm,
//                  mlp.{gate,up,down}_proj}.weight
//
// Older files also hold model.layers.i.self_attn.rotary_emb.inv_freq, which follows from theta: passed over.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <zamba/blocks/transformer_block.hpp>
#include <zamba/checkpoints/config_values.hpp>
#include <zamba/checkpoints/format.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

namespace detail {

/// Layers of one kind, nothing shared.
template <class Net>
concept LlamaNetwork = std::is_same_v<typename Net::Stack::SharedType, NoShared> &&
    std::is_same_v<typename Net::Stack::MixerType, TransformerBlock<Net::Stack::MixerType::config>>;

/// What a type of this family says, as data.
struct LlamaFacts {
  Index vocabulary, layers;
  bool tied;
  TransformerConfig layer;
};

/// layer_types, where a layer attends to less than all that is before it.
inline nlohmann::json llama_layer_types_of(const nlohmann::json& config, const nlohmann::json&) {
  const nlohmann::json types = config.value("layer_types", nlohmann::json());
  const bool full = types.is_array() && std::all_of(types.begin(), types.end(), [](const nlohmann::json& type) {
                      return type == "full_attention";
                    });
  return full ? nlohmann::json() : types;
}

inline std::vector<ConfigKey> llama_config(const LlamaFacts& facts) {
  const auto& [vocabulary, layers, tied, layer] = facts;
  // What an absent key means is the default of LlamaConfig in transformers, or of MistralConfig.
  ConfigKey model_type{"model_type", "llama"};
  model_type.also["mistral"] = {{"intermediate_size", 14336}, {"num_key_value_heads", 8}, {"sliding_window", 4096}};
  ConfigKey layer_types = fixed_key("layer_types", {}, "; every layer attends to all that is before it here");
  layer_types.read = llama_layer_types_of;
  std::vector<ConfigKey> keys{{"vocab_size", vocabulary, 32000},
                              {"hidden_size", layer.d_model, 4096},
                              {"num_hidden_layers", layers, 32},
                              {"intermediate_size", layer.ff(), 11008},
                              {"num_attention_heads", layer.n_heads, 32},
                              {"num_key_value_heads", layer.kv_heads(), layer.n_heads},
                              {"head_dim", layer.head_dim(), layer.head_dim()},
                              {"attention_bias", false, false},
                              {"mlp_bias", false, false},
                              {"hidden_act", "silu", "silu"},
                              {"rms_norm_eps", layer.norm_eps, 1e-6},
                              {"tie_word_embeddings", tied, false},
                              fixed_key("sliding_window", {}, "; attention over a window is not computed"),
                              std::move(layer_types)};
  keys.insert(keys.begin(), std::move(model_type));
  for (ConfigKey& key : rope_keys(layer.rope_theta)) keys.push_back(std::move(key));
  return with_common_keys(std::move(keys));
}

inline CheckpointParameter llama_parameter(const LlamaFacts& facts, const ParameterEntry& entry) {
  const std::string_view name = entry.name;
  if (name == "embedding.weight") {
    CheckpointTensor tensor{"model.embed_tokens.weight", entry.shape};
    if (facts.tied) tensor.copies = {"lm_head.weight"};
    return tensor;
  }
  if (name == "head.weight") return CheckpointTensor{"lm_head.weight", entry.shape};
  if (name == "final_norm.weight") return CheckpointTensor{"model.norm.weight", entry.shape};

  require(name.starts_with("layers."), "checkpoint of model_type llama: no name is known for parameter ", name);
  const std::size_t dot = name.find('.', 7);
  const std::string layer = "model." + std::string(name.substr(0, dot + 1));
  const std::string_view own = name.substr(dot + 1);
  if (own == "gate_up.weight") {
    const std::vector<Index> half{entry.shape[0] / 2, entry.shape[1]};
    return std::vector<CheckpointTensor>{{layer + "mlp.gate_proj.weight", half}, {layer + "mlp.up_proj.weight", half}};
  }
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 3> renamed{
      {{"norm.weight", "input_layernorm.weight"},
       {"ff_norm.weight", "post_attention_layernorm.weight"},
       {"down_proj.weight", "mlp.down_proj.weight"}}};
  for (const auto& [ours, theirs] : renamed)
    if (own == ours) return CheckpointTensor{layer + std::string(theirs), entry.shape};
  return CheckpointTensor{layer + "self_attn." + std::string(own), entry.shape};
}

inline CheckpointLayout llama_layout(const LlamaFacts& facts, const std::vector<ParameterEntry>& entries) {
  CheckpointLayout layout;
  layout.config = llama_config(facts);
  layout.saved_only = {{"architectures", {"LlamaForCausalLM"}},
                       {"attention_dropout", 0.0},
                       {"bos_token_id", 1},
                       {"eos_token_id", 2},
                       {"initializer_range", 0.02},
                       {"max_position_embeddings", 4096},
                       {"pretraining_tp", 1},
                       {"use_cache", true}};
  for (const ParameterEntry& entry : entries) layout.parameters.push_back(llama_parameter(facts, entry));
  for (Index i = 0; i < facts.layers; ++i)
    layout.derived.push_back("model.layers." + std::to_string(i) + ".self_attn.rotary_emb.inv_freq");
  return layout;
}

}  // namespace detail

template <detail::LlamaNetwork Net>
struct CheckpointFormat<Net> {
  static CheckpointLayout layout(const std::vector<ParameterEntry>& entries) {
    return detail::llama_layout({Net::vocabulary, Net::Stack::layers, Net::tied, Net::Stack::MixerType::config},
                                entries);
  }
};

}  // namespace zamba
