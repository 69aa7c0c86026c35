// SPDX-License-Identifier: MIT
// Checkpoints in the Hugging Face layout: what is loaded, what is saved, and what is refused with which message.
#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/checkpoints/zamba2.hpp>

#include <iterator>
#include <limits>
#include <utility>

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <tests/support/cases.hpp>
#include <tests/support/fixture.hpp>

using namespace zamba_test;

namespace {

template <class Net, class T>
std::vector<std::byte> all_bytes(const Model<Net, T>& model) {
  std::vector<std::byte> bytes;
  for (const ParameterEntry& entry : model.entries())
    bytes.insert(bytes.end(), model.data(entry), model.data(entry) + model.bytes(entry));
  return bytes;
}

/// What loading a case as ZambaCase says after `damage`, having checked that the model stayed as it was.
std::string refusal_after(const std::function<void(const CaseCopy&)>& damage) {
  const CaseCopy copy("zamba");
  damage(copy);
  Model<ZambaCase, float> model(Seed{1});
  const auto before = all_bytes(model);
  const std::string message = message_of([&] { load_huggingface(model, copy.path()); });
  CHECK(all_bytes(model) == before);
  return message;
}

std::string refusal_of_tensors(const std::function<void(HeldTensors&)>& edit) {
  return refusal_after([&](const CaseCopy& copy) { copy.edit("model.safetensors", edit); });
}

template <class Net>
void saved_equals_loaded(const std::string& name) {
  CAPTURE(name);
  const TemporaryFolder folder;
  const auto first = folder.path / "new" / "first", second = folder.path / "second";
  save_huggingface(load_huggingface<Net>(case_path(name)), first);
  CHECK(HeldTensors(first / "model.safetensors").tensors == HeldTensors(case_path(name) / "model.safetensors").tensors);
  CHECK(Safetensors::open(first / "model.safetensors").metadata() ==
        Metadata{{"format", "pt"}, {"config.json", detail::hash_of(read_text(first / "config.json"))}});

  save_huggingface(load_huggingface<Net>(first), second);
  for (const char* file : {"config.json", "model.safetensors"})
    CHECK(read_text(first / file) == read_text(second / file));
  std::size_t files = 0;
  for ([[maybe_unused]] const auto& file : std::filesystem::directory_iterator(first)) ++files;
  CHECK(files == 2);  // nothing temporary is left
}

}  // namespace

TEST_CASE("huggingface: what was loaded from F32 is saved byte by byte") {
  saved_equals_loaded<ZambaCase>("zamba");
  saved_equals_loaded<ZambaGqaCase>("zamba-gqa");
}

TEST_CASE("huggingface: rows of in_proj alternate in the file, and are two halves in memory") {
  const auto model = load_huggingface<ZambaCase>(case_path("zamba"));
  const zamba::testing::Fixture file("zamba/model.safetensors");
  const auto ours = model.read(entry_of(model.entries(), "layers.3.in_proj.weight"));
  const auto theirs = file.values("model.layers.3.mamba.in_proj.weight");
  const Index D = 64, d = 32;
  REQUIRE(ours.size() == static_cast<std::size_t>(2 * D * d));
  for (Index c = 0; c < D; ++c)
    for (Index k = 0; k < d; ++k) {
      REQUIRE(ours[c * d + k] == theirs[2 * c * d + k]);
      REQUIRE(ours[(D + c) * d + k] == theirs[(2 * c + 1) * d + k]);
    }
}

