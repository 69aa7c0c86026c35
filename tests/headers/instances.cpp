// SPDX-License-Identifier: MIT
// What users instantiate: a model of each family in each storage type, with its training, generation, evaluation,
// files, tokenizers and checks. Compiled only, by both compilers, with the warnings that strict projects turn on.
#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/checkpoints/zamba2.hpp>
#include <zamba/eval/multiple_choice_file.hpp>
#include <zamba/testing/check_reference.hpp>
#include <zamba/testing/conformance.hpp>
#include <zamba/zamba.hpp>

namespace {

using namespace zamba;

using Mamba = MambaBlock<MambaConfig{.d_model = 16, .d_state = 4}>;
using Mamba2 = Mamba2Block<Mamba2Config{.d_model = 16, .d_state = 4, .n_heads = 4, .n_groups = 2}>;
using Plain = SharedAttention<SharedAttentionConfig{.d_model = 16, .n_heads = 2, .d_ff = 32}>;
using Adapted = SharedAttention<SharedAttentionConfig{
    .d_model = 16, .n_heads = 2, .d_ff = 32, .rope = true, .mlp_adapter_rank = 2, .qkv_adapter_rank = 2}>;
using Transformer = TransformerBlock<TransformerConfig{.d_model = 16, .n_heads = 4, .n_kv_heads = 2, .d_ff = 32}>;

using MambaNet = LanguageModel<8, UniformStack<2, Mamba>>;
using LlamaNet = LanguageModel<8, UniformStack<2, Transformer>>;
using ZambaNet = LanguageModel<8, HybridStack<4, 2, Mamba, Plain>>;
using Zamba2Net = LanguageModel<8, PatternStack<"mhmh", Mamba2, Adapted, 2>>;

template <class Net, class T>
void use_model(const std::filesystem::path& folder) {
  const auto model = load_huggingface<Net, T>(folder);
  auto state = model.new_state({.max_length = 8});
  const auto before = state.snapshot();
  const auto tokens = generate(model, state, std::vector<Token>{3}, {.max_new_tokens = 2});
  state.roll_back(before);
  state = decltype(state)::from_bytes(state.gather(std::vector<Index>{0}).to_bytes());
  generate_speculatively(model, state, model, state, tokens, {});
  perplexity(text_loss(model, tokens, {}));
  model.extend(state, tokens, Positions::all);
  model.template to<float>();
  save_huggingface(model, folder);
}

template <class Net, class T>
void train(const TokenRange& range) {
  Model<Net, T> model(Seed{1});
  Trainer trainer(
      model, {{.name = "phase", .tokens = 8, .rate = LearningRate::constant(1e-3), .mixture = {{range, 1, "text"}}}},
      {.rows = 2, .length = 4});
  trainer.run();
}

template <class Net>
void use_net(const std::filesystem::path& folder, const TokenRange& range) {
  use_model<Net, float>(folder);
  use_model<Net, double>(folder);
  use_model<Net, bf16>(folder);
  train<Net, float>(range);
  train<Net, double>(range);
  train<Net, bf16>(range);
  testing::check_reference<Net, double>(folder);
  testing::check_reference<Net, bf16>(folder);
}

}  // namespace

int main() {
  const std::filesystem::path folder = "model";
  const auto file = TokenFile::open("tokens", TokenWidth::u16);
  const auto range = TokenRange::whole(file);
  use_net<MambaNet>(folder, range);
  use_net<LlamaNet>(folder, range);
  use_net<ZambaNet>(folder, range);
  use_net<Zamba2Net>(folder, range);
  testing::conformance<Mamba>();
  testing::conformance<Mamba2>();
  testing::conformance<Transformer>();
  const auto tokenizer = Tokenizer::load(folder);
  Registry registry;
  registry.add<ZambaNet, bf16>("Zamba");
  const AnyModel model = registry.load(folder);
  const auto items = read_multiple_choice("items.jsonl");
  multiple_choice(model, [&](std::string_view text) { return tokenizer.encode(text); }, items, {}, 0, {});
}
