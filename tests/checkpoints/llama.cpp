// SPDX-License-Identifier: MIT
// config.json of model_type llama against the type, and the names of its tensors.
#include <zamba/checkpoints/llama.hpp>

#include <set>

#include <doctest/doctest.h>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/models/llama.hpp>

#include <tests/support/config_of_case.hpp>

using namespace zamba_test;
using nlohmann::json;

namespace {

using Llama = ConfigOfCase<LlamaCase>;

/// What is said of the case as a mistral file in which a key is there, and null.
std::string refusal_with_null(const Llama& llama, const std::string& key) {
  json config = llama.config();
  config.update({{"model_type", "mistral"}, {key, nullptr}});
  return llama.refusal_of_text(config.dump());
}

}  // namespace

TEST_CASE("llama_checkpoint: every key that matters is compared") {
  Llama("llama").compares({{"model_type", "mamba"},
                           {"vocab_size", 97},
                           {"hidden_size", 33},
                           {"num_hidden_layers", 5},
                           {"intermediate_size", 65},
                           {"num_attention_heads", 8},
                           {"num_key_value_heads", 4},
                           {"head_dim", 16},
                           {"rope_parameters", {{"rope_type", "llama3"}, {"rope_theta", 10000.0}}},
                           {"attention_bias", true},
                           {"mlp_bias", true},
                           {"hidden_act", "gelu"},
                           {"rms_norm_eps", 1e-5},
                           {"tie_word_embeddings", false}});
}

TEST_CASE("llama_checkpoint: absent keys mean what they mean to transformers") {
  const Llama llama("llama");
  for (const char* key : {"head_dim", "rope_parameters", "attention_bias", "mlp_bias", "hidden_act", "rms_norm_eps"})
    CHECK(llama.refusal({{key, nullptr}}) == "");
  CHECK(contains(llama.refusal({{"num_key_value_heads", nullptr}}), "the type has 2, the file none, which means 4"));
  CHECK(contains(llama.refusal({{"tie_word_embeddings", nullptr}}),
                 "the type has true, the file none, which means false"));
  CHECK(contains(llama.refusal({{"hidden_size", nullptr}}), "the type has 32, the file none, which means 4096"));
}

