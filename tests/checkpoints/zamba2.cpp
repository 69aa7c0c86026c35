// SPDX-License-Identifier: MIT
// config.json of model_type zamba2 against the type, and the names and copies of its tensors.
#include <zamba/checkpoints/zamba2.hpp>

#include <limits>
#include <set>
#include <utility>

#include <doctest/doctest.h>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/models/zamba2.hpp>

#include <tests/support/cases.hpp>

using namespace zamba_test;
using nlohmann::json;

namespace {

/// What check_config<Net> says of a case's config with some keys replaced; null removes a key.
template <class Net = Zamba2TwoBlocksCase>
std::string zamba2_refusal(const json& replaced, const char* name = "zamba2-two-blocks") {
  json config = json::parse(read_text(case_path(name) / "config.json"));
  for (const auto& [key, value] : replaced.items()) {
    if (value.is_null())
      config.erase(key);
    else
      config[key] = value;
  }
  return message_of([&] { check_config<Net>(config.dump()); });
}

template <class Net>
std::string own_config() {
  return detail::config_text(CheckpointFormat<Net>::layout(detail::list_parameters<Net, float>()), "float32");
}

template <class Net>
std::string refusal_of_published(const json& config) {
  return message_of([&] { check_config<Net>(config.dump()); });
}

/// What loading the case with two blocks says after an edit of its tensors; the edited weights where nothing.
std::string refusal_of_two_blocks(const std::function<void(HeldTensors&)>& edit) {
  const CaseCopy copy("zamba2-two-blocks");
  copy.edit("model.safetensors", edit);
  return message_of([&] { load_huggingface<Zamba2TwoBlocksCase>(copy.path()); });
}

const std::string self_attn = ".shared_transformer.self_attn.", feed_forward = ".shared_transformer.feed_forward.";

}  // namespace

TEST_CASE("zamba2_checkpoint: every key that matters is compared") {
  CHECK(zamba2_refusal(json::object()) == "");
  CHECK(zamba2_refusal<Zamba2Case>(json::object(), "zamba2") == "");
  const json wrong = {{"model_type", "zamba"},
                      {"vocab_size", 97},
                      {"hidden_size", 33},
                      {"num_hidden_layers", 10},
                      {"layers_block_type", {"linear_attention", "hybrid"}},
                      {"hybrid_layer_ids", {1, 3, 5, 7}},
                      {"num_mem_blocks", 1},
                      {"intermediate_size", 49},
                      {"num_attention_heads", 2},
                      {"num_key_value_heads", 2},
                      {"attention_head_dim", 8},
                      {"attention_hidden_size", 32},
                      {"use_shared_attention_adapter", false},
                      {"adapter_rank", 8},
                      {"use_mem_rope", false},
                      {"use_long_context", true},
                      {"rope_parameters", {{"rope_theta", 10000.0}, {"rope_type", "yarn"}}},
                      {"n_mamba_heads", 8},
                      {"mamba_headdim", 8},
                      {"mamba_d_state", 8},
                      {"mamba_d_conv", 3},
                      {"mamba_expand", 4},
                      {"mamba_ngroups", 1},
                      {"use_conv_bias", false},
                      {"add_bias_linear", true},
                      {"hidden_act", "relu"},
                      {"rms_norm_eps", 1e-6},
                      {"tie_word_embeddings", false}};
  const std::string all = zamba2_refusal(wrong);
  CAPTURE(all);
  for (const auto& item : wrong.items()) {
    const std::string key = item.key();
    CAPTURE(key);
    const std::string alone = zamba2_refusal({{key, item.value()}});
    CHECK(contains(alone, "\n  " + key + ": the type has "));
    CHECK(std::count(alone.begin(), alone.end(), '\n') == 1);
    if (key != "use_long_context" && key != "rope_parameters")  // of no meaning without rope
      CHECK(contains(all, "\n  " + key + ": the type has "));
  }
  CHECK(contains(all, "num_mem_blocks: the type has 2, the file 1"));
  CHECK(contains(all, "layers_block_type: the type has \"mhmhmhmmh\", the file \"mh\""));
  CHECK(contains(zamba2_refusal({{"rope_parameters", {{"rope_theta", 500.0}, {"rope_type", "default"}}}}),
                 "rope_theta: the type has 10000.0, the file 500.0"));
  CHECK(contains(zamba2_refusal({{"rope_parameters", {{"rope_type", "yarn"}}}}),
                 "rope_parameters: the type has \"default\", the file \"yarn\""));
}

