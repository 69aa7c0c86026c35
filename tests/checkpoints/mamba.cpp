// SPDX-License-Identifier: MIT
// config.json of model_type mamba and mamba2 against the type, and the names of their tensors.
#include <zamba/checkpoints/mamba.hpp>

#include <limits>

#include <doctest/doctest.h>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/models/mamba.hpp>
#include <zamba/models/mamba2.hpp>

#include <tests/support/config_of_case.hpp>

using namespace zamba_test;
using nlohmann::json;

namespace {

using Mamba = ConfigOfCase<MambaCase>;
using Mamba2 = ConfigOfCase<Mamba2Case>;

}  // namespace

TEST_CASE("mamba_checkpoint: every key that matters is compared") {
  Mamba("mamba").compares({{"model_type", "mamba2"},
                           {"vocab_size", 97},
                           {"hidden_size", 33},
                           {"num_hidden_layers", 5},
                           {"intermediate_size", 65},
                           {"state_size", 8},
                           {"conv_kernel", 3},
                           {"expand", 4},
                           {"time_step_rank", 3},
                           {"use_conv_bias", false},
                           {"use_bias", true},
                           {"hidden_act", "gelu"},
                           {"layer_norm_epsilon", 1e-6},
                           {"tie_word_embeddings", false}});
  Mamba2("mamba2").compares({{"model_type", "mamba"},
                             {"vocab_size", 97},
                             {"hidden_size", 33},
                             {"num_hidden_layers", 5},
                             {"num_heads", 4},
                             {"head_dim", 16},
                             {"n_groups", 2},
                             {"state_size", 8},
                             {"conv_kernel", 3},
                             {"expand", 4},
                             {"time_step_limit", {0.0, 0.1}},
                             {"use_conv_bias", false},
                             {"use_bias", true},
                             {"hidden_act", "gelu"},
                             {"layer_norm_epsilon", 1e-6},
                             {"tie_word_embeddings", false}});
}

TEST_CASE("mamba_checkpoint: absent keys mean what they mean to transformers") {
  const Mamba mamba("mamba");
  for (const char* key : {"intermediate_size", "state_size", "conv_kernel", "expand", "time_step_rank", "use_conv_bias",
                          "use_bias", "hidden_act", "layer_norm_epsilon", "tie_word_embeddings"})
    CHECK(mamba.refusal({{key, nullptr}}) == "");
  CHECK(contains(mamba.refusal({{"vocab_size", nullptr}}),
                 "vocab_size: the type has 96, the file none, which means 50280"));
  CHECK(mamba.refusal({{"time_step_rank", "auto"}}) == "");
  CHECK(contains(mamba.refusal({{"time_step_rank", "auto"}, {"hidden_size", 40}}),
                 "time_step_rank: the type has 2, the "
                 "file 3"));

  const Mamba2 mamba2("mamba2");
  for (const char* key :
       {"conv_kernel", "expand", "use_conv_bias", "use_bias", "hidden_act", "layer_norm_epsilon", "time_step_limit"})
    CHECK(mamba2.refusal({{key, nullptr}}) == "");
  CHECK(contains(mamba2.refusal({{"n_groups", nullptr}}), "n_groups: the type has 1, the file none, which means 8"));
  CHECK(contains(mamba2.refusal({{"tie_word_embeddings", nullptr}}),
                 "the type has true, the file none, which means false"));
}

