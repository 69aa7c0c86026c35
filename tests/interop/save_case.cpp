// SPDX-License-Identifier: MIT
// save_case SOURCE TARGET: saves the checkpoint in SOURCE again, in float64, as TARGET/whole and in shards as
// TARGET/sharded, and the logits of random tokens as TARGET/logits.safetensors, for transformers_logits.py; and in
// TARGET/own_head the same of that model with a head of its own. SOURCE is of one of the types in Cases.
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <span>
#include <tuple>
#include <vector>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/checkpoints/zamba2.hpp>

#include <tests/support/cases.hpp>

namespace {

using namespace zamba;
using Cases =
    std::tuple<zamba_test::ZambaCase, zamba_test::ZambaGqaCase, zamba_test::Zamba2Case, zamba_test::Zamba2TwoBlocksCase,
               zamba_test::MambaCase, zamba_test::Mamba2Case, zamba_test::Mamba2GroupsCase, zamba_test::LlamaCase>;

constexpr Index batch = 2, length = 24;

template <class Net>
void save(const Model<Net, double>& model, const std::filesystem::path& target) {
  std::uint64_t largest = 0;
  for (const ParameterEntry& entry : model.entries()) largest = std::max<std::uint64_t>(largest, model.bytes(entry));
  save_huggingface(model, target / "whole");
  save_huggingface(model, target / "sharded", {.max_shard_bytes = largest});

  Random random(Seed{1});
  std::vector<Token> tokens(static_cast<std::size_t>(batch * length));
  for (Token& token : tokens) token = static_cast<Token>(random.below(Net::vocabulary));
  auto state = model.new_state({.batch = batch, .max_length = length});
  const std::vector<Index> lengths(batch, length);
  const auto logits = model.extend(state, {tokens, lengths}, Positions::all);
  write_safetensors(target / "logits.safetensors",
                    {{"input_ids", DType::I32, {batch, length}, [&] { return std::as_bytes(std::span(tokens)); }},
                     {"logits", DType::F64, {batch, length, Net::vocabulary}, [&] {
                        return std::as_bytes(std::span(logits.data, static_cast<std::size_t>(logits.size())));
                      }}});
}

/// The model with a head of its own, of random weights.
template <class Net>
auto with_own_head(const Model<Net, double>& model) {
  Model<LanguageModel<Net::vocabulary, typename Net::Stack, Head::own>, double> other(Seed{2});
  for (std::size_t i = 0; i < model.entries().size(); ++i)
    other.write(other.entries()[i], model.read(model.entries()[i]));
  return other;
}

/// Saves the case if it is of this type.
template <class Net>
bool try_save(const std::filesystem::path& source, const std::filesystem::path& target) {
  const auto config = detail::source_of(source).config;
  const auto layout = CheckpointFormat<Net>::layout(detail::list_parameters<Net, double>());
  if (!detail::config_differences(config, layout.config).empty()) return false;
  const auto model = load_huggingface<Net, double>(source);
  save(model, target);
  save(with_own_head(model), target / "own_head");
  return true;
}

template <class... Nets>
bool save_any(std::tuple<Nets...>*, const std::filesystem::path& source, const std::filesystem::path& target) {
  return (try_save<Nets>(source, target) || ...);
}

}  // namespace

int main(int argc, char** argv) try {
  require(argc == 3, "wanted: save_case SOURCE TARGET");
  require(save_any(static_cast<Cases*>(nullptr), argv[1], argv[2]), argv[1], ": of none of the types in Cases");
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
