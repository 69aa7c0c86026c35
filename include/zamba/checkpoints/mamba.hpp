// SPDX-License-Identifier: MIT
// Checkpoints of model_type "mamba" (arXiv 2312.00752) and "mamba2" (arXiv 2405.21060): the keys of config.json and the
// tensors' names.
//
//   embedding      backbone.embeddings.weight
//   head           lm_head.weight                  where it is tied: absent, or equal
//   final norm     backbone.norm_f.weight
//   layer i        backbone.layers.i.{norm.weight, mixer.*}
//
// in_proj holds the rows of u, then those of z; of mamba2 those of z, u, B, C and delta: our order.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <zamba/blocks/mamba2_block.hpp>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/checkpoints/config_values.hpp>
#include <zamba/checkpoints/format.hpp>
#include <zamba/language_model.hpp>
#include <zamba/pattern_stack.hpp>

namespace zamba {

namespace detail {

/// Layers of one kind, nothing shared.
template <class Net>
concept MambaNetwork = std::is_same_v<typename Net::Stack::SharedType, NoShared> &&
    std::is_same_v<typename Net::Stack::MixerType, MambaBlock<Net::Stack::MixerType::config>>;
template <class Net>
concept Mamba2Network = std::is_same_v<typename Net::Stack::SharedType, NoShared> &&
    std::is_same_v<typename Net::Stack::MixerType, Mamba2Block<Net::Stack::MixerType::config>>;

/// What a type of either family says beside its mixer, as data.
struct BackboneFacts {
  Index vocabulary, layers;
  bool tied;
};

/// "auto" is a sixteenth of the file's width, rounded up.
inline nlohmann::json mamba_dt_rank_of(const nlohmann::json& config, const nlohmann::json&) {
  const nlohmann::json rank = config.value("time_step_rank", nlohmann::json()),
                       d = config.value("hidden_size", nlohmann::json(768));
  if (rank != "auto" || !d.is_number_integer()) return rank;
  return d.get<Index>() / 16 + (d.get<Index>() % 16 != 0);
}

/// Files of some releases say that norms are of the root mean square.
inline ConfigKey backbone_rms_norm() { return fixed_key("rms_norm", true, "; norms subtract no mean here"); }

// What an absent key means is the default of MambaConfig and Mamba2Config in transformers.

inline std::vector<ConfigKey> mamba_config(const BackboneFacts& facts, const MambaConfig& mixer) {
  return with_common_keys({{"model_type", "mamba"},
                           {"vocab_size", facts.vocabulary, 50280},
                           {"hidden_size", mixer.d_model, 768},
                           {"num_hidden_layers", facts.layers, 32},
                           {"intermediate_size", mixer.d_inner(), mixer.d_inner()},
                           {"state_size", mixer.d_state, 16},
                           {"conv_kernel", mixer.d_conv, 4},
                           {"expand", mixer.expand, 2},
                           {"time_step_rank", mixer.rank(), ceil_div(mixer.d_model, 16), mamba_dt_rank_of},
                           {"use_conv_bias", mixer.conv_bias, true},
                           {"use_bias", mixer.proj_bias, false},
                           {"hidden_act", "silu", "silu"},
                           {"layer_norm_epsilon", mixer.norm_eps, 1e-5},
                           {"tie_word_embeddings", facts.tied, true},
                           backbone_rms_norm()});
}

inline std::vector<ConfigKey> mamba2_config(const BackboneFacts& facts, const Mamba2Config& mixer) {
  return with_common_keys({{"model_type", "mamba2"},
                           {"vocab_size", facts.vocabulary, 32768},
                           {"hidden_size", mixer.d_model, 4096},
                           {"num_hidden_layers", facts.layers, 64},
                           {"num_heads", mixer.heads(), 128},
                           {"head_dim", mixer.head_dim(), 64},
                           {"n_groups", mixer.n_groups, 8},
                           {"state_size", mixer.d_state, 128},
                           {"conv_kernel", mixer.d_conv, 4},
                           {"expand", mixer.expand, 2},
                           fixed_key("intermediate_size", mixer.d_inner()),
                           dt_limit_key(mixer.dt_min),
                           {"use_conv_bias", mixer.conv_bias, true},
                           {"use_bias", mixer.proj_bias, false},
                           {"hidden_act", "silu", "silu"},
                           {"layer_norm_epsilon", mixer.norm_eps, 1e-5},
                           {"tie_word_embeddings", facts.tied, false},
                           backbone_rms_norm()});
}

/// Our mixers have several heads where Mamba has one: files lack that extent of 1, `heads`, in front.
inline CheckpointTensor backbone_tensor(const BackboneFacts& facts, bool heads, const ParameterEntry& entry) {
  const std::string_view name = entry.name;
  if (name == "embedding.weight") {
    CheckpointTensor tensor{"backbone.embeddings.weight", entry.shape};
    if (facts.tied) tensor.copies = {"lm_head.weight"};
    return tensor;
  }
  if (name == "head.weight") return {"lm_head.weight", entry.shape};
  if (name == "final_norm.weight") return {"backbone.norm_f.weight", entry.shape};

  require(name.starts_with("layers."), "checkpoint of model_type mamba: no name is known for parameter ", name);
  const std::size_t dot = name.find('.', 7);
  const std::string layer = "backbone." + std::string(name.substr(0, dot + 1));
  const std::string_view own = name.substr(dot + 1);
  if (own == "norm.weight") return {layer + "norm.weight", entry.shape};
  CheckpointTensor tensor{layer + "mixer." + std::string(own == "gated_norm.weight" ? "norm.weight" : own),
                          entry.shape};
  if (own == "conv1d.weight") tensor.shape.insert(tensor.shape.begin() + 1, 1);
  const bool of_heads = own == "A_log" || own == "D" || own.starts_with("x_proj.") || own.starts_with("dt_proj.");
  if (heads && of_heads) tensor.shape.erase(tensor.shape.begin());
  return tensor;
}

/// Keys that transformers expects and that change nothing here.
inline nlohmann::json backbone_saved_only(const char* architecture) {
  return {{"architectures", {architecture}},
          {"bos_token_id", 0},
          {"eos_token_id", 0},
          {"pad_token_id", 0},
          {"initializer_range", 0.1},
          {"rescale_prenorm_residual", false},
          {"residual_in_fp32", true},
          {"time_step_floor", 1e-4},
          {"time_step_max", 0.1},
          {"time_step_min", 0.001},
          {"use_cache", true}};
}

}  // namespace detail

template <detail::MambaNetwork Net>
struct CheckpointFormat<Net> {
  static constexpr bool hidden_states_leave_layers = true;  // in transformers' output, and so in reference cases
  static constexpr MambaConfig mixer = Net::Stack::MixerType::config;
  static_assert(detail::equal<mixer.n_heads, 1>,
                "zamba::CheckpointFormat: files of model_type mamba know no heads; leave MambaConfig's n_heads 1");