TEST_CASE("huggingface: biases of in_proj are in the order of its rows") {
  using Biased = LanguageModel<
      11, PatternStack<"hm", MambaBlock<MambaConfig{.d_model = 16, .d_state = 3, .n_heads = 2, .proj_bias = true}>,
                       SharedAttention<SharedAttentionConfig{.d_model = 16, .n_heads = 2, .d_ff = 8}>>>;
  Model<Biased> model(Seed{3});
  const auto& entry = entry_of(model.entries(), "layers.1.in_proj.bias");
  std::vector<double> counted(64);
  for (std::size_t i = 0; i < counted.size(); ++i) counted[i] = static_cast<double>(i);
  model.write(entry, counted);
  const TemporaryFolder folder;
  save_huggingface(model, folder.path);
  HeldTensors saved(folder.path / "model.safetensors");
  auto& bias = saved["model.layers.1.mamba.in_proj.bias"];
  for (std::size_t c = 0; c < 32; ++c) {
    CHECK(bias.element<float>(2 * c) == static_cast<float>(c));
    CHECK(bias.element<float>(2 * c + 1) == static_cast<float>(32 + c));
  }
  CHECK(all_bytes(load_huggingface<Biased>(folder.path)) == all_bytes(model));
}

TEST_CASE("huggingface: each storage type loads each other's files") {
  const TemporaryFolder folder;
  const auto exact = load_huggingface<ZambaCase, double>(case_path("zamba"));
  const auto rounded = load_huggingface<ZambaCase, bf16>(case_path("zamba"));
  for (const ParameterEntry& entry : rounded.entries()) {
    const auto wanted = exact.read(entry_of(exact.entries(), entry.name)), got = rounded.read(entry);
    for (std::size_t i = 0; i < got.size(); ++i)
      REQUIRE(got[i] == (entry.precise ? wanted[i] : static_cast<double>(bf16(static_cast<float>(wanted[i])))));
  }
  save_huggingface(exact, folder.path / "double");
  save_huggingface(rounded, folder.path / "bf16");
  CHECK(contains(read_text(folder.path / "bf16" / "config.json"), "\"dtype\": \"bfloat16\""));
  CHECK(contains(read_text(folder.path / "double" / "config.json"), "\"dtype\": \"float64\""));
  HeldTensors saved(folder.path / "bf16" / "model.safetensors");
  CHECK(saved["model.embed_tokens.weight"].dtype == DType::BF16);
  CHECK(saved["model.layers.0.mamba.A_log"].dtype == DType::F32);
  CHECK(all_bytes(load_huggingface<ZambaCase, bf16>(folder.path / "bf16")) == all_bytes(rounded));
  CHECK(all_bytes(load_huggingface<ZambaCase, bf16>(folder.path / "double")) == all_bytes(rounded));
  CHECK(all_bytes(load_huggingface<ZambaCase, double>(folder.path / "double")) == all_bytes(exact));
  const auto widened = load_huggingface<ZambaCase, float>(folder.path / "bf16");
  CHECK(all_bytes(widened) == all_bytes(rounded.to<float>()));
}

TEST_CASE("huggingface: F16, and shapes that differ in extents of 1") {
  const CaseCopy copy("zamba");
  copy.edit("model.safetensors", [](HeldTensors& tensors) {
    auto& norm = tensors["model.final_layernorm.weight"];
    norm.dtype = DType::F16;
    norm.bytes.resize(norm.bytes.size() / 2);
    for (std::size_t i = 0; i < 32; ++i) norm.element<std::uint16_t>(i) = 0x3e00;  // 1.5
    tensors["model.layers.0.mamba.conv1d.weight"].shape = {64, 4};
  });
  const auto model = load_huggingface<ZambaCase>(copy.path());
  CHECK(model.read(entry_of(model.entries(), "final_norm.weight")) == std::vector<double>(32, 1.5));
  const auto original = load_huggingface<ZambaCase>(case_path("zamba"));
  const auto& convolution = entry_of(model.entries(), "layers.0.conv1d.weight");
  CHECK(model.read(convolution) == original.read(convolution));
}