TEST_CASE("zamba2_checkpoint: theta in either spelling, and only where there is rope") {
  const auto theta = [](const json& replaced) { return zamba2_refusal(replaced); };
  CHECK(theta({{"rope_parameters", nullptr}}) == "");
  CHECK(theta({{"rope_parameters", nullptr}, {"rope_theta", 10000}}) == "");
  CHECK(theta({{"rope_parameters", json::object()}, {"rope_theta", 10000.0}}) == "");
  CHECK(theta({{"rope_parameters", {{"rope_theta", 10000}}}, {"rope_theta", 7}}) == "");  // the newer spelling wins
  CHECK(theta({{"rope_parameters", nullptr}, {"rope_scaling", {{"type", "default"}}}}) == "");
  for (const json& value : {json(500), json(9999.0), json("10000"), json::array({10000})}) {
    CHECK(contains(theta({{"rope_parameters", nullptr}, {"rope_theta", value}}),
                   "rope_theta: the type has 10000.0, the file " + value.dump()));
    CHECK(contains(theta({{"rope_parameters", {{"rope_theta", value}}}}), "rope_theta: the type has 10000.0"));
  }
  CHECK(contains(theta({{"rope_parameters", "default "}}), "rope_parameters"));
  // Beside rope_parameters, rope_scaling must fit as well, and what changes angles in either counts.
  const std::string type_differs = "rope_scaling: the type has \"default\", the file ";
  CHECK(contains(theta({{"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}}}), type_differs + "\"linear\""));
  CHECK(contains(theta({{"rope_scaling", {{"rope_type", "llama3"}}}}), type_differs + "\"llama3\""));
  CHECK(contains(theta({{"rope_scaling", {{"factor", 2.0}}}}), type_differs + "{\"factor\":2.0}"));
  CHECK(
      contains(theta({{"rope_scaling", {{"rope_theta", 500.0}}}}), "rope_theta: the type has 10000.0, the file 500.0"));
  CHECK(theta({{"rope_scaling", {{"rope_theta", 10000}, {"type", "default"}}}}) == "");
  const json partial{{"rope_type", "default"}, {"rope_theta", 10000.0}, {"partial_rotary_factor", 0.5}};
  CHECK(contains(theta({{"rope_parameters", partial}}), "rope_parameters: the type has \"default\", the file {"));
  CHECK(contains(theta({{"rope_parameters", nullptr}, {"rope_scaling", {{"type", "linear"}}}}), "the file \"linear\""));
  CHECK(zamba2_refusal<Zamba2Case>({{"rope_parameters", {{"rope_theta", 7}, {"rope_type", "yarn"}}}}, "zamba2") == "");
  CHECK(zamba2_refusal<Zamba2Case>({{"use_long_context", true}}, "zamba2") == "");
  CHECK(contains(zamba2_refusal<Zamba2Case>({{"use_mem_rope", 1}}, "zamba2"), "use_mem_rope"));
}

TEST_CASE("zamba2_checkpoint: absent keys mean the defaults of the family") {
  for (const char* key :
       {"num_key_value_heads", "attention_head_dim", "attention_hidden_size", "hybrid_layer_ids", "use_long_context",
        "rope_parameters", "mamba_headdim", "mamba_d_conv", "mamba_expand", "use_conv_bias", "add_bias_linear",
        "hidden_act", "rms_norm_eps", "tie_word_embeddings", "layers_block_type", "time_step_min", "chunk_size"})
    CHECK(zamba2_refusal({{key, nullptr}}) == "");
  const json defaults = {{"vocab_size", 32000},   {"hidden_size", 2560},      {"num_hidden_layers", 54},
                         {"num_mem_blocks", 1},   {"adapter_rank", 128},      {"num_attention_heads", 32},
                         {"n_mamba_heads", 8},    {"mamba_d_state", 64},      {"mamba_ngroups", 1},
                         {"use_mem_rope", false}, {"intermediate_size", 128}, {"use_shared_attention_adapter", false}};
  for (const auto& item : defaults.items()) {
    const std::string key = item.key();
    CAPTURE(key);
    const std::string message = zamba2_refusal({{key, nullptr}});
    CHECK(contains(message, "\n  " + key + ": the type has "));
    CHECK(contains(message, "the file none, which means " + item.value().dump()));
  }
  CHECK(contains(zamba2_refusal({{"model_type", nullptr}}), "model_type: the type has \"zamba2\", the file none"));

  CHECK(zamba2_refusal({{"layers_block_type",
                         {"mamba", "hybrid", "mamba", "hybrid", "linear_attention", "hybrid", "mamba", "mamba",
                          "hybrid"}}}) == "");
  CHECK(contains(zamba2_refusal({{"layers_block_type", nullptr}, {"hybrid_layer_ids", {1, 3, 5, 7}}}),
                 "layers_block_type: the type has \"mhmhmhmmh\", the file \"mhmhmhmhm\""));
  for (const json& ids : {json({1, 3, 5, 9}), json({1, 3, 5, -1}), json({"1"}), json(5), json({1.0})})
    CHECK(contains(zamba2_refusal({{"layers_block_type", nullptr}, {"hybrid_layer_ids", ids}}), "layers_block_type"));
  CHECK(contains(zamba2_refusal({{"layers_block_type", nullptr}, {"hybrid_layer_ids", nullptr}}),
                 "the file none, which means \"mmmmmmhmmmmmhmmmmmh"));
}

TEST_CASE("zamba2_checkpoint: the published sizes") {
  // Zamba2-2.7B leaves its list of layers to the family's default.
  const json of_2_7B = {{"model_type", "zamba2"}, {"n_mamba_heads", 80}, {"num_mem_blocks", 2}};
  CHECK(refusal_of_published<Zamba2_2_7B>(of_2_7B) == "");
  json layers = json::array();
  for (int i = 0; i < 38; ++i) layers.push_back(i % 6 == 5 ? "hybrid" : "mamba");
  const json of_1_2B = {{"model_type", "zamba2"},      {"hidden_size", 2048},  {"num_hidden_layers", 38},
                        {"layers_block_type", layers}, {"n_mamba_heads", 64},  {"mamba_d_state", 128},
                        {"rope_theta", 10000},         {"use_mem_rope", true}, {"use_shared_attention_adapter", true}};
  CHECK(refusal_of_published<Zamba2_1_2B>(of_1_2B) == "");
  CHECK(contains(refusal_of_published<Zamba2_7B>(of_1_2B), "hidden_size: the type has 3584, the file 2048"));

  const CheckpointLayout layout = CheckpointFormat<Zamba2_7B>::layout(detail::list_parameters<Zamba2_7B, bf16>());
  std::set<std::string> names;
  Index elements = 0;
  for (const CheckpointParameter& parameter : layout.parameters) {
    REQUIRE(parameter.parts.size() == 1);
    const CheckpointTensor& tensor = parameter.parts.front();
    CHECK(names.insert(tensor.name).second);
    Index size = 1;
    for (const Index extent : tensor.shape) size *= extent;
    elements += size;
    // Thirteen uses: seven of the first block, six of the second.
    if (contains(tensor.name, "shared_transformer"))
      CHECK(tensor.copies.size() == (contains(tensor.name, "layers.6.") ? 6 : 5));
  }
  CHECK(elements == 7'356'749'648);
  for (const char* name : {"model.layers.6.shared_transformer.feed_forward.gate_up_proj_adapter_list.12.0.weight",
                           "model.layers.11.shared_transformer.feed_forward.gate_up_proj_adapter_list.11.1.weight",
                           "model.layers.11.shared_transformer.feed_forward.gate_up_proj.weight",
                           "model.layers.77.mamba_decoder.mamba.norm.weight", "model.layers.77.linear.weight",
                           "model.layers.80.mamba.dt_bias", "model.layers.80.input_layernorm.weight"})
    CHECK(names.contains(name));
}

TEST_CASE("zamba2_checkpoint: the saved config describes its own type, and no other") {
  const std::string two = own_config<Zamba2TwoBlocksCase>(), one = own_config<Zamba2Case>();
  CHECK(message_of([&] { check_config<Zamba2TwoBlocksCase>(two); }) == "");
  CHECK(message_of([&] { check_config<Zamba2Case>(one); }) == "");
  CHECK(message_of([&] { check_config<Zamba2Case>(two); }) != "");
  // Every key of what transformers wrote, with its value where that is no matter of release or machine.
  const std::set<std::string> left_out{"transformers_version", "use_mamba_kernels"};
  for (const auto& [name, text] : {std::pair("zamba2", one), std::pair("zamba2-two-blocks", two)}) {
    const json ours = json::parse(text), theirs = json::parse(read_text(case_path(name) / "config.json"));
    for (const auto& item : theirs.items()) {
      const std::string key = item.key();
      CAPTURE(key);
      if (left_out.contains(key)) continue;
      REQUIRE(ours.contains(key));
      if (key != "layers_block_type" && key != "chunk_size") CHECK(ours[key] == item.value());
    }
    CHECK(ours["rope_theta"] == 10000.0);  // older releases read this one
  }

  using Long = LanguageModel<
      11, PatternStack<"mh",
                       Mamba2Block<Mamba2Config{
                           .d_model = 16, .n_heads = 2, .dt_min = 0.5, .norm_eps = 1e-3, .gated_norm_eps = 1e-5}>,
                       SharedAttention<SharedAttentionConfig{.d_model = 16,
                                                             .n_heads = 2,
                                                             .rope = true,
                                                             .mlp_adapter_rank = 3,
                                                             .norm_eps = 1e-3,
                                                             .context_stretch = 8}>>>;
  const json config = json::parse(own_config<Long>());
  CHECK(config["use_long_context"] == true);
  CHECK(config["max_position_embeddings"] == 16384);
  CHECK(config["rope_theta"] == 10000.0);  // as it is before it is stretched
  CHECK(config["rms_norm_eps"] == 1e-3);
  CHECK(config["time_step_min"] == 0.5);
  CHECK(config["time_step_limit"] == json{0.5, std::numeric_limits<float>::max()});
  CHECK(message_of([&] { check_config<Long>(config.dump()); }) == "");
}

TEST_CASE("zamba2_checkpoint: a limit of dt is the type's, or refused with both") {
  for (const json& none : {json(nullptr), json{0.0, "Infinity"}, json{0.0, json{{"__float__", "Infinity"}}},
                           json{0, std::numeric_limits<float>::max()}})
    CHECK(zamba2_refusal({{"time_step_limit", none}}) == "");
  const std::string type = R"(time_step_limit: the type has [0.0,{"__float__":"Infinity"}], the file )";
  for (const json& limit : {json{0.001, 0.1}, json{0.0, 0.001}, json{0.0, 100.0}})
    CHECK(contains(zamba2_refusal({{"time_step_limit", limit}}), type + limit.dump()));
  CHECK(contains(zamba2_refusal({{"time_step_limit", {0.001, "Infinity"}}}),
                 type + R"([0.001,{"__float__":"Infinity"}])"));
  CHECK(zamba2_refusal({{"time_step_min", 0.5}}) == "");

  using Limited = LanguageModel<
      96, PatternStack<
              "mmhmhm", Mamba2Block<Mamba2Config{.d_model = 32, .d_state = 16, .n_heads = 8, .dt_min = 0.01}>,
              SharedAttention<SharedAttentionConfig{.d_model = 32, .n_heads = 4, .d_ff = 64, .mlp_adapter_rank = 4}>>>;
  CHECK(zamba2_refusal<Limited>({{"time_step_limit", {0.01, "Infinity"}}}, "zamba2") == "");
  CHECK(zamba2_refusal<Limited>({{"time_step_min", 0.01}}, "zamba2") == "");
  const std::string of_limited = R"(time_step_limit: the type has [0.01,{"__float__":"Infinity"}], the file )";
  CHECK(contains(zamba2_refusal<Limited>(json::object(), "zamba2"),
                 of_limited + R"(none, which means [0.0,{"__float__":"Infinity"}])"));
  CHECK(contains(zamba2_refusal<Limited>({{"time_step_limit", {0.01, 0.1}}}, "zamba2"), of_limited + "[0.01,0.1]"));
  CHECK(contains(zamba2_refusal<Limited>({{"time_step_min", 0.01}, {"time_step_limit", {0.0, "Infinity"}}}, "zamba2"),
                 of_limited));
}

TEST_CASE("zamba2_checkpoint: a head of its own") {
  using Net = LanguageModel<Zamba2Case::vocabulary, Zamba2Case::Stack, Head::own>;
  const std::string config = own_config<Net>();
  CHECK(json::parse(config)["tie_word_embeddings"] == false);
  CHECK(message_of([&] { check_config<Net>(config); }) == "");
  CHECK(contains(zamba2_refusal<Net>(json::object(), "zamba2"),
                 "tie_word_embeddings: the type has false, the file true"));
  const CheckpointLayout layout = CheckpointFormat<Net>::layout(detail::list_parameters<Net, float>());
  CHECK(layout.parameters.front().parts.front().name == "model.embed_tokens.weight");
  CHECK(layout.parameters.front().parts.front().copies.empty());
  CHECK(layout.parameters.back().parts.front().name == "lm_head.weight");
}

TEST_CASE("zamba2_checkpoint: under a head of its own, shared weights are saved at every layer that uses them") {
  using Net = LanguageModel<96, Zamba2TwoBlocksCase::Stack, Head::own>;
  const Model<Net> model(Seed{4});
  const TemporaryFolder folder;
  save_huggingface(model, folder.path / "whole");
  save_huggingface(model, folder.path / "sharded", {.max_shard_bytes = 20'000});
  HeldTensors saved(folder.path / "whole" / "model.safetensors");
  // Layers 1, 5 and 3, 8 share a block; each holds its block's weights and the adapters of its block's uses.
  const std::string adapter = feed_forward + "gate_up_proj_adapter_list.";
  for (const auto& [first, second] :
       {std::pair("model.layers.1", "model.layers.5"), std::pair("model.layers.3", "model.layers.8")}) {
    std::size_t count = 0;
    for (const auto& tensor : std::vector(saved.tensors)) {
      if (!tensor.name.starts_with(std::string(first) + ".shared_transformer")) continue;
      CHECK(saved[second + tensor.name.substr(14)].bytes == tensor.bytes);
      ++count;
    }
    CHECK(count == 8 + 2 * 8);  // four products, two norms, gate_up and down; two factors of four adapters a use
  }
  CHECK(saved["model.layers.5" + adapter + "0.0.weight"].bytes ==
        saved["model.layers.1" + adapter + "0.0.weight"].bytes);

  const auto same = [&](const Model<Net>& loaded) {
    for (const ParameterEntry& entry : model.entries())
      if (loaded.read(entry) != model.read(entry)) return false;
    return true;
  };
  CHECK(same(load_huggingface<Net>(folder.path / "whole")));
  CHECK(same(load_huggingface<Net>(folder.path / "sharded")));
  auto& copy = saved["model.layers.8" + feed_forward + "down_proj.weight"].element<float>(3);
  const float right = std::exchange(copy, copy + 1);
  saved.write(folder.path / "whole" / "model.safetensors");
  CHECK(contains(message_of([&] { load_huggingface<Net>(folder.path / "whole"); }),
                 "model.layers.8" + feed_forward + "down_proj.weight: wanted the same values as in model.layers.3"));
  copy = right;
  std::erase_if(saved.tensors, [](const auto& tensor) {
    return tensor.name.starts_with("model.layers.5.shared") || tensor.name.starts_with("model.layers.8.shared");
  });
  saved.write(folder.path / "whole" / "model.safetensors");
  CHECK(same(load_huggingface<Net>(folder.path / "whole")));
}

TEST_CASE("zamba2_checkpoint: what was loaded is saved byte by byte") {
  const TemporaryFolder folder;
  save_huggingface(load_huggingface<Zamba2TwoBlocksCase>(case_path("zamba2-two-blocks")), folder.path);
  CHECK(HeldTensors(folder.path / "model.safetensors").tensors ==
        HeldTensors(case_path("zamba2-two-blocks") / "model.safetensors").tensors);
}

TEST_CASE("zamba2_checkpoint: shared weights and adapters may be repeated under the later layers of their block") {
  const std::string q = self_attn + "q_proj.weight", adapter = feed_forward + "gate_up_proj_adapter_list.";
  // Layers 1, 5 and 3, 8 share a block; layer 5 is use 2.
  const auto repeated = [&](HeldTensors& tensors) {
    tensors.add_copy("model.layers.1" + q, "model.layers.5" + q);
    tensors.add_copy("model.layers.3" + q, "model.layers.8" + q);
    tensors.add_copy("model.layers.1" + adapter + "2.0.weight", "model.layers.5" + adapter + "2.0.weight");
    tensors.add_copy("model.layers.1" + adapter + "0.1.weight", "model.layers.5" + adapter + "0.1.weight");
  };
  CHECK(refusal_of_two_blocks(repeated) == "");
  const std::string differing = refusal_of_two_blocks([&](HeldTensors& tensors) {
    repeated(tensors);
    tensors["model.layers.8" + q].element<float>(5) += 1;
    tensors["model.layers.5" + adapter + "2.0.weight"].element<float>(0) += 1;
  });
  CHECK(contains(differing, "model.layers.8" + q + ": wanted the same values as in model.layers.3" + q));
  CHECK(contains(differing, "model.layers.5" + adapter + "2.0.weight: wanted the same values"));

  // Layer 8 is of the other block.
  const std::string of_other = refusal_of_two_blocks(
      [&](HeldTensors& tensors) { tensors.add_copy("model.layers.1" + q, "model.layers.8" + q); });
  CHECK(contains(of_other, "model.layers.8" + q + ": wanted the same values"));

  // Under a plain layer they are surplus, and so are adapters under the other block or of a use that is not there.
  const std::string surplus = refusal_of_two_blocks([&](HeldTensors& tensors) {
    tensors.add_copy("model.layers.1" + q, "model.layers.2" + q);
    tensors.add_copy("model.layers.1" + adapter + "0.0.weight", "model.layers.3" + adapter + "0.0.weight");
    tensors.add_copy("model.layers.1" + adapter + "0.0.weight", "model.layers.1" + adapter + "4.0.weight");
  });
  CHECK(contains(surplus, "'model.layers.2" + q + "': surplus"));
  CHECK(contains(surplus, "'model.layers.3" + adapter + "0.0.weight': surplus"));
  CHECK(contains(surplus, "'model.layers.1" + adapter + "4.0.weight': surplus"));

  CHECK(
      contains(refusal_of_two_blocks([&](HeldTensors& tensors) {
                 tensors.erase("model.layers.3" + self_attn + "linear_v_adapter_list.3.1.weight");
               }),
               "model.layers.3" + self_attn + "linear_v_adapter_list.3.1.weight: missing, wanted with shape (64, 4)"));
}

TEST_CASE("zamba2_checkpoint: adapters belong to their use") {
  const auto model = load_huggingface<Zamba2TwoBlocksCase>(case_path("zamba2-two-blocks"));
  HeldTensors file(case_path("zamba2-two-blocks") / "model.safetensors");
  const auto same = [&](const char* ours, const std::string& theirs) {
    for (const ParameterEntry& entry : model.entries())
      if (entry.name == ours) {
        const auto values = model.read(entry);
        for (std::size_t i = 0; i < values.size(); ++i)
          if (values[i] != static_cast<double>(file[theirs].element<float>(i))) return false;
        return true;
      }
    return false;
  };
  CHECK(same("layers.5.q_adapter.a.weight", "model.layers.1" + self_attn + "linear_q_adapter_list.2.0.weight"));
  CHECK(same("layers.8.v_adapter.b.weight", "model.layers.3" + self_attn + "linear_v_adapter_list.3.1.weight"));
  CHECK(same("layers.3.gate_up_adapter.b.weight",
             "model.layers.3" + feed_forward + "gate_up_proj_adapter_list.1.1.weight"));
  CHECK(same("layers.3.gated_norm.weight", "model.layers.3.mamba_decoder.mamba.norm.weight"));
  CHECK(same("shared.1.gate_up.weight", "model.layers.3" + feed_forward + "gate_up_proj.weight"));
}