  static CheckpointLayout layout(const std::vector<ParameterEntry>& entries) {
    const detail::BackboneFacts facts{Net::vocabulary, Net::Stack::layers, Net::tied};
    CheckpointLayout layout{detail::mamba_config(facts, mixer), detail::backbone_saved_only("MambaForCausalLM"), {}};
    for (const ParameterEntry& entry : entries)
      layout.parameters.push_back(detail::backbone_tensor(facts, true, entry));
    return layout;
  }
};

template <detail::Mamba2Network Net>
struct CheckpointFormat<Net> {
  static constexpr bool hidden_states_leave_layers = true;  // as mamba
  static constexpr Mamba2Config mixer = Net::Stack::MixerType::config;
  static_assert(detail::equal<mixer.gated_norm_groups(), mixer.n_groups>,
                "zamba::CheckpointFormat: files of model_type mamba2 have a gated norm over the n_groups groups; leave "
                "Mamba2Config's norm_groups 0");
  static_assert(mixer.gated_eps() == mixer.norm_eps,
                "zamba::CheckpointFormat: files of model_type mamba2 have one layer_norm_epsilon; leave Mamba2Config's "
                "gated_norm_eps 0");

  static CheckpointLayout layout(const std::vector<ParameterEntry>& entries) {
    const detail::BackboneFacts facts{Net::vocabulary, Net::Stack::layers, Net::tied};
    CheckpointLayout layout{detail::mamba2_config(facts, mixer), detail::backbone_saved_only("Mamba2ForCausalLM"), {}};
    layout.saved_only["chunk_size"] = 256;  // of transformers' own computation
    for (const ParameterEntry& entry : entries)
      layout.parameters.push_back(detail::backbone_tensor(facts, false, entry));
    return layout;
  }
};

}  // namespace zamba
