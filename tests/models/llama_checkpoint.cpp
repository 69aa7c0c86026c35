// SPDX-License-Identifier: MIT
// config.json of model_type llama against the type, and the names of its tensors.
#include <zamba/models/llama_checkpoint.hpp>

#include <set>

#include <doctest/doctest.h>

#include <zamba/io/huggingface.hpp>
#include <zamba/models/llama.hpp>

#include <tests/support/config_of_case.hpp>

using namespace zamba_test;
using nlohmann::json;

namespace {

using Llama = ConfigOfCase<LlamaCase>;

}  // namespace

TEST_CASE("llama_checkpoint: every key that matters is compared") {
  Llama("llama").compares({{"model_type", "mistral"},
                           {"vocab_size", 97},
                           {"hidden_size", 33},
                           {"num_hidden_layers", 5},
                           {"intermediate_size", 65},
                           {"num_attention_heads", 8},
                           {"num_key_value_heads", 4},
                           {"head_dim", 16},
                           {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 5e5}}},
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
  CHECK(contains(llama.refusal({{"num_key_value_heads", nullptr}}), "the type has 2, the file 4"));
  CHECK(contains(llama.refusal({{"tie_word_embeddings", nullptr}}), "the type has true, the file false"));
  CHECK(contains(llama.refusal({{"hidden_size", nullptr}}), "the type has 32, the file 4096"));
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
  for (const json& keys : {json{{"rope_theta", 500000.0}}, json{{"rope_theta", "10000"}},
                           json{{"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}}},
                           json{{"rope_scaling", {{"rope_type", "default"}, {"factor", 2.0}}}},
                           json{{"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}}}},
                           json{{"rope_parameters", {{"rope_type", "llama3"}, {"rope_theta", 10000.0}}}},
                           json{{"rope_parameters", 10000.0}}, json{{"rope_parameters", json::array({10000.0})}}})
    CHECK(contains(refusal(keys), "rope_parameters: the type has {\"rope_theta\":10000.0,\"rope_type\":\"default\"}"));
}

TEST_CASE("llama_checkpoint: loaded and saved again, files are the same") { Llama("llama").round_trip(); }

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
  for (const auto& part : detail::checkpoint_parts(entries, layout)) {
    names.insert(part.tensor->name);
    elements += part.rows * part.cols;
  }
  CHECK(names.size() == 3 + 32 * 9);
  CHECK(elements == 6'738'415'616);
  for (const char* name : {"lm_head.weight", "model.norm.weight", "model.layers.31.self_attn.o_proj.weight",
                           "model.layers.0.mlp.up_proj.weight", "model.layers.9.post_attention_layernorm.weight"})
    CHECK(names.contains(name));
}