TEST_CASE("mamba_checkpoint: the limit of dt, in every spelling of an infinite number") {
  const Mamba2 mamba2("mamba2");
  for (const json& most : {json("Infinity"), json{{"__float__", "Infinity"}}, json(3.4028234663852886e38)})
    CHECK(mamba2.refusal({{"time_step_limit", {0.0, most}}}) == "");
  CHECK(mamba2.refusal({{"time_step_limit", {0, "Infinity"}}}) == "");
  for (const json& limit : {json{0.001, "Infinity"}, json{0.0, 100.0}, json{0.0}, json(0.0), json::array(),
                            json{"0.0", "Infinity"}, json{0.0, "Infinite"}})
    CHECK(contains(mamba2.refusal({{"time_step_limit", limit}}), "time_step_limit"));

  // The bare word, as Python writes it; within a text it is a text.
  CHECK(mamba2.refusal_of_text(R"({"time_step_limit": [0.0, Infinity], "hidden_act": "Infinity \" Infinity"})") ==
        mamba2.refusal_of_text(
            R"({"time_step_limit": [0.0, {"__float__": "Infinity"}], "hidden_act": "Infinity \" Infinity"})"));
  CHECK(contains(mamba2.refusal_of_text(R"({"time_step_limit": [0.0, -Infinity]})"), "not valid JSON"));
  CHECK(contains(mamba2.refusal_of_text(R"({"hidden_act": "Infinity \)"), "not valid JSON"));

  using Limited = LanguageModel<
      96, UniformStack<4, Mamba2Block<Mamba2Config{.d_model = 32, .d_state = 16, .n_heads = 8, .dt_min = 0.001}>>>;
  CHECK(ConfigOfCase<Limited>("mamba2").refusal({{"time_step_limit", {0.001, "Infinity"}}}) == "");
}

TEST_CASE("mamba_checkpoint: loaded and saved again, files are the same") {
  Mamba("mamba").round_trip();
  Mamba2("mamba2").round_trip();
  ConfigOfCase<Mamba2GroupsCase>("mamba2-groups").round_trip();
}

TEST_CASE("mamba_checkpoint: a head of its own") {
  using Untied = LanguageModel<96, MambaCase::Stack, Head::own>;
  const auto entries = detail::list_parameters<Untied, float>();
  const auto layout = CheckpointFormat<Untied>::layout(entries);
  CHECK(layout.parameters.front().parts[0].copies.empty());
  CHECK(layout.parameters.back().parts[0].name == "lm_head.weight");
  CHECK(contains(message_of([] { load_huggingface<Untied>(case_path("mamba")); }), "tie_word_embeddings"));
}

TEST_CASE("mamba_checkpoint: the published sizes") {
  const std::string mamba = R"({"model_type": "mamba", "vocab_size": 50280, "hidden_size": 768, "expand": 2,
    "num_hidden_layers": 24, "intermediate_size": 1536, "state_size": 16, "time_step_rank": 48, "conv_kernel": 4,
    "hidden_act": "silu", "layer_norm_epsilon": 1e-05, "use_bias": false, "use_conv_bias": true})";
  CHECK(message_of([&] { check_config<Mamba_130M>(mamba); }) == "");
  CHECK(contains(message_of([&] { check_config<Mamba_370M>(mamba); }), "hidden_size: the type has 1024, the file 768"));
  const std::string mamba2 = R"({"model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2560, "expand": 2,
    "num_hidden_layers": 64, "num_heads": 80, "head_dim": 64, "state_size": 128, "n_groups": 1, "conv_kernel": 4,
    "time_step_limit": [0.0, Infinity], "tie_word_embeddings": true})";
  CHECK(message_of([&] { check_config<Mamba2_2_8B>(mamba2); }) == "");
  const std::string codestral = R"({"architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256,
    "conv_kernel": 4, "eos_token_id": 0, "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "mamba2",
    "n_groups": 8, "norm_before_gate": true, "num_heads": 128, "num_hidden_layers": 64, "pad_token_id": 0,
    "rescale_prenorm_residual": false, "residual_in_fp32": true, "rms_norm": true, "state_size": 128,
    "tie_word_embeddings": false, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
    "time_step_limit": [0.0, Infinity], "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256,
    "time_step_scale": 1.0, "torch_dtype": "bfloat16", "use_bias": false, "use_cache": true, "use_conv_bias": true,
    "vocab_size": 32768})";
  CHECK(message_of([&] { check_config<MambaCodestral_7B>(codestral); }) == "");
  CHECK(parameter_count<MambaCodestral_7B> == 7'285'403'648);
}

TEST_CASE("mamba_checkpoint: the original format of mamba_ssm is named") {
  const std::string original = R"({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {},
    "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": 8})";
  const std::string message = message_of([&] { check_config<Mamba_130M>(original); });
  CHECK(contains(message, "config.json is of the original format of mamba_ssm (d_model, n_layer, ssm_cfg)"));
  CHECK(contains(message, "-hf"));
  // The converted files keep those keys beside their own.
  json converted = Mamba("mamba").config();
  converted.update(json::parse(original));
  converted["vocab_size"] = 96;
  CHECK(Mamba("mamba").refusal_of_text(converted.dump()) == "");
  converted["rms_norm"] = false;
  CHECK(contains(Mamba("mamba").refusal_of_text(converted.dump()), "rms_norm: the type has true, the file false"));
}

TEST_CASE("mamba_checkpoint: a bare Infinity is saved as a number that every release reads") {
  const CaseCopy copy("mamba2");
  json config = json::parse(read_text(copy.path() / "config.json"));
  config["time_step_limit"] = json::array({0.0, "HERE"});
  std::string text = config.dump();
  write_text(copy.path() / "config.json", text.replace(text.find("\"HERE\""), 6, "Infinity"));
  save_huggingface(load_huggingface<Mamba2Case>(copy.path()), copy.path() / "saved");
  config["time_step_limit"] = {0.0, std::numeric_limits<float>::max()};
  CHECK(json::parse(read_text(copy.path() / "saved" / "config.json")) == config);
}
