// SPDX-License-Identifier: MIT
// config.json of model_type zamba against the type, and the names of its tensors.
#include <zamba/checkpoints/zamba.hpp>

#include <algorithm>
#include <set>

#include <doctest/doctest.h>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/models/zamba_7b.hpp>

#include <tests/support/cases.hpp>

using namespace zamba_test;
using nlohmann::json;

namespace {

const std::string& config_of_case() {
  static const std::string text = read_text(case_path("zamba") / "config.json");
  return text;
}

/// What check_config says of the case's config with some keys replaced; null removes a key.
std::string refusal(const json& replaced) {
  json config = json::parse(config_of_case());
  for (const auto& [key, value] : replaced.items()) {
    if (value.is_null())
      config.erase(key);
    else
      config[key] = value;
  }
  return message_of([&] { check_config<ZambaCase>(config.dump()); });
}

std::string refusal_of_text(const std::string& text) {
  return message_of([&] { check_config<ZambaCase>(text); });
}

}  // namespace

TEST_CASE("zamba_checkpoint: every key that matters is compared") {
  CHECK(refusal(json::object()) == "");
  const json wrong = {{"model_type", "zamba2"},
                      {"vocab_size", 97},
                      {"hidden_size", 33},
                      {"num_hidden_layers", 10},
                      {"layers_block_type", {"mamba", "hybrid"}},
                      {"intermediate_size", 65},
                      {"num_attention_heads", 2},
                      {"num_key_value_heads", 2},
                      {"attention_head_dim", 8},
                      {"attention_hidden_size", 32},
                      {"n_mamba_heads", 1},
                      {"mamba_d_state", 8},
                      {"mamba_d_conv", 3},
                      {"mamba_expand", 4},
                      {"mamba_dt_rank", 3},
                      {"mamba_conv_bias", false},
                      {"mamba_proj_bias", true},
                      {"hidden_act", "relu"},
                      {"hidden_mamba_act", "gelu"},
                      {"rms_norm_eps", 1e-6},
                      {"tie_word_embeddings", false}};
  const std::string all = refusal(wrong);
  CAPTURE(all);
  for (const auto& item : wrong.items()) {
    const std::string key = item.key();
    CAPTURE(key);
    const std::string alone = refusal({{key, item.value()}});
    CHECK(contains(alone, "\n  " + key + ": the type has "));
    CHECK(std::count(alone.begin(), alone.end(), '\n') == 1);
    CHECK(contains(all, "\n  " + key + ": the type has "));
  }
  CHECK(contains(all, "vocab_size: the type has 96, the file 97"));
  CHECK(contains(all, "layers_block_type: the type has \"mmhmmmmhm\", the file \"mh\""));
}

TEST_CASE("zamba_checkpoint: one norm_eps for all norms, the final one too") {
  using Net = LanguageModel<
      11, PatternStack<"mh", MambaBlock<MambaConfig{.d_model = 16, .norm_eps = 1e-3}>,
                       SharedAttention<SharedAttentionConfig{.d_model = 16, .n_heads = 2, .norm_eps = 1e-3}>>>;
  static_assert(Net::norm_eps == 1e-3);
  const auto layout = CheckpointFormat<Net>::layout(detail::list_parameters<Net, float>());
  CHECK(json::parse(detail::config_text(layout, "float32"))["rms_norm_eps"] == 1e-3);
}

TEST_CASE("zamba_checkpoint: keys of a wrong JSON type") {
  for (const json& value : {json("32"), json(32.0), json(true), json::array({32}), json::object(), json(-32),
                            json(18446744073709551615u), json(1e300)})
    CHECK(contains(refusal({{"hidden_size", value}}), "hidden_size: the type has 32, the file " + value.dump()));
  CHECK(contains(refusal({{"tie_word_embeddings", 1}}), "tie_word_embeddings"));
  CHECK(contains(refusal({{"rms_norm_eps", "1e-5"}}), "rms_norm_eps"));
  CHECK(contains(refusal({{"layers_block_type", "mamba"}}), "layers_block_type"));
  CHECK(contains(refusal({{"layers_block_type", {1, {2}}}}), "the file \"??\""));
  CHECK(contains(refusal({{"layers_block_type", json::array()}}), "layers_block_type"));
  CHECK(contains(refusal({{"model_type", 5}}), "model_type: the type has \"zamba\", the file 5"));
  const std::string message = refusal({{"hidden_act", std::string(1 << 20, 'x')}});
  CHECK(contains(message, "hidden_act"));
  CHECK(message.size() < 1000);
}