TEST_CASE("huggingface: copies of shared and tied weights are taken if they are equal") {
  const std::string shared = ".shared_transf.self_attn.q_proj.weight", embedding = "model.embed_tokens.weight";
  const auto with_copies = [&](HeldTensors& tensors) {
    tensors.add_copy("model.layers.2" + shared, "model.layers.7" + shared);
    tensors.add_copy(embedding, "lm_head.weight");
  };
  const CaseCopy copy("zamba");
  copy.edit("model.safetensors", with_copies);
  CHECK(all_bytes(load_huggingface<ZambaCase>(copy.path())) ==
        all_bytes(load_huggingface<ZambaCase>(case_path("zamba"))));

  const std::string message = refusal_of_tensors([&](HeldTensors& tensors) {
    with_copies(tensors);
    tensors["model.layers.7" + shared].element<float>(5) += 1;
    tensors["lm_head.weight"].element<float>(0) += 1;
  });
  CHECK(contains(message, "model.layers.7" + shared + ": wanted the same values as in model.layers.2" + shared));
  CHECK(contains(message, "lm_head.weight: wanted the same values as in " + embedding));

  // Layer 3 is not hybrid: no copy belongs there.
  CHECK(contains(refusal_of_tensors([&](HeldTensors& tensors) {
                   tensors.add_copy("model.layers.2" + shared, "model.layers.3" + shared);
                 }),
                 "'model.layers.3" + shared + "': surplus"));
}

TEST_CASE("huggingface: all that does not fit is listed, and the model stays as it was") {
  const std::string message = refusal_of_tensors([](HeldTensors& tensors) {
    tensors.erase("model.layers.0.mamba.D");
    tensors.erase("model.layers.7.linear.weight");
    tensors.add_copy("model.final_layernorm.weight", "model.extra\n.weight");
    tensors["model.layers.1.mamba.A_log"].shape = {2, 16, 32};
    auto& bias = tensors["model.layers.1.mamba.dt_proj_bias"];
    bias.dtype = DType::I64;
    bias.shape = {32};
  });
  CAPTURE(message);
  CHECK(contains(message, "model.layers.0.mamba.D: missing, wanted with shape (2, 32)"));
  CHECK(contains(message, "model.layers.7.linear.weight: missing, wanted with shape (32, 32)"));
  CHECK(contains(message, "'model.extra?.weight': surplus"));
  CHECK(contains(message, "model.layers.1.mamba.A_log: wanted shape (2, 32, 16), came (2, 16, 32)"));
  CHECK(contains(message, "model.layers.1.mamba.dt_proj_bias: wanted F64, F32, F16 or BF16, came I64"));
  CHECK(std::count(message.begin(), message.end(), '\n') == 5);
}

TEST_CASE("huggingface: all values that are not finite are counted, and the model stays as it was") {
  const std::string message = refusal_of_tensors([](HeldTensors& tensors) {
    tensors["model.embed_tokens.weight"].element<float>(7) = std::numeric_limits<float>::quiet_NaN();
    tensors["model.embed_tokens.weight"].element<float>(9) = -std::numeric_limits<float>::infinity();
    tensors["model.layers.8.mamba.in_proj.weight"].element<float>(4095) = std::numeric_limits<float>::infinity();
  });
  CAPTURE(message);
  CHECK(contains(message, "model.embed_tokens.weight: 2 of 3072 values are NaN or infinite, wanted none"));
  CHECK(contains(message, "model.layers.8.mamba.in_proj.weight: 1 of 4096 values are NaN or infinite, wanted none"));
  CHECK(std::count(message.begin(), message.end(), '\n') == 2);
}

TEST_CASE("huggingface: NaN weights are taken where that is asked for") {
  const CaseCopy copy("zamba");
  copy.edit("model.safetensors", [](HeldTensors& tensors) {
    tensors["model.layers.0.mamba.in_proj.weight"].element<float>(0) = std::numeric_limits<float>::quiet_NaN();
  });
  const auto model = load_huggingface<ZambaCase>(copy.path(), {.allow_non_finite = true});
  CHECK(std::isnan(model.read(entry_of(model.entries(), "layers.0.in_proj.weight"))[0]));
}

