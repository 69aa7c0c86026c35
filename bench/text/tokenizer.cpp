// SPDX-License-Identifier: MIT
// Tokenizer on 1 MB of text: lines of many scripts, the same without spaces, and one letter over and over. One core.
#include <zamba/text/tokenizer.hpp>

#include <cstddef>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include <benchmark/benchmark.h>

#include <zamba/random.hpp>
#include <zamba/text/tokenizer/normalizer.hpp>

namespace {

using namespace zamba;

enum Text { lines, no_spaces, one_letter };

/// Short pieces of text in an order drawn from a seed, cut at 1 MB.
std::string text_of(Text kind) {
  constexpr std::size_t size = 1'000'000;
  if (kind == one_letter) return std::string(size, 'e');
  const std::string_view words[] = {
      "the river", " bends", "where old stones", " keep", "their quiet, ", "река ", "течёт",
      "θάλασσα ",  "河水",   "नदी पुराने",         "مدرسة", "x->next;",      "\n\n",  "1984"};
  Random random(Seed{1});
  std::string text;
  while (text.size() < size) {
    text += words[random.below(static_cast<Index>(std::size(words)))];
    if (kind == lines) text += random.below(8) ? ' ' : '\n';
  }
  if (kind == no_spaces) text = detail::replace_all(text, " ", "");
  return text;
}

void encode(benchmark::State& state, const char* file) {
  const Tokenizer tokenizer = Tokenizer::load(std::string(ZAMBA_TEST_DATA "/tokenizer/") + file);
  const std::string text = text_of(static_cast<Text>(state.range(0)));
  const std::vector<Token> tokens = tokenizer.encode(text);
  if (tokenizer.decode(tokens) != text) return state.SkipWithError("the text does not come back");
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.encode(text).data());
  constexpr const char* names[] = {"lines", "no spaces", "one letter"};
  state.SetLabel(names[state.range(0)]);
  state.SetBytesProcessed(state.iterations() * static_cast<Index>(text.size()));
  state.counters["bytes/token"] = static_cast<double>(text.size()) / static_cast<double>(tokens.size());
}

void decode(benchmark::State& state, const char* file) {
  const Tokenizer tokenizer = Tokenizer::load(std::string(ZAMBA_TEST_DATA "/tokenizer/") + file);
  const std::vector<Token> tokens = tokenizer.encode(text_of(lines));
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.decode(tokens).data());
  state.SetItemsProcessed(state.iterations() * static_cast<Index>(tokens.size()));
}

BENCHMARK_CAPTURE(encode, llama, "llama.json")
    ->Name("tokenizer/encode/llama")
    ->ArgName("text")
    ->DenseRange(lines, one_letter)
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(encode, byte_level, "byte_level.json")
    ->Name("tokenizer/encode/byte_level")
    ->ArgName("text")
    ->DenseRange(lines, one_letter)
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(decode, llama, "llama.json")->Name("tokenizer/decode/llama")->Unit(benchmark::kMillisecond);

}  // namespace