TEST_CASE("zamba_checkpoint: absent keys, and other spellings of the same") {
  for (const char* key : {"num_key_value_heads", "attention_head_dim", "attention_hidden_size", "mamba_d_state",
                          "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_conv_bias", "mamba_proj_bias",
                          "n_mamba_heads", "hidden_act", "hidden_mamba_act", "rms_norm_eps", "tie_word_embeddings"})
    CHECK(refusal({{key, nullptr}}) == "");
  for (const char* key :
       {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"})
    CHECK(contains(refusal({{key, nullptr}}), "the file none"));
  CHECK(contains(refusal({{"num_attention_heads", nullptr}}), "the type has 4, the file none, which means 16"));
  CHECK(refusal({{"mamba_dt_rank", "auto"}}) == "");
  CHECK(refusal({{"rms_norm_eps", 9.99999974737875e-06}}) == "");  // 1e-5 through float
  CHECK(refusal({{"layers_block_type",
                  {"mamba", "linear_attention", "hybrid", "mamba", "mamba", "mamba", "mamba", "hybrid", "mamba"}}}) ==
        "");
  // A null counts as absent.
  std::string text = config_of_case();
  text.replace(text.find("\"attention_head_dim\": 16"), 24, "\"attention_head_dim\": null");
  CHECK(refusal_of_text(text) == "");
}

TEST_CASE("zamba_checkpoint: both spellings of a key, and both at once") {
  const json layers = json::parse(config_of_case())["layers_block_type"];
  json other = layers;
  other[4] = "hybrid";
  const json without = {{"layers_block_type", nullptr}, {"attention_head_dim", nullptr}};
  const auto spelled = [&](json changes, const json& further) {
    changes.update(further);
    return refusal(changes);
  };
  CHECK(spelled(without, {{"layer_types", layers}, {"head_dim", 16}}) == "");
  CHECK(contains(spelled(without, {{"layer_types", other}}),
                 "layer_types: the type has \"mmhmmmmhm\", the file \"mmhmhmmhm\""));
  CHECK(contains(spelled(without, {{"head_dim", 8}}), "head_dim: the type has 16, the file 8"));
  CHECK(refusal({{"layer_types", layers}, {"head_dim", 16}}) == "");
  CHECK(contains(refusal({{"layer_types", other}}), "\n  layer_types: "));
  CHECK(contains(refusal({{"layers_block_type", other}, {"layer_types", layers}}), "\n  layers_block_type: "));
  CHECK(contains(refusal({{"attention_head_dim", 8}, {"head_dim", 16}}), "\n  attention_head_dim: "));
  for (const char* key : {"dtype", "torch_dtype"})
    for (const char* value : {"float32", "bfloat16"}) CHECK(refusal({{"dtype", nullptr}, {key, value}}) == "");
}

TEST_CASE("zamba_checkpoint: the rule of period and offset where the list of layers is absent") {
  CHECK(refusal({{"layers_block_type", nullptr}}) == "");  // the file says period 6, offset 4
  CHECK(refusal({{"layers_block_type", nullptr}, {"attn_layer_period", nullptr}, {"attn_layer_offset", nullptr}}) ==
        "");
  CHECK(contains(refusal({{"layers_block_type", nullptr}, {"attn_layer_period", 3}}), "the file \"mmhmmmmmm\""));
  for (const json& period : {json(0), json(-6), json("6"), json(6.0), json(18446744073709551615u)})
    CHECK(contains(refusal({{"layers_block_type", nullptr}, {"attn_layer_period", period}}), "layers_block_type"));
  CHECK(contains(refusal({{"layers_block_type", nullptr}, {"num_hidden_layers", 1000000000000}}),
                 "num_hidden_layers: the type has 9, the file 1000000000000"));
}

TEST_CASE("zamba_checkpoint: broken and hostile JSON") {
  CHECK(contains(refusal_of_text(""), "not valid JSON"));
  CHECK(contains(refusal_of_text("[]"), "wanted a JSON object, came array"));
  CHECK(contains(refusal_of_text(config_of_case().substr(0, 300)), "not valid JSON"));
  CHECK(contains(refusal_of_text(config_of_case() + "x"), "not valid JSON"));
  CHECK(contains(refusal_of_text("{\"model_type\": \"\xff\"}"), "not valid JSON"));
  CHECK(contains(refusal_of_text(config_of_case() + '\0'), "zero byte"));
  CHECK(contains(refusal_of_text("{\"hidden_size\": 1e999}"), "not valid JSON"));
  const std::string deep(1'000'000, '[');
  CHECK(contains(refusal_of_text("{\"hidden_size\": " + deep), "nested deeper"));
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  CHECK(contains(refusal_of_text(objects), "nested deeper"));
  CHECK(contains(refusal_of_text(std::string(std::size_t{20} << 20, ' ')), "bytes are allowed"));
}

TEST_CASE("zamba_checkpoint: 20,000 mutated configs") {
  Random random(Seed{11});
  const std::string alphabet = "{}[]\",:0123456789.-+eEtrufalsn \\\x01\xc3";
  const auto at = [&](const std::string& text) {
    return static_cast<std::size_t>(random.below(static_cast<Index>(text.size())));
  };
  int accepted = 0, refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string text = config_of_case();
    for (Index edits = 1 + random.below(4); edits > 0 && !text.empty(); --edits) {
      switch (random.below(5)) {
        case 0:
          text[at(text)] = alphabet[at(alphabet)];
          break;
        case 1:
          text.insert(at(text), 1, alphabet[at(alphabet)]);
          break;
        case 2:
          text.erase(at(text), static_cast<std::size_t>(1 + random.below(20)));
          break;
        case 3: {
          const std::string part = text.substr(at(text), static_cast<std::size_t>(random.below(60)));
          text.insert(at(text), part);
          break;
        }
        default:
          text[at(text)] = static_cast<char>(random.below(256));
      }
    }
    if (refusal_of_text(text).empty())
      ++accepted;
    else
      ++refused;
  }
  // Many edits meet a key that is not compared; anything but Error would have ended the test.
  CHECK(accepted > 0);
  CHECK(refused > accepted);
}

TEST_CASE("zamba_checkpoint: the published Zamba-7B-v1") {
  const std::string config = R"({
    "architectures": ["ZambaForCausalLM"], "attn_layer_offset": 4, "attn_layer_period": 6, "hidden_act": "gelu",
    "hidden_mamba_act": "silu", "hidden_size": 3712, "intermediate_size": 14848, "mamba_conv_bias": true,
    "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_dt_rank": 232, "mamba_expand": 2, "mamba_proj_bias": false,
    "model_type": "zamba", "n_mamba_heads": 2, "num_attention_heads": 16, "num_hidden_layers": 76,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-05, "vocab_size": 32000})";
  CHECK(message_of([&] { check_config<Zamba7B>(config); }) == "");

  const auto entries = detail::list_parameters<Zamba7B, bf16>();
  const CheckpointLayout layout = CheckpointFormat<Zamba7B>::layout(entries);
  std::set<std::string> names;
  Index elements = 0;
  for (const CheckpointParameter& parameter : layout.parameters)
    for (const CheckpointTensor& tensor : parameter.parts) {
      CHECK(names.insert(tensor.name).second);
      Index size = 1;
      for (const Index extent : tensor.shape) size *= extent;
      elements += size;
      if (tensor.name.find("shared_transf") != tensor.name.npos) CHECK(tensor.copies.size() == 12);
    }
  CHECK(names.size() == layout.parameters.size() + 1);  // gate and up are one parameter
  CHECK(elements == 7'232'490'496);
  CHECK(names.contains("model.layers.73.mamba_decoder.mamba.x_proj_weight"));
  CHECK(names.contains("model.layers.73.linear.weight"));
  CHECK(names.contains("model.layers.75.mamba.conv1d.bias"));
  CHECK(names.contains("model.layers.2.shared_transf.feed_forward.gate_proj.weight"));
  CHECK(names.contains("model.layers.2.shared_transf.feed_forward.up_proj.weight"));
}

