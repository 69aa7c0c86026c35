// SPDX-License-Identifier: MIT
// Checkpoints of model_type "zamba2" (arXiv 2411.15242): the keys of config.json and the tensors' names.
//
// Names are those of checkpoints/hybrid_names.hpp, with the shared blocks under model.layers.i.shared_transformer:
//   mixer          mamba.{in_proj.weight, conv1d.weight, conv1d.bias, dt_bias, A_log, D, norm.weight, out_proj.weight}
//   shared block   {input_layernorm, self_attn.{q,k,v,o}_proj, pre_ff_layernorm}.weight,
//                  feed_forward.{gate_up_proj, down_proj}.weight
//   of use j       self_attn.linear_{q,k,v}_adapter_list.j.{0,1}.weight,
//                  feed_forward.gate_up_proj_adapter_list.j.{0,1}.weight, in the shared block that use j meets
//
// dt is limited by time_step_limit alone, alike in prefill and decode: Mamba2Config::dt_min. time_step_min limits it in
// the prefill of transformers 5 but not in its decode, so that no type computes the same; it counts where a type has a
// dt_min and a file has no time_step_limit.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/blocks/mamba2_block.hpp>
#include <zamba/checkpoints/config_values.hpp>
#include <zamba/checkpoints/hybrid_names.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