TEST_CASE("huggingface: a finite double beyond float is not finite in a float model") {
  const TemporaryFolder folder;
  auto model = load_huggingface<ZambaCase, double>(case_path("zamba"));
  model.write(entry_of(model.entries(), "final_norm.weight"), std::vector<double>(32, 1e300));
  save_huggingface(model, folder.path);
  CHECK(contains(message_of([&] { load_huggingface<ZambaCase>(folder.path); }), "32 of 32 values are NaN or infinite"));
}

TEST_CASE("huggingface: missing folders, missing and damaged files") {
  const auto without = [](const char* file) {
    return refusal_after([&](const CaseCopy& copy) { std::filesystem::remove(copy.path() / file); });
  };
  CHECK(contains(without("config.json"), "config.json"));
  CHECK(contains(without("model.safetensors"), "model.safetensors"));
  CHECK(
      contains(message_of([] { load_huggingface<ZambaCase>("/no/such/folder"); }), "/no/such/folder' is not a folder"));

  CHECK(contains(refusal_after([](const CaseCopy& copy) {
                   std::filesystem::resize_file(copy.path() / "model.safetensors", 40'000);
                 }),
                 "reach beyond"));
  CHECK(contains(refusal_after([](const CaseCopy& copy) {
                   std::string text = read_text(copy.path() / "model.safetensors");
                   const std::string offsets = "\"data_offsets\":[";
                   text[text.rfind(offsets) + offsets.size()] = '-';
                   write_text(copy.path() / "model.safetensors", text);
                 }),
                 "must be an array of two integers, 0 or more"));
}

TEST_CASE("huggingface: folders of other formats are named in one sentence") {
  const auto instead = [](const char* removed, const std::vector<const char*>& files) {
    const std::string message = refusal_after([&](const CaseCopy& copy) {
      std::filesystem::remove(copy.path() / removed);
      for (const char* file : files) write_text(copy.path() / file, "{}");
    });
    CHECK(std::count(message.begin(), message.end(), '\n') == 0);
    return message;
  };
  CHECK(contains(instead("model.safetensors", {"pytorch_model.bin"}),
                 "holds its weights as 'pytorch_model.bin', a pickle of PyTorch's, and only safetensors are read"));
  CHECK(contains(instead("model.safetensors", {"pytorch_model-00002-of-00002.bin", "pytorch_model-00001-of-00002.bin"}),
                 "'pytorch_model-00001-of-00002.bin'"));
  CHECK(contains(instead("model.safetensors", {"consolidated.00.pth", "params.json"}), "'consolidated.00.pth'"));
  CHECK(contains(instead("model.safetensors", {"optimizer.pt", "training_args.bin"}),
                 "holds 'reference.safetensors', but neither"));
  CHECK(contains(instead("model.safetensors", {"consolidated.safetensors"}),
                 "holds 'consolidated.safetensors', but neither model.safetensors nor model.safetensors.index.json"));
  CHECK(contains(instead("config.json", {"params.json"}), "of the original format of Meta or Mistral (params.json)"));
  CHECK(contains(instead("config.json", {"adapter_config.json", "adapter_model.safetensors"}), "holds an adapter"));

  const auto pointer = [](const char* file) {
    return refusal_after([&](const CaseCopy& copy) {
      write_text(copy.path() / file, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n");
    });
  };
  for (const char* file : {"config.json", "model.safetensors", "model.safetensors.index.json"})
    CHECK(contains(pointer(file), std::string(file) + "' is a pointer of Git LFS"));
  CHECK(contains(refusal_after([](const CaseCopy& copy) {
                   write_text(copy.path() / "config.json", R"({"d_model": 768, "n_layer": 24, "ssm_cfg": {}})");
                   std::filesystem::remove(copy.path() / "model.safetensors");
                   write_text(copy.path() / "pytorch_model.bin", "PK");
                 }),
                 "config.json is of the original format of mamba_ssm"));
}

TEST_CASE("huggingface: quantised weights are refused, whatever the tensors") {
  const std::string message = refusal_after([](const CaseCopy& copy) {
    auto config = nlohmann::json::parse(read_text(copy.path() / "config.json"));
    config["quantization_config"] = {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}};
    write_text(copy.path() / "config.json", config.dump());
  });
  CHECK(contains(message, R"(quantization_config: the type has none, the file {"load_in_4bit":true,)"));
}

TEST_CASE("huggingface: the keys of config.json stay with the model") {
  using nlohmann::json;
  const CaseCopy copy("zamba");
  json config = json::parse(read_text(copy.path() / "config.json"));
  config.update({{"bos_token_id", 31},
                 {"eos_token_id", {32, 50}},
                 {"pad_token_id", nullptr},
                 {"max_position_embeddings", 131072},
                 {"my_own", {{"note", "kept"}}}});
  config.erase("num_logits_to_keep");
  write_text(copy.path() / "config.json", config.dump());
  const auto saved = [&](const auto& model, const SaveOptions& options = {}) {
    const TemporaryFolder folder;
    save_huggingface(model, folder.path, options);
    return json::parse(read_text(folder.path / "config.json"));
  };
  auto model = load_huggingface<ZambaCase>(copy.path());
  CHECK(saved(model) == config);
  CHECK(saved(model, {.max_shard_bytes = 40'000}) == config);
  model = load_huggingface<ZambaCase>(copy.path());  // moved
  json in_bf16 = config;
  in_bf16["dtype"] = "bfloat16";
  CHECK(saved(model.to<bf16>()) == in_bf16);
  const std::string text = config.dump(), tensors = read_text(copy.path() / "model.safetensors");
  CheckpointBytes memory{{"config", std::as_bytes(std::span(text))}, {{"tensors", std::as_bytes(std::span(tensors))}}};
  CHECK(saved(load_huggingface<ZambaCase>(memory)) == config);
  config.erase("dtype");
  write_text(copy.path() / "config.json", config.dump());
  config["dtype"] = config["torch_dtype"] = "float32";
  CHECK(saved(load_huggingface<ZambaCase>(copy.path())) == config);

  // Changed on the way, and a model that was not loaded.
  config.update({{"eos_token_id", 7}, {"another", true}});
  CHECK(saved(load_huggingface<ZambaCase>(copy.path()), {.config = R"({"eos_token_id": 7, "another": true})"}) ==
        config);
  const Model<ZambaCase> fresh(Seed{1});
  CHECK(fresh.checkpoint_config().empty());
  json of_fresh = saved(fresh);
  CHECK(of_fresh["eos_token_id"] == 2);
  of_fresh["eos_token_id"] = {5, 6};
  CHECK(saved(fresh, {.config = R"({"eos_token_id": [5, 6]})"}) == of_fresh);
}

TEST_CASE("huggingface: a config.json that does not describe the model is not written") {
  const TemporaryFolder folder;
  auto model = load_huggingface<ZambaCase>(case_path("zamba"));
  save_huggingface(model, folder.path);
  const std::string before = read_text(folder.path / "config.json");
  const auto refused = [&](const SaveOptions& options) {
    const std::string message = message_of([&] { save_huggingface(model, folder.path, options); });
    CHECK(read_text(folder.path / "config.json") == before);
    return message;
  };
  const std::string differs =
      "what config.json would say does not describe this model:\n  hidden_size: the type has 32";
  CHECK(contains(refused({.config = R"({"hidden_size": 64})"}), differs + ", the file 64"));
  CHECK(contains(refused({.config = R"({"quantization_config": {}})"}), "quantization_config"));
  CHECK(contains(refused({.config = "[]"}), "SaveOptions::config: wanted a JSON object, came array"));
  CHECK(contains(refused({.config = R"({"eos_token_id": )"}), "SaveOptions::config: not valid JSON"));
  model.set_checkpoint_config(read_text(case_path("zamba-gqa") / "config.json"));
  CHECK(contains(refused({}), "\n  hidden_size: the type has 32, the file 48"));
}

TEST_CASE("huggingface: pipes, devices and folders in place of files are refused at once, when loading and saving") {
  const auto model = load_huggingface<ZambaCase>(case_path("zamba"));
  for (const char* file : {"config.json", "model.safetensors", "model.safetensors.index.json"}) {
    CAPTURE(file);
    const auto with = [&](const std::function<void(const std::filesystem::path&)>& make) {
      return [=](const CaseCopy& copy) {
        std::filesystem::remove(copy.path() / file);
        make(copy.path() / file);
      };
    };
    const auto check = [&](const std::function<void(const std::filesystem::path&)>& make, const std::string& kind) {
      CHECK(contains(refusal_after(with(make)), std::string(file) + "': wanted a regular file, came " + kind));
      const CaseCopy copy("zamba");
      with(make)(copy);
      CHECK(contains(message_of([&] { save_huggingface(model, copy.path()); }), "wanted a regular file"));
    };
    check([](const auto& path) { REQUIRE(::mkfifo(path.c_str(), 0600) == 0); }, "a pipe");
    check([](const auto& path) { std::filesystem::create_symlink("/dev/null", path); }, "a device");
    check([](const auto& path) { std::filesystem::create_directory(path); }, "a folder");
  }
  const TemporaryFolder folder;
  REQUIRE(::mkfifo((folder.path / "pipe").c_str(), 0600) == 0);
  CHECK(contains(message_of([&] { load_huggingface<ZambaCase>(folder.path / "pipe"); }), "is not a folder"));
  CHECK(contains(message_of([&] { save_huggingface(model, folder.path / "pipe"); }), "cannot make the folder"));
}

TEST_CASE("huggingface: further texts are saved with the model") {
  const TemporaryFolder folder;
  const auto model = load_huggingface<ZambaCase>(case_path("zamba"));
  save_huggingface(model, folder.path, {.max_shard_bytes = 40'000, .texts = {{"generation_config.json", "{}"}}});
  CHECK(read_text(folder.path / "generation_config.json") == "{}");
  const auto files = ShardedSafetensors::open(folder.path, {"config.json", "generation_config.json"});
  REQUIRE(files.text("generation_config.json"));
  CHECK(*files.text("generation_config.json") == "{}");
  CHECK(*files.text("config.json") == read_text(folder.path / "config.json"));
}

TEST_CASE("huggingface: a file of other sizes is refused by both numbers") {
  const std::string message = message_of([] { load_huggingface<ZambaGqaCase>(case_path("zamba")); });
  CAPTURE(message);
  CHECK(contains(message, "hidden_size: the type has 48, the file 32"));
  CHECK(contains(message, "vocab_size: the type has 80, the file 96"));
  CHECK(contains(message, "layers_block_type: the type has \"mmhmhmm\", the file \"mmhmmmmhm\""));
  CHECK(contains(message, "num_key_value_heads: the type has 2, the file 4"));
}

TEST_CASE("huggingface: what cannot be written is an error, and the old files stay") {
  const TemporaryFolder folder;
  const auto model = load_huggingface<ZambaCase>(case_path("zamba"));
  write_text(folder.path / "file", "text");
  CHECK(contains(message_of([&] { save_huggingface(model, folder.path / "file"); }), "cannot make the folder"));
  CHECK(read_text(folder.path / "file") == "text");
  std::filesystem::create_directories(folder.path / "model" / "model.safetensors");
  CHECK(contains(message_of([&] { save_huggingface(model, folder.path / "model"); }), "cannot write"));
}

TEST_CASE("huggingface: in shards, the same weights and the same bytes") {
  const TemporaryFolder folder;
  const auto model = load_huggingface<ZambaCase, bf16>(case_path("zamba"));
  for (const char* copy : {"first", "second"}) save_huggingface(model, folder.path / copy, {.max_shard_bytes = 40'000});
  std::size_t files = 0;
  for (const auto& file : std::filesystem::directory_iterator(folder.path / "first")) {
    ++files;
    CHECK(read_text(file.path()) == read_text(folder.path / "second" / file.path().filename()));
  }
  CHECK(files > 4);  // config.json, the index, and shards
  CHECK_FALSE(std::filesystem::exists(folder.path / "first" / "model.safetensors"));
  CHECK(all_bytes(load_huggingface<ZambaCase, bf16>(folder.path / "first")) == all_bytes(model));

  save_huggingface(model, folder.path / "first");
  save_huggingface(model, folder.path / "whole");
  CHECK(read_text(folder.path / "first" / "model.safetensors") ==
        read_text(folder.path / "whole" / "model.safetensors"));
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path / "first"), {}) == 2);
}

TEST_CASE("huggingface: from memory, in one file or several") {
  const TemporaryFolder folder;
  const auto model = load_huggingface<ZambaCase>(case_path("zamba"));
  save_huggingface(model, folder.path, {.max_shard_bytes = 60'000});
  std::vector<std::string> texts;
  CheckpointBytes memory;
  for (const auto& file : std::filesystem::directory_iterator(folder.path))
    if (file.path().extension() == ".safetensors") texts.push_back(read_text(file.path()));
  REQUIRE(texts.size() > 2);
  const auto bytes_of = [](const std::string& text) { return std::as_bytes(std::span(text)); };
  for (std::size_t i = 0; i < texts.size(); ++i)
    memory.safetensors.push_back({"shard " + std::to_string(i), bytes_of(texts[i])});
  const std::string config = read_text(folder.path / "config.json");
  memory.config = {"the config", bytes_of(config)};
  CHECK(all_bytes(load_huggingface<ZambaCase>(memory)) == all_bytes(model));
  auto other = Model<ZambaCase>(Seed{1});
  load_huggingface(other, memory);
  CHECK(all_bytes(other) == all_bytes(model));

  CHECK(contains(message_of([&] { load_huggingface<ZambaGqaCase>(memory); }), "the config does not describe"));
  memory.safetensors.push_back(memory.safetensors[0]);
  CHECK(contains(message_of([&] { load_huggingface<ZambaCase>(memory); }), "is in another file of this checkpoint"));
  memory.safetensors.resize(1);
  CHECK(contains(message_of([&] { load_huggingface<ZambaCase>(memory); }), "the checkpoint in memory does not fit"));
  memory.safetensors[0].bytes = memory.safetensors[0].bytes.first(100);
  CHECK(contains(message_of([&] { load_huggingface<ZambaCase>(memory); }), "shard 0: "));
}

TEST_CASE("huggingface: progress, and a load that is cancelled") {
  using Pair = std::pair<std::uint64_t, std::uint64_t>;
  const CaseCopy copy("zamba");
  copy.edit("model.safetensors",
            [](HeldTensors& tensors) { tensors.add_copy("model.embed_tokens.weight", "lm_head.weight"); });
  std::uint64_t bytes = 0;
  for (const auto& tensor : HeldTensors(copy.path() / "model.safetensors").tensors) bytes += tensor.bytes.size();
  std::vector<Pair> calls;
  const auto load = [&](std::uint64_t until) {
    calls.clear();
    Model<ZambaCase, bf16> model(Seed{1});
    const auto before = all_bytes(model);
    const std::string message = message_of([&] {
      load_huggingface(model, copy.path(), {.progress = [&](std::uint64_t done, std::uint64_t total) {
                         calls.emplace_back(done, total);
                         return done < until;
                       }});
    });
    CHECK((all_bytes(model) == before) == !message.empty());
    return message;
  };
  CHECK(load(bytes + 1) == "");
  CHECK(calls == std::vector<Pair>{{0, bytes}, {bytes, bytes}});  // a small model is done between two calls
  CHECK(contains(load(0), "was cancelled after 0 of " + std::to_string(bytes) + " bytes"));
  CHECK(calls.size() == 1);
  CHECK(contains(load(bytes), "the checkpoint in '" + copy.path().string() + "' was cancelled after"));
}