TEST_CASE("zamba_checkpoint: the saved config describes its own type, and no other") {
  const auto text = [](const auto& entries, auto format) {
    return detail::config_text(decltype(format)::layout(entries), "float32");
  };
  const std::string zamba = text(detail::list_parameters<ZambaCase, float>(), CheckpointFormat<ZambaCase>());
  CHECK(refusal_of_text(zamba) == "");
  CHECK(message_of([&] { check_config<ZambaGqaCase>(zamba); }) != "");
  // Every key of what transformers wrote, but for the rule that the list of layers replaces and what only it uses.
  const json ours = json::parse(zamba), theirs = json::parse(config_of_case());
  const std::set<std::string> left_out{"attn_layer_offset", "attn_layer_period", "time_step_floor",
                                       "time_step_max",     "time_step_min",     "transformers_version"};
  for (const auto& item : theirs.items()) {
    const std::string key = item.key();
    CAPTURE(key);
    if (left_out.contains(key)) continue;
    REQUIRE(ours.contains(key));
    if (key != "layers_block_type" && key != "use_mamba_kernels") CHECK(ours[key] == item.value());
  }
}

TEST_CASE("zamba_checkpoint: under a head of its own, the shared block is saved at every layer that uses it") {
  using Net = LanguageModel<96, ZambaCase::Stack, Head::own>;
  const TemporaryFolder own, tied;
  save_huggingface(Model<Net>(Seed{4}), own.path);
  save_huggingface(Model<ZambaCase>(Seed{4}), tied.path);
  const auto count = [](const TemporaryFolder& folder, const std::string& layer) {
    const HeldTensors saved(folder.path / "model.safetensors");
    return std::count_if(saved.tensors.begin(), saved.tensors.end(), [&](const auto& tensor) {
      return tensor.name.starts_with("model.layers." + layer + ".shared_transf.");
    });
  };
  CHECK(count(own, "2") == 9);  // four products, two norms, gate, up and down
  CHECK(count(own, "7") == 9);
  CHECK(count(tied, "2") == 9);
  CHECK(count(tied, "7") == 0);
  CHECK(message_of([&] { load_huggingface<Net>(own.path); }) == "");
}