namespace detail {

template <class Block>
inline constexpr bool is_mamba2_block = false;
template <Mamba2Config C>
inline constexpr bool is_mamba2_block<Mamba2Block<C>> = true;

/// Mamba-2 layers, and attention blocks that hybrid layers share in turn.
template <class Net>
concept Zamba2Network =
    is_mamba2_block<typename Net::Stack::MixerType> && is_shared_attention<typename Net::Stack::SharedType>;

/// What a type of this family says, as data.
struct Zamba2Facts {
  Index vocabulary;
  bool tied;
  std::string_view pattern;
  Index copies;
  Mamba2Config mixer;
  SharedAttentionConfig shared;
};

/// Letters of the layers, 'm' or 'h', from layers_block_type, or from hybrid_layer_ids, or as in Zamba2-2.7B.
inline nlohmann::json zamba2_pattern_of(const nlohmann::json& config, const nlohmann::json& wanted) {
  const auto given = [&](const char* key) { return config.value(key, nlohmann::json()); };
  if (const auto list = given("layers_block_type"); !list.is_null()) return hybrid_pattern_of(list);
  const auto ids = given("hybrid_layer_ids");
  if (ids.is_null()) return nullptr;
  if (!ids.is_array()) return ids;
  // For as many layers as the type has: their number in the file is compared by itself.
  std::string pattern(wanted.get_ref<const std::string&>().size(), 'm');
  for (const auto& id : ids) {
    if (!id.is_number_integer() || id < 0 || id >= pattern.size()) return ids;
    pattern[id.get<std::size_t>()] = 'h';
  }
  return pattern;
}

/// Whether a file's attention has a position code at all: without, nothing else about it matters.
inline bool zamba2_has_rope(const nlohmann::json& config) {
  const auto at = config.find("use_mem_rope");
  return at != config.end() && *at == true;
}

inline nlohmann::json zamba2_long_context_of(const nlohmann::json& config, const nlohmann::json& wanted) {
  return zamba2_has_rope(config) ? config.value("use_long_context", nlohmann::json()) : wanted;
}

template <auto Read>
nlohmann::json zamba2_if_rope(const nlohmann::json& config, const nlohmann::json& wanted) {
  return zamba2_has_rope(config) ? Read(config, wanted) : wanted;
}

inline std::vector<ConfigKey> zamba2_rope_keys(double theta) {
  std::vector<ConfigKey> keys = rope_keys(theta);
  for (ConfigKey& key : keys)
    key.read = key.read == rope_theta_of  ? zamba2_if_rope<rope_theta_of>
               : key.read == rope_type_of ? zamba2_if_rope<rope_type_of>
                                          : zamba2_if_rope<partial_rotary_of>;
  return keys;
}

/// time_step_limit; a file without may be meant with time_step_min as its limit, if that is the type's.
inline nlohmann::json zamba2_dt_limit_of(const nlohmann::json& config, const nlohmann::json& wanted) {
  const nlohmann::json limit = dt_limit_of(config, wanted), least = config.value("time_step_min", nlohmann::json());
  return limit.is_null() && wanted.front() > 0 && same_value(wanted.front(), least) ? wanted : limit;
}

inline ConfigKey zamba2_dt_limit_key(double least) {
  ConfigKey key = dt_limit_key(least);
  key.read = zamba2_dt_limit_of;
  key.written = least > 0;
  return key;
}

inline std::vector<ConfigKey> zamba2_config(const Zamba2Facts& facts) {
  const auto& [vocabulary, tied, pattern, copies, mixer, shared] = facts;
  nlohmann::json hybrid_ids = nlohmann::json::array();
  for (std::size_t i = 0; i < pattern.size(); ++i)
    if (pattern[i] == 'h') hybrid_ids.push_back(i);
  // What an absent key means is the default of Zamba2Config in transformers.
  std::vector<ConfigKey> keys = hybrid_config(shared, tied);
  keys.insert(keys.begin(), {{"model_type", "zamba2"},
                             {"vocab_size", vocabulary, 32000},
                             {"hidden_size", mixer.d_model, 2560},
                             {"num_hidden_layers", pattern.size(), 54},
                             {"layers_block_type",
                              std::string(pattern),
                              "mmmmmmhmmmmmhmmmmmhmmmmmhmmmmmhmmmmmhmmmmmhmmmmhmmmhmm",
                              zamba2_pattern_of,
                              hybrid_layer_types(pattern),
                              {"layer_types"}},
                             {"hybrid_layer_ids", hybrid_ids, hybrid_ids},
                             {"num_mem_blocks", copies, 1},
                             {"intermediate_size", shared.ff(), 4 * mixer.d_model},
                             {"num_attention_heads", shared.n_heads, 32},
                             {"use_shared_attention_adapter", shared.qkv_adapter_rank > 0, false},
                             {"adapter_rank", shared.mlp_adapter_rank, 128},
                             {"use_mem_rope", shared.rope, false},
                             {"use_long_context", shared.context_stretch != 1, false, zamba2_long_context_of},
                             {"n_mamba_heads", mixer.heads(), 8},
                             {"mamba_headdim", mixer.head_dim(), mixer.head_dim()},
                             {"mamba_d_state", mixer.d_state, 64},
                             {"mamba_d_conv", mixer.d_conv, 4},
                             {"mamba_expand", mixer.expand, 2},
                             {"mamba_ngroups", mixer.n_groups, 1},
                             {"use_conv_bias", mixer.conv_bias, true},
                             {"add_bias_linear", mixer.proj_bias, false},
                             zamba2_dt_limit_key(mixer.dt_min)});
  for (ConfigKey& key : zamba2_rope_keys(shared.rope_theta)) keys.push_back(std::move(key));
  return with_common_keys(std::move(keys));
}

/// The name of a parameter of Mamba2Block in a layer.
inline std::string zamba2_mixer_name(std::string_view own) {
  if (own == "norm.weight") return "input_layernorm.weight";
  if (own == "gated_norm.weight") return "mamba.norm.weight";
  return "mamba." + std::string(own);
}

/// The name of a parameter of SharedAttention in a shared block.
inline std::string zamba2_shared_name(std::string_view own) {
  return own == "gate_up.weight" ? "feed_forward.gate_up_proj.weight" : hybrid_shared_name(own);
}

/// The name of "q_adapter.a.weight" of a use, and the like, in the shared block that the use meets.
inline std::string zamba2_adapter_name(std::string_view own, Index use) {
  const std::string product(own.substr(0, own.find("_adapter.")));
  const std::string list = product == "gate_up" ? "feed_forward.gate_up_proj" : "self_attn.linear_" + product;
  const char* factor = own.ends_with(".a.weight") ? ".0.weight" : ".1.weight";
  return list + "_adapter_list." + std::to_string(use) + factor;
}

inline CheckpointTensor zamba2_tensor(const HybridNames& names, const ParameterEntry& entry) {
  const auto [owner, number, own] = HybridNames::place_of(entry.name);
  if (owner == "shared") return names.of_block(number, zamba2_shared_name(own), entry.shape);
  if (owner != "layers" || own == "linear.weight") return names.of_rest(entry);
  if (own.find("_adapter.") != own.npos)
    return names.of_block(names.block(number), zamba2_adapter_name(own, names.use(number)), entry.shape);
  return names.of_mixer(number, zamba2_mixer_name(own), entry.shape);
}

inline CheckpointLayout zamba2_layout(const Zamba2Facts& facts, const std::vector<ParameterEntry>& entries) {
  const auto& [vocabulary, tied, pattern, copies, mixer, shared] = facts;
  CheckpointLayout layout;
  layout.config = zamba2_config(facts);
  layout.saved_only = hybrid_saved_only();
  layout.saved_only.update({{"architectures", {"Zamba2ForCausalLM"}},
                            {"chunk_size", 256},
                            {"kv_channels", shared.d_model / shared.n_heads},
                            {"num_query_groups", shared.n_heads},
                            {"time_step_floor", 1e-4},
                            {"time_step_max", 0.1},
                            // As a limit of dt this is none.
                            {"time_step_min", mixer.dt_min > 0 ? mixer.dt_min : 1e-9},
                            {"use_mem_eff_path", false}});
  if (shared.context_stretch != 1) layout.saved_only["max_position_embeddings"] = 16384;
  const HybridNames names(pattern, copies, tied, "shared_transformer");
  for (const ParameterEntry& entry : entries) layout.parameters.push_back(zamba2_tensor(names, entry));
  return layout;
}

}  // namespace detail

