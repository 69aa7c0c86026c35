// SPDX-License-Identifier: MIT
// Checkpoints of model_type "zamba" (Zamba-7B-v1, arXiv 2405.16712): the keys of config.json and the tensors' names.
//
// Names are those of checkpoints/hybrid_names.hpp, with the shared block under model.layers.i.shared_transf:
//   mixer          mamba.{in_proj.weight, conv1d.weight, conv1d.bias, x_proj_weight, dt_proj_weight, dt_proj_bias,
//                  A_log, D, out_proj.weight}
//   shared block   {input_layernorm, self_attn.{q,k,v,o}_proj, pre_ff_layernorm}.weight,
//                  feed_forward.{gate,up,down}_proj.weight
//
// The rows of in_proj alternate in these files between u's channels and z's, and gate_up is two tensors.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/blocks/mamba_block.hpp>
#include <zamba/checkpoints/hybrid_names.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

namespace detail {

template <class Block>
inline constexpr bool is_mamba_block = false;
template <MambaConfig C>
inline constexpr bool is_mamba_block<MambaBlock<C>> = true;

/// Mamba layers, and one attention block that hybrid layers share.
template <class Net>
concept ZambaNetwork = is_mamba_block<typename Net::Stack::MixerType> &&
                       is_shared_attention<typename Net::Stack::SharedType> && Net::Stack::copies == 1;

/// What a type of this family says, as data.
struct ZambaFacts {
  Index vocabulary;
  bool tied;
  std::string_view pattern;
  MambaConfig mixer;
  SharedAttentionConfig shared;
};

/// Letters of the layers, 'm' or 'h': 0 and 1 plain, 2 hybrid, and after those the ones that period and offset say.
inline std::string zamba_letters(std::size_t layers, Index period, Index offset) {
  std::string pattern;
  for (Index i = 0; i < static_cast<Index>(layers); ++i)
    pattern += i == 2 || (i > 2 && (i - 3) % period == offset) ? 'h' : 'm';
  return pattern;
}

/// From layers_block_type or, where that is absent, from period and offset.
inline nlohmann::json zamba_pattern_of(const nlohmann::json& config, const nlohmann::json& wanted) {
  using json = nlohmann::json;
  const auto list = config.find("layers_block_type");
  if (list != config.end() && !list->is_null()) return hybrid_pattern_of(*list);
  json period = config.value("attn_layer_period", json()), offset = config.value("attn_layer_offset", json());
  if (period.is_null() && offset.is_null()) return nullptr;
  if (period.is_null()) period = 6;
  if (offset.is_null()) offset = 4;
  if (!period.is_number_integer() || !offset.is_number_integer() || period.get<Index>() <= 0)
    return "attn_layer_period " + value_text(period) + ", attn_layer_offset " + value_text(offset);
  // For as many layers as the type has: their number in the file is compared by itself.
  return zamba_letters(wanted.get_ref<const std::string&>().size(), period.get<Index>(), offset.get<Index>());
}

inline nlohmann::json zamba_dt_rank_of(const nlohmann::json& config, const nlohmann::json&) {
  const nlohmann::json rank = config.value("mamba_dt_rank", nlohmann::json()),
                       d = config.value("hidden_size", nlohmann::json(3712));
  if (rank != "auto" || !d.is_number_integer()) return rank;
  return d.get<Index>() / 16 + (d.get<Index>() % 16 != 0);
}

inline std::vector<ConfigKey> zamba_config(const ZambaFacts& facts) {
  const auto& [vocabulary, tied, pattern, mixer, shared] = facts;
  // What an absent key means is the default of ZambaConfig in transformers.
  std::vector<ConfigKey> keys = hybrid_config(shared, tied);
  keys.insert(keys.begin(), {{"model_type", "zamba"},
                             {"vocab_size", vocabulary, 32000},
                             {"hidden_size", mixer.d_model, 3712},
                             {"num_hidden_layers", pattern.size(), 76},
                             {"layers_block_type",
                              std::string(pattern),
                              zamba_letters(pattern.size(), 6, 4),
                              zamba_pattern_of,
                              hybrid_layer_types(pattern),
                              {"layer_types"}},
                             {"intermediate_size", shared.ff(), 14848},
                             {"num_attention_heads", shared.n_heads, 16},
                             {"n_mamba_heads", mixer.n_heads, 2},
                             {"mamba_d_state", mixer.d_state, 16},
                             {"mamba_d_conv", mixer.d_conv, 4},
                             {"mamba_expand", mixer.expand, 2},
                             {"mamba_dt_rank", mixer.rank(), ceil_div(mixer.d_model, 16), zamba_dt_rank_of},
                             {"mamba_conv_bias", mixer.conv_bias, true},
                             {"mamba_proj_bias", mixer.proj_bias, false},
                             {"hidden_mamba_act", "silu", "silu"}});
  return with_common_keys(std::move(keys));
}

/// The name of a parameter of MambaBlock in a layer.
inline std::string zamba_mixer_name(std::string_view own) {
  if (own == "norm.weight") return "input_layernorm.weight";
  if (own == "x_proj.weight") return "mamba.x_proj_weight";
  if (own == "dt_proj.weight") return "mamba.dt_proj_weight";
  if (own == "dt_proj.bias") return "mamba.dt_proj_bias";
  return "mamba." + std::string(own);
}

inline CheckpointParameter zamba_parameter(const HybridNames& names, const ParameterEntry& entry) {
  const auto [owner, number, own] = HybridNames::place_of(entry.name);
  if (owner == "shared" && own == "gate_up.weight") {
    const std::vector<Index> half{entry.shape[0] / 2, entry.shape[1]};
    return std::vector{names.of_block(number, "feed_forward.gate_proj.weight", half),
                       names.of_block(number, "feed_forward.up_proj.weight", half)};
  }
  if (owner == "shared") return names.of_block(number, hybrid_shared_name(own), entry.shape);
  if (owner != "layers" || own == "linear.weight") return names.of_rest(entry);
  CheckpointTensor tensor = names.of_mixer(number, zamba_mixer_name(own), entry.shape);
  tensor.interleaved = own.starts_with("in_proj.");
  return tensor;
}

inline CheckpointLayout zamba_layout(const ZambaFacts& facts, const std::vector<ParameterEntry>& entries) {
  CheckpointLayout layout;
  layout.config = zamba_config(facts);
  layout.saved_only = hybrid_saved_only();
  layout.saved_only["architectures"] = {"ZambaForCausalLM"};
  // The slow path of transformers computes the same on every machine; users who have its kernels switch them on.
  layout.saved_only["use_mamba_kernels"] = false;
  const HybridNames names(facts.pattern, 1, facts.tied, "shared_transf");
  for (const ParameterEntry& entry : entries) layout.parameters.push_back(zamba_parameter(names, entry));
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
  static_assert(!shared.rope && shared.mlp_adapter_rank == 0 && shared.qkv_adapter_rank == 0,
                "zamba::CheckpointFormat: files of model_type zamba have no rope and no adapters; those of zamba2 do");

  static CheckpointLayout layout(const std::vector<ParameterEntry>& entries) {
    const std::string_view pattern(Stack::pattern.letters, static_cast<std::size_t>(Stack::layers));
    return detail::zamba_layout({Net::vocabulary, Net::tied, pattern, mixer, shared}, entries);
  }
};

}  // namespace zamba
