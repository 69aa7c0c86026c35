// SPDX-License-Identifier: MIT
// Registry: which type a folder is of, and what is said where none fits.
#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/registry.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/checkpoints/zamba2.hpp>

#include <csignal>
#include <set>

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <zamba/generate/generator.hpp>

#include <tests/support/cases.hpp>

using namespace zamba_test;

namespace {

Registry registry_of_cases() {
  Registry registry;
  registry.add<ZambaCase, bf16>("case").add<ZambaCase>("case").add<ZambaGqaCase, double>("gqa");
  return registry;
}

/// Sets keys of a copy's config.json; null removes one.
void edit_config(const CaseCopy& copy, const nlohmann::json& changes) {
  auto config = nlohmann::json::parse(read_text(copy.path() / "config.json"));
  for (const auto& [key, value] : changes.items())
    if (value.is_null())
      config.erase(key);
    else
      config[key] = value;
  write_text(copy.path() / "config.json", config.dump());
}

DType storage_in(const nlohmann::json& changes, std::optional<DType> wanted = {}) {
  const CaseCopy copy("zamba");
  edit_config(copy, changes);
  return registry_of_cases().match(copy.path(), wanted).storage;
}

}  // namespace

TEST_CASE("registry: while models of several types are saved into one folder, a load gives one of them") {
  const Registry registry = registry_of_cases();
  const TemporaryFolder folder;
  const auto first = load_huggingface<ZambaCase>(case_path("zamba"));
  const auto second = load_huggingface<ZambaGqaCase, double>(case_path("zamba-gqa"));
  const auto third = load_huggingface<ZambaCase, bf16>(case_path("zamba"));
  save_huggingface(first, folder.path);
  const pid_t writer = ::fork();
  REQUIRE(writer >= 0);
  while (writer == 0) {
    save_huggingface(second, folder.path, {.max_shard_bytes = 60'000});
    save_huggingface(first, folder.path);
    save_huggingface(third, folder.path, {.max_shard_bytes = 60'000});
    save_huggingface(first, folder.path, {.max_shard_bytes = 60'000});
  }
  std::set<std::string> met;
  for (int loads = 0; loads < 200 || (met.size() < 3 && loads < 5000); ++loads) {
    std::string kind;
    REQUIRE_NOTHROW(kind = detail::model_text(registry.load(folder.path).facts()));
    met.insert(kind);
  }
  ::kill(writer, SIGKILL);
  REQUIRE(::waitpid(writer, nullptr, 0) == writer);
  CHECK(met.size() == 3);
  CHECK_NOTHROW(registry.load(folder.path));
}

TEST_CASE("registry: a folder becomes a model of its type") {
  const Registry registry = registry_of_cases();
  REQUIRE(registry.models().size() == 3);
  CHECK(registry.models()[0].name == "case");
  CHECK(registry.models()[0].model_type == "zamba");
  CHECK(registry.models()[2].storage == DType::F64);

  const AnyModel any = registry.load(case_path("zamba"), {}, DType::F32);
  CHECK(any.facts().name == "case");
  CHECK(any.facts().storage == DType::F32);
  CHECK(any.vocabulary() == 96);
  const auto model = load_huggingface<ZambaCase>(case_path("zamba"));
  auto state = model.new_state({.max_length = 40});
  AnyState any_state = any.new_state({.max_length = 40});
  const std::vector<Token> prompt{5, 6, 7};
  const GenerationOptions greedy{.sampling = {.temperature = 0}, .max_new_tokens = 20};
  CHECK(generate(any, any_state, prompt, greedy) == generate(model, state, prompt, greedy));

  CHECK(registry.load(case_path("zamba-gqa")).facts().name == "gqa");
  CHECK(any.checkpoint_config() == read_text(case_path("zamba") / "config.json"));
}

TEST_CASE("registry: the storage type is the wanted one, else the config's, else that of the tensors, else the first") {
  const nlohmann::json silent{{"dtype", nullptr}, {"torch_dtype", nullptr}};
  CHECK(storage_in({{"dtype", "bfloat16"}, {"torch_dtype", nullptr}}) == DType::BF16);
  CHECK(storage_in({{"dtype", nullptr}, {"torch_dtype", "float32"}}) == DType::F32);
  CHECK(storage_in({{"dtype", nullptr}, {"torch_dtype", "torch.bfloat16"}}) == DType::BF16);
  CHECK(storage_in({{"dtype", "float32"}, {"torch_dtype", "bfloat16"}}) == DType::F32);
  // The tensors of the case are F32.
  CHECK(storage_in(silent) == DType::F32);
  for (const char* other : {"float16", "float64", "int8"})
    CHECK(storage_in({{"dtype", other}, {"torch_dtype", nullptr}}) == DType::F32);
  CHECK(storage_in({{"dtype", 7}}) == DType::F32);

  const CaseCopy copy("zamba");
  for (const std::uint64_t shard : {0, 40'000}) {
    save_huggingface(load_huggingface<ZambaCase, bf16>(copy.path()), copy.path(), {.max_shard_bytes = shard});
    edit_config(copy, silent);
    CHECK(registry_of_cases().match(copy.path()).storage == DType::BF16);
    CHECK(registry_of_cases().load(copy.path()).facts().storage == DType::BF16);
    CHECK(registry_of_cases().match(copy.path(), DType::F32).storage == DType::F32);
  }
  save_huggingface(load_huggingface<ZambaCase, double>(copy.path()), copy.path());
  edit_config(copy, silent);
  CHECK(registry_of_cases().match(copy.path()).storage == DType::BF16);  // F64 is not compiled in: the first
  for (const char* file : {"model.safetensors", "model.safetensors.index.json"})
    std::filesystem::remove(copy.path() / file);
  CHECK(registry_of_cases().match(copy.path()).storage == DType::BF16);  // config.json alone is enough to match

  CHECK(storage_in({{"dtype", "bfloat16"}}, DType::F32) == DType::F32);
  const std::string message = message_of([] { storage_in({}, DType::F64); });
  CHECK(contains(message, "is wanted in F64, but compiled in are:\n  case in BF16 (model_type zamba)\n  case in F32"));
}

TEST_CASE("registry: where none fits, what is compiled in and how the nearest differs") {
  const CaseCopy copy("zamba");
  edit_config(copy, {{"hidden_size", 64}, {"num_attention_heads", 2}});
  const auto message = [&] { return message_of([&] { registry_of_cases().load(copy.path()); }); };
  const std::string wrong_sizes = message();
  CAPTURE(wrong_sizes);
  CHECK(contains(wrong_sizes, "config.json describes none of the models that are compiled in:"));
  for (const char* model : {"\n  case in BF16 (model_type zamba)", "\n  case in F32", "\n  gqa in F64"})
    CHECK(contains(wrong_sizes, model));
  CHECK(contains(wrong_sizes, "The nearest is case in BF16 (model_type zamba), but:"));
  CHECK(contains(wrong_sizes, "hidden_size: the type has 32, the file 64"));
  CHECK(contains(wrong_sizes, "num_attention_heads: the type has 4, the file 2"));
  CHECK_FALSE(contains(wrong_sizes, "vocab_size"));

  edit_config(copy, {{"model_type", "other"}});
  CHECK(contains(message(), "model_type: the type has \"zamba\", the file \"other\""));
  edit_config(copy, {{"model_type", nullptr}});
  CHECK(contains(message(), "model_type: the type has \"zamba\", the file none"));

  CHECK(contains(message_of([] { Registry().load(case_path("zamba")); }), "no model is compiled in"));
  CHECK(contains(message_of([] { registry_of_cases().load("/no/such/folder"); }), "is not a folder"));
  CHECK(contains(message_of([] { registry_of_cases().add<ZambaCase>("case"); }), "is there already"));
}

TEST_CASE("registry: the device is the wanted one") {
  const Registry registry = registry_of_cases();
  CHECK(registry.models()[0].device == "cpu");
  CHECK(registry.load(case_path("zamba"), {}, DType::F32, "cpu").facts().device == "cpu");
  CHECK(contains(message_of([&] { registry.match(case_path("zamba"), {}, "cuda"); }),
                 "is wanted on cuda, but compiled in are:\n  case in BF16 (model_type zamba)\n  case in F32"));
}

TEST_CASE("registry: errors of loading come through") {
  const CaseCopy copy("zamba");
  copy.edit("model.safetensors", [](HeldTensors& tensors) { tensors.erase("model.layers.0.mamba.D"); });
  CHECK(contains(message_of([&] { registry_of_cases().load(copy.path()); }), "model.layers.0.mamba.D: missing"));
}