template <detail::Zamba2Network Net>
struct CheckpointFormat<Net> {
  using Stack = typename Net::Stack;
  static constexpr Mamba2Config mixer = Stack::MixerType::config;
  static constexpr SharedAttentionConfig shared = Stack::SharedType::config;
  static_assert(
      mixer.norm_eps == shared.norm_eps && mixer.norm_eps == Net::norm_eps && mixer.gated_eps() == 1e-5,
      "zamba::CheckpointFormat: files of model_type zamba2 have one rms_norm_eps, and 1e-5 in the gated norm; "
      "give Mamba2Config and SharedAttentionConfig the same norm_eps, and a gated_norm_eps of 1e-5");
  static_assert(mixer.conv_bias && !mixer.proj_bias && mixer.gated_norm_groups() == mixer.n_groups,
                "zamba::CheckpointFormat: files of model_type zamba2 have a bias in the convolution and in no linear, "
                "and a gated norm over the n_groups groups; leave conv_bias, proj_bias and norm_groups as they are");
  static_assert(
      shared.softmax_scale == 0 && (shared.context_stretch == 1 || shared.context_stretch == 8),
      "zamba::CheckpointFormat: files of model_type zamba2 cannot say softmax_scale, nor a context_stretch but "
      "1 and 8; leave them");
  static_assert(shared.mlp_adapter_rank > 0 &&
                    (shared.qkv_adapter_rank == 0 || shared.qkv_adapter_rank == shared.mlp_adapter_rank),
                "zamba::CheckpointFormat: files of model_type zamba2 have adapters on the MLP, and those on q, k, v of "
                "the same rank; give mlp_adapter_rank, and qkv_adapter_rank the same or 0");

  static CheckpointLayout layout(const std::vector<ParameterEntry>& entries) {
    const std::string_view pattern(Stack::pattern.letters, static_cast<std::size_t>(Stack::layers));
    return detail::zamba2_layout({Net::vocabulary, Net::tied, pattern, Stack::copies, mixer, shared}, entries);
  }
};

}  // namespace zamba
