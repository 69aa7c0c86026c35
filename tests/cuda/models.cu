// SPDX-License-Identifier: MIT
// Whole models on CUDA agree with the CPU, and live on where memory does not suffice.
#include <zamba/zamba.cuh>

#include <doctest/doctest.h>

#include "../support/extend_properties.hpp"
#include "../support/free_memory.hpp"

namespace {

using namespace zamba_test;

/// Sizes that are multiples of nothing, a head_dim of 26, a convolution of width 3.
using Odd = LanguageModel<
    vocabulary,
    HybridStack<4, 2,
                MambaBlock<MambaConfig{.d_model = 39, .d_state = 7, .d_conv = 3, .dt_rank = 5, .proj_bias = true}>,
                SharedAttention<SharedAttentionConfig{.d_model = 39, .n_heads = 3, .d_ff = 77}>>>;
/// Rows of whole 16 bytes, a head_dim of 464, a d_state of 128.
using Wide = LanguageModel<
    vocabulary,
    HybridStack<2, 2, MambaBlock<MambaConfig{.d_model = 464, .d_state = 128, .n_heads = 2}>,
                SharedAttention<SharedAttentionConfig{.d_model = 464, .n_heads = 2, .n_kv_heads = 1, .d_ff = 1024}>>>;

/// A prompt longer than what is computed at once, single tokens, a further chunk: |CUDA - exact| / |exact| for the
/// logits and the state of each, where exact is the CPU in double with the same weights.
template <class Net, class T>
void agrees(double bound) {
  const auto on_cpu = random_model<Net, T>().template to<double>();
  const auto on_gpu = random_model<Net, T, cuda>();
  constexpr Index longer = DeviceTraits<cuda>::prefill_chunk + 188;
  auto there = on_gpu.new_state({.batch = 2, .max_length = longer + 50});
  auto here = on_cpu.new_state({.batch = 2, .max_length = longer + 50});
  for (const std::vector<Index>& lengths :
       {std::vector<Index>{longer, 3}, {1, 1}, {1, 0}, {0, 40}, {1, 1}, {1, 1}, {1, 1}}) {
    CAPTURE(lengths[0]);
    const auto tokens = random_tokens(lengths[0] + lengths[1]);
    const auto wanted = values(on_cpu.extend(here, {tokens, lengths}, Positions::all));
    const auto logits = values<cuda>(on_gpu.extend(there, {tokens, lengths}, Positions::all));
    CHECK(relative_error(logits, wanted) <= bound);
    CHECK(relative_error(values(there), values(here)) <= bound);
  }
}

/// Llama: three heads of 48 over one of keys, a head of its own.
using Llama = LanguageModel<
    vocabulary,
    UniformStack<3, TransformerBlock<TransformerConfig{.d_model = 144, .n_heads = 3, .n_kv_heads = 1, .d_ff = 200}>>,
    Head::own>;

/// Prompts of many lengths, and a token after each, by the same measure. The CPU reads the longest once: its logits are
/// those of every prompt, because none depends on a later token.
template <class Net, class T>
void agrees_at_every_length(double bound) {
  const std::vector<Index> lengths{1, 2, 63, 65, 511, 1025, 4099};
  const auto tokens = random_tokens(lengths.back() + 1);
  const auto on_cpu = random_model<Net, T>().template to<double>();
  const auto on_gpu = random_model<Net, T, cuda>();
  auto here = on_cpu.new_state({.max_length = lengths.back() + 1});
  const auto exact = values(on_cpu.extend(here, tokens, Positions::all));
  const auto rows = [&](Index first, Index count) {
    const auto at = exact.begin() + first * vocabulary;
    return std::vector<double>(at, at + count * vocabulary);
  };
  for (const Index length : lengths) {
    CAPTURE(length);
    auto there = on_gpu.new_state({.max_length = length + 1});
    const auto logits = values<cuda>(on_gpu.extend(there, part(tokens, 0, length), Positions::all));
    CHECK(relative_error(logits, rows(0, length)) <= bound);
    const auto next = values<cuda>(on_gpu.extend(there, tokens[static_cast<std::size_t>(length)]));
    CHECK(relative_error(next, rows(length, 1)) <= bound);
    if (length == lengths.back()) CHECK(relative_error(values(there), values(here)) <= bound);
  }
}

/// Whether a message says that memory does not suffice, how many bytes were wanted, and how many are free.
bool names_memory(const std::string& message) {
  const auto has = [&](const char* part) { return message.find(part) != message.npos; };
  return has("out of memory") && has(" bytes") && has(" free");
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

}  // namespace

TEST_CASE("a model on CUDA agrees with the CPU: double") {
  agrees<Hybrid, double>(1e-12);
  agrees<Odd, double>(1e-12);
  agrees<Second, double>(1e-12);
  agrees<Transformer, double>(1e-12);
  agrees_at_every_length<Odd, double>(1e-12);
  agrees_at_every_length<Second, double>(1e-12);
  agrees_at_every_length<Transformer, double>(1e-12);
}
// Products of up to 928 terms, each within 1e-6; random weights this large amplify what enters a layer.
TEST_CASE("a model on CUDA agrees with the CPU: float") {
  agrees<Hybrid, float>(1e-4);
  agrees<Odd, float>(1e-4);
  agrees<Wide, float>(1e-4);
  agrees<Second, float>(1e-4);
  agrees<Transformer, float>(1e-4);
  agrees_at_every_length<Odd, float>(1e-4);
  agrees_at_every_length<Wide, float>(1e-4);
  agrees_at_every_length<Second, float>(1e-3);  // the CPU in float is off by up to 5e-4 at single tokens
  agrees_at_every_length<Transformer, float>(1e-4);
}
// Activations are rounded to 2^-9 some forty times on the way to a logit.
TEST_CASE("a model on CUDA agrees with the CPU: bfloat16") {
  agrees<Hybrid, bf16>(40 * 0x1p-9);
  agrees<Wide, bf16>(40 * 0x1p-9);
  agrees_at_every_length<Wide, bf16>(40 * 0x1p-9);
  agrees_at_every_length<Odd, bf16>(40 * 0x1p-9);
  agrees_at_every_length<SecondWide, bf16>(40 * 0x1p-9);
  agrees_at_every_length<Llama, bf16>(40 * 0x1p-9);
}

TEST_CASE("out of memory on CUDA: a state that does not fit is refused, and the model goes on") {
  const auto model = random_model<Wide, float, cuda>();
  const auto logits = [&] {
    auto state = model.new_state({.max_length = 70});
    return values<cuda>(model.extend(state, random_tokens(70), Positions::all));
  };
  const auto before = logits();
  // 3.7 KB a position: 500 GB, which is more than any GPU has.
  const std::string message = message_of([&] { model.new_state({.batch = 4, .max_length = 1 << 25}); });
  CHECK_MESSAGE(names_memory(message), message);
  CHECK(logits() == before);
}

TEST_CASE("out of memory on CUDA: a prompt whose scratch does not fit is refused, and its state goes on") {
  const auto model = random_model<Wide, float, cuda>();
  const auto tokens = random_tokens(700);
  auto wanted_state = model.new_state({.max_length = 700});
  const auto wanted = values<cuda>(model.extend(wanted_state, tokens, Positions::all));
  Context<cuda> ctx;
  auto state = model.new_state({.max_length = 700});
  {
    const auto taken = all_free_memory<cuda>(std::size_t{1} << 20);
    const std::string message = message_of([&] { model.extend(ctx, state, tokens, Positions::all); });
    CHECK_MESSAGE(names_memory(message), message);
    CHECK(state.length() == 0);
  }
  CHECK(values<cuda>(model.extend(ctx, state, tokens, Positions::all)) == wanted);
  CHECK(values(state) == values(wanted_state));
}