TEST_CASE("llama_checkpoint: both spellings of how positions are turned") {
  const Llama llama("llama");
  const auto refusal = [&](json keys) {
    if (!keys.contains("rope_parameters")) keys["rope_parameters"] = nullptr;
    return llama.refusal(keys);
  };
  CHECK(refusal({{"rope_theta", 10000.0}}) == "");
  CHECK(refusal({{"rope_theta", 10000}}) == "");
  CHECK(refusal({{"rope_parameters", {{"rope_type", "default"}}}, {"rope_theta", 10000.0}}) == "");
  CHECK(refusal({{"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 1.0}}}}) == "");
  CHECK(refusal({{"rope_theta", 10000.0}, {"rope_scaling", nullptr}}) == "");
  for (const json& theta : {json(500000.0), json("10000")}) {
    const std::string differs = "rope_theta: the type has 10000.0, the file " + theta.dump();
    CHECK(contains(refusal({{"rope_theta", theta}}), differs));
    CHECK(contains(refusal({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", theta}}}}), differs));
    CHECK(contains(refusal({{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 10000.0}}},
                            {"rope_scaling", {{"rope_type", "default"}, {"rope_theta", theta}}}}),
                   differs));
  }
  for (const json& rope : {json(10000.0), json::array({10000.0}), json{{"rope_type", "default"}, {"factor", 2.0}},
                           json{{"rope_type", "default"}, {"partial_rotary_factor", 0.5}},
                           json{{"rope_type", "default"}, {"type", "linear"}}})
    for (const char* key : {"rope_parameters", "rope_scaling"})
      CHECK(contains(refusal({{key, rope}}), key + (": the type has \"default\", the file " + rope.dump())));
  CHECK(contains(refusal({{"partial_rotary_factor", 0.5}}), "partial_rotary_factor: the type has none, the file 0.5"));
}

TEST_CASE("llama_checkpoint: a rope of another type is refused by name, also beside one that fits") {
  const Llama llama("llama");
  const json fits{{"rope_type", "default"}, {"rope_theta", 10000.0}};
  for (const std::string type : {"llama3", "yarn", "dynamic", "linear", "longrope"})
    for (const json& other : {json{{"rope_type", type}, {"factor", 8.0}}, json{{"type", type}, {"factor", 8.0}}}) {
      const std::string differs =
          ": the type has \"default\", the file \"" + type + "\"; of rope's types only \"default\" is computed";
      CHECK(contains(llama.refusal({{"rope_parameters", fits}, {"rope_scaling", other}}), "rope_scaling" + differs));
      CHECK(contains(llama.refusal({{"rope_parameters", nullptr}, {"rope_scaling", other}}), "rope_scaling" + differs));
      const std::string both = llama.refusal({{"rope_parameters", other}, {"rope_scaling", other}});
      CHECK(contains(both, "rope_parameters" + differs));
      CHECK(contains(both, "rope_scaling" + differs));
      CHECK(contains(llama.refusal({{"rope_parameters", other}, {"rope_scaling", fits}}), "rope_parameters" + differs));
    }
  CHECK(llama.refusal({{"rope_parameters", fits}, {"rope_scaling", fits}}) == "");
}

TEST_CASE("llama_checkpoint: mistral is llama, without a window") {
  const Llama llama("llama");
  const auto refusal = [&](json keys) {
    keys["model_type"] = "mistral";
    return llama.refusal(keys);
  };
  CHECK(refusal_with_null(llama, "sliding_window") == "");
  const std::string window = "; attention over a window is not computed";
  CHECK(contains(refusal({}), "sliding_window: the type has none, the file none, which means 4096" + window));
  CHECK(contains(refusal({{"sliding_window", 512}}), "sliding_window: the type has none, the file 512" + window));
  CHECK(contains(llama.refusal({{"sliding_window", 512}}), "sliding_window: the type has none, the file 512" + window));
  CHECK(contains(refusal({{"intermediate_size", nullptr}}), "the type has 64, the file none, which means 14336"));
  CHECK(contains(refusal({{"num_key_value_heads", nullptr}}), "the type has 2, the file none, which means 8"));
  CHECK(llama.refusal({{"layer_types", json::array({"full_attention", "full_attention"})}}) == "");
  CHECK(contains(llama.refusal({{"layer_types", json::array({"full_attention", "sliding_attention"})}}),
                 "layer_types: the type has none, the file [\"full_attention\",\"sliding_attention\"]"));
}

TEST_CASE("llama_checkpoint: loaded and saved again, files are the same") { Llama("llama").round_trip(); }

TEST_CASE("llama_checkpoint: a head of its own, and the frequencies that older files hold") {
  using Untied = LanguageModel<96, LlamaCase::Stack, Head::own>;
  const CaseCopy copy("llama");
  copy.edit("model.safetensors", [](HeldTensors& tensors) {
    tensors.add_copy("model.embed_tokens.weight", "lm_head.weight");
    tensors["lm_head.weight"].element<float>(5) += 1;
    tensors.add_copy("model.norm.weight", "model.layers.3.self_attn.rotary_emb.inv_freq");
  });
  CHECK(contains(message_of([&] { load_huggingface<LlamaCase>(copy.path()); }), "lm_head.weight: wanted the same"));
  CHECK(contains(message_of([&] { load_huggingface<Untied>(copy.path()); }), "tie_word_embeddings"));
  json config = json::parse(read_text(copy.path() / "config.json"));
  config["tie_word_embeddings"] = false;
  replace_file(copy.path() / "config.json", [&](FileWriter& out) { out.write(config.dump()); });
  const auto model = load_huggingface<Untied>(copy.path());
  CHECK(model.read(model.entries().back())[5] ==
        doctest::Approx(model.read(model.entries().front())[5] + 1).epsilon(1e-6));
  const TemporaryFolder saved;
  save_huggingface(model, saved.path);
  HeldTensors tensors(copy.path() / "model.safetensors");
  tensors.erase("model.layers.3.self_attn.rotary_emb.inv_freq");
  CHECK(HeldTensors(saved.path / "model.safetensors").tensors.size() == tensors.tensors.size());
  CHECK(HeldTensors(saved.path / "model.safetensors")["lm_head.weight"] == tensors["lm_head.weight"]);

  copy.edit("model.safetensors", [](HeldTensors& held) {
    held.add_copy("model.norm.weight", "model.layers.4.self_attn.rotary_emb.inv_freq");
  });
  const std::string refusal = message_of([&] { load_huggingface<Untied>(copy.path()); });
  CHECK(contains(refusal, "surplus"));
  CHECK(contains(refusal, "model.layers.4.self_attn.rotary_emb.inv_freq"));
  CHECK_FALSE(contains(refusal, "layers.3"));
}

TEST_CASE("llama_checkpoint: the published Llama-2-7B") {
  const std::string config = R"({
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
    "torch_dtype": "float16", "use_cache": true, "vocab_size": 32000})";
  CHECK(message_of([&] { check_config<Llama2_7B>(config); }) == "");

  const auto entries = detail::list_parameters<Llama2_7B, bf16>();
  const CheckpointLayout layout = CheckpointFormat<Llama2_7B>::layout(entries);
  std::set<std::string> names;
  Index elements = 0;
  for (const auto& part : detail::parameter_parts(entries, layout)) {
    names.insert(part.tensor->name);
    elements += part.rows * part.cols;
  }
  CHECK(names.size() == 3 + 32 * 9);
  CHECK(elements == 6'738'415'616);
  for (const char* name : {"lm_head.weight", "model.norm.weight", "model.layers.31.self_attn.o_proj.weight",
                           "model.layers.0.mlp.up_proj.weight", "model.layers.9.post_attention_layernorm.weight"})
    CHECK(names.contains(name));
}

TEST_CASE("llama_checkpoint: further published sizes") {
  const std::string llama3 = R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": null, "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "use_cache": true, "vocab_size": 128256})";
  CHECK(message_of([&] { check_config<Llama3_8B>(llama3); }) == "");
  json stretched = json::parse(llama3);
  stretched["rope_scaling"] = {{"factor", 8.0}, {"low_freq_factor", 1.0}, {"rope_type", "llama3"}};
  CHECK(contains(message_of([&] { check_config<Llama3_8B>(stretched.dump()); }),
                 "rope_scaling: the type has \"default\", the file \"llama3\""));

  const std::string tiny = R"({
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
    "torch_dtype": "float32", "use_cache": true, "vocab_size": 32000})";
  CHECK(message_of([&] { check_config<TinyLlama_1_1B>(tiny); }) == "");

  const std::string mistral = R"({
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32768})";
  CHECK(message_of([&] { check_config<Mistral_7B_v0_3>(mistral); }) == "");

  CHECK(parameter_count<Llama3_8B> == 8'030'261'248);
  CHECK(parameter_count<TinyLlama_1_1B> == 1'100'048'384);
  CHECK(parameter_count<Mistral_7B_v0_3> == 7'248'023'552);
}
