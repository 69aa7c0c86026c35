// SPDX-License-Identifier: MIT
// Losses and gradients of whole networks.
#include <zamba/language_model.hpp>

#include <doctest/doctest.h>

#include <zamba/testing/finite_differences.hpp>
#include <zamba/testing/sanitized.hpp>

#include "support/documents.hpp"
#include "support/extend_properties.hpp"

namespace {

using namespace zamba_test;

/// Sums of products in another order, some hundred roundings deep, gradients through all layers.
constexpr double reordering = 1e-12;
/// Central differences with h = 1e-5: errors of h^2 and of 1e-16 / h, both about 1e-10, times the curvature.
constexpr double difference = 2e-7;

template <class G>
std::vector<double> all(const G& gradients) {
  return {gradients.values().data, gradients.values().data + gradients.values().size()};
}

template <class ModelType>
using Options = typename ModelType::GradientOptions;

template <class Net>
void check_gradients() {
  const auto model = random_model<Net, double>();
  Context<cpu> ctx(2);
  const double scale = 0.25;
  using ModelType = Model<Net, double>;
  const Options<ModelType> plain{.scale = scale};

  SUBCASE("packed documents equal separate ones, in loss and gradients") {
    const Documents packed({7, 0, 12, 1, 9});
    auto together = model.new_gradients(), apart = model.new_gradients();
    const LossSum sum = model.loss_and_gradients(ctx, packed, together, plain);
    CHECK(model.loss(ctx, packed).sum == sum.sum);
    LossSum separate;
    for (std::size_t k = 0; k + 1 < packed.offsets.size(); ++k) {
      const Index length = packed.offsets[k + 1] - packed.offsets[k];
      if (length == 0) continue;
      const LossSum one = model.loss_and_gradients(ctx, packed.part(packed.offsets[k], length), apart, plain);
      separate.sum += one.sum;
      separate.count += one.count;
    }
    CHECK(sum.count == separate.count);
    CHECK(sum.count == std::count_if(packed.targets.begin(), packed.targets.end(), [](Token t) { return t >= 0; }));
    CHECK(std::abs(sum.sum - separate.sum) <= reordering * sum.sum);
    CHECK(relative_error(all(together), all(apart)) <= reordering);
    // The default scale makes it the gradient of the mean.
    auto mean = model.new_gradients();
    model.loss_and_gradients(packed, mean);
    auto scaled = all(mean);
    for (double& value : scaled) value *= scale * static_cast<double>(sum.count);
    CHECK(relative_error(scaled, all(together)) <= reordering);
  }

  SUBCASE("recomputing layers gives the same gradients, with and without a state") {
    const Documents packed({7, 12});
    for (const bool with_state : {false, true}) {
      auto kept = model.new_gradients();
      auto first = model.new_state({.batch = 2, .max_length = 20});
      model.extend(first, {random_tokens(5), std::vector<Index>{5, 0}});
      const auto begin = first;
      model.loss_and_gradients(ctx, packed, kept, {.scale = scale, .state = with_state ? &first : nullptr});
      for (const Keep keep : {Keep::costly, Keep::layer_inputs}) {
        CAPTURE(int(keep));
        auto again = model.new_gradients();
        auto state = begin;
        Context<cpu> own;
        model.loss_and_gradients(own, packed, again,
                                 {.scale = scale, .state = with_state ? &state : nullptr, .keep = keep});
        CHECK(all(again) == all(kept));
        CHECK(first.to_bytes() == state.to_bytes());
      }
      auto again = model.new_gradients();
      model.loss_and_gradients(ctx, packed, again, {.scale = scale, .recompute = true});
      auto shorthand = model.new_gradients();
      model.loss_and_gradients(ctx, packed, shorthand, {.scale = scale, .keep = Keep::layer_inputs});
      CHECK(all(again) == all(shorthand));
    }
    auto gradients = model.new_gradients();
    CHECK_THROWS_WITH(model.loss_and_gradients(ctx, packed, gradients, {.keep = Keep::nothing}),
                      "zamba: loss_and_gradients: Keep::nothing leaves no way back; layer_inputs is the least");

    std::size_t kept_before = 0;
    for (const Keep keep : {Keep::layer_inputs, Keep::costly, Keep::everything}) {
      Context<cpu> own;
      own.arena().reserve(std::size_t{1} << 26);
      const auto tokens = random_tokens(200);
      const std::vector<Index> offsets{0, 200};
      const Sequences rows{offsets.data(), nullptr, 1, 200, 200};
      Net::template forward<double>(own, model.parameters(), tokens.data(), rows,
                                    typename Model<Net, double>::StateType::Views{}, keep);
      CHECK(own.arena().mark().used > kept_before);
      kept_before = own.arena().mark().used;
    }
  }

  SUBCASE("a rerun is bit-equal, on one thread and on two") {
    const Documents packed({30, 41});
    const auto run = [&](int threads) {
      Context<cpu> own(threads);
      auto gradients = model.new_gradients();
      model.loss_and_gradients(own, packed, gradients, plain);
      return all(gradients);
    };
    const auto one = run(1), two = run(2);
    CHECK(run(1) == one);
    CHECK(run(2) == two);
    CHECK(relative_error(two, one) <= reordering);
  }

  SUBCASE("two chunks with the gradient passed through the state equal the whole") {
    const Documents document({13});
    auto whole = model.new_gradients(), chunks = model.new_gradients();
    const LossSum sum = model.loss_and_gradients(ctx, document, whole, plain);
    auto begin = model.new_state({.max_length = 13});
    poison(begin);
    auto middle = begin;
    const double first_loss = model.loss(ctx, document.part(0, 5), &middle).sum;
    auto d_state = model.new_state_gradients(begin);
    auto after = middle;
    const LossSum second = model.loss_and_gradients(ctx, document.part(5, 8), chunks,
                                                    {.scale = scale, .state = &after, .d_state = &d_state});
    const LossSum first = model.loss_and_gradients(ctx, document.part(0, 5), chunks,
                                                   {.scale = scale, .state = &begin, .d_state = &d_state});
    CHECK(std::abs(first.sum - first_loss) <= reordering * first.sum);
    CHECK(std::abs(first.sum + second.sum - sum.sum) <= reordering * sum.sum);
    CHECK(relative_error(all(chunks), all(whole)) <= reordering);
    CHECK(relative_error(values(begin), values(middle)) <= reordering);
    CHECK(after.length() == 13);
  }

  SUBCASE("finite differences of every parameter and of the initial state") {
    auto moved = random_model<Net, double>();
    const Documents batch({4, 6});
    auto initial = model.new_state({.batch = 2, .max_length = 9});
    model.extend(initial, {random_tokens(3, 3), std::vector<Index>{3, 0}});
    auto gradients = model.new_gradients();
    auto state = initial;
    auto d_state = model.new_state_gradients(state);
    model.loss_and_gradients(ctx, batch, gradients, {.scale = scale, .state = &state, .d_state = &d_state});
    const auto loss = [&] {
      auto copy = initial;
      return scale * moved.loss(ctx, batch, &copy).sum;
    };
    const double h = 1e-5;
    const Index of_each = testing::unless_sanitized<Index>(7, 4);
    for (const ParameterEntry& entry : model.entries()) {
      auto weights = model.read(entry);
      std::vector<double> measured, given;
      const auto loss_of_weights = [&] {
        moved.write(entry, weights);
        return loss();
      };
      for (Index i = entry.size / of_each / 2; i < entry.size; i += std::max<Index>(1, entry.size / of_each)) {
        measured.push_back(testing::finite_difference(weights[i], h, loss_of_weights));
        given.push_back(gradients.values()[entry.offset + i]);
      }
      moved.write(entry, weights);
      CAPTURE(entry.name);
      CHECK(relative_error(given, measured) <= difference);
    }
    std::vector<double> measured, given;
    std::vector<double*> gradient_at;
    auto views = initial.views();
    auto d_views = d_state.views();
    visit_state<Net>(d_views, [&](const Name&, auto& tensor, Index, Index) { gradient_at.push_back(tensor.data); });
    std::size_t k = 0;
    visit_state<Net>(views, [&](const Name&, auto& tensor, Index rows, Index width) {
      const Index used = (rows == per_position ? initial.length(0) : rows) * width;  // of row 0, which has a past
      for (Index i = 0; i < used; i += std::max<Index>(1, used / of_each)) {
        measured.push_back(testing::finite_difference(tensor.data[i], h, loss));
        given.push_back(gradient_at[k][i]);
      }
      ++k;
    });
    CHECK(relative_error(given, measured) <= difference);
  }
}

/// What a fresh network's parameter begins with.
template <class Net>
std::vector<double> fresh(const std::string& name) {
  const auto entries = zamba::detail::list_parameters<Net, float>();
  for (std::size_t i = 0; i < entries.size(); ++i)
    if (entries[i].name == name) return zamba::detail::initial_values(entries[i], i, Seed{9});
  FAIL("there is no parameter ", name);
  return {};
}

/// Uniform in +-1 / sqrt(summed): of 256 draws or more all are inside, and one is close.
template <class Net>
void check_uniform(const std::string& name, Index summed) {
  CAPTURE(name);
  double largest = 0;
  for (const double value : fresh<Net>(name)) largest = std::max(largest, std::abs(value));
  const double bound = 1 / std::sqrt(static_cast<double>(summed));
  CHECK(largest <= bound);
  CHECK(largest > 0.95 * bound);
}

/// Normal with mean 0: the deviation of 256 draws or more is within five of its own deviations.
template <class Net>
void check_normal(const std::string& name, double deviation) {
  CAPTURE(name);
  const auto values = fresh<Net>(name);
  double squares = 0;
  for (const double value : values) squares += value * value;
  const auto count = static_cast<double>(values.size());
  CHECK(std::sqrt(squares / count) == doctest::Approx(deviation).epsilon(5 / std::sqrt(2 * count)));
}

}  // namespace

TEST_SUITE("language_model") {
  TEST_CASE("a fresh network: by fan-in, and by depth what adds to the stream") {
    using Net = LanguageModel<
        vocabulary,
        HybridStack<4, 2, MambaBlock<MambaConfig{.d_model = 32, .n_heads = 2}>,
                    SharedAttention<SharedAttentionConfig{
                        .d_model = 32, .n_heads = 4, .n_kv_heads = 2, .d_ff = 40, .mlp_adapter_rank = 6}>>,
        Head::own>;
    for (const std::string layer : {"layers.0.", "layers.3."}) {
      check_uniform<Net>(layer + "in_proj.weight", 32);
      check_uniform<Net>(layer + "conv1d.weight", 4);
      check_uniform<Net>(layer + "x_proj.weight", 32);  // of one head
      check_uniform<Net>(layer + "out_proj.weight", 64 * 4);
    }
    check_uniform<Net>("layers.1.linear.weight", 32);
    check_uniform<Net>("layers.1.gate_up_adapter.a.weight", 32);
    check_uniform<Net>("layers.1.gate_up_adapter.b.weight", 6);
    for (const std::string name : {"q_proj", "k_proj", "v_proj"})
      check_uniform<Net>("shared.0." + name + ".weight", 64);
    check_uniform<Net>("shared.0.o_proj.weight", 64);
    check_uniform<Net>("shared.0.gate_up.weight", 32);
    check_uniform<Net>("shared.0.down_proj.weight", 40);
    check_uniform<Net>("head.weight", 32);
    check_normal<Net>("embedding.weight", 0.02);
    // The convolution's 512 biases, as its filter.
    const auto biases = fresh<LanguageModel<vocabulary, UniformStack<1, MambaBlock<MambaConfig{.d_model = 256}>>>>(
        "layers.0.conv1d.bias");
    CHECK(*std::max_element(biases.begin(), biases.end()) > 0.48);
    CHECK(*std::min_element(biases.begin(), biases.end()) < -0.48);

    using Net2 = LanguageModel<vocabulary, UniformStack<3, Mamba2Block<Mamba2Config{.d_model = 64, .d_state = 16}>>>;
    check_uniform<Net2>("layers.2.in_proj.weight", 64);
    check_uniform<Net2>("layers.2.conv1d.weight", 4);
    check_uniform<Net2>("layers.2.out_proj.weight", 128 * 3);

    // Two products of a transformer layer add to the stream, and every layer of a nested stack counts.
    check_uniform<Transformer>("layers.0.o_proj.weight", 16 * 4);
    check_uniform<Transformer>("layers.1.down_proj.weight", 24 * 4);
    check_uniform<Transformer>("layers.1.gate_up.weight", 16);
    check_uniform<NestedTransformer>("layers.1.layers.0.o_proj.weight", 16 * 8);
  }

  TEST_CASE("a fresh network with a deviation of its own") {
    using Mixer = Mamba2Block<Mamba2Config{.d_model = 32, .d_state = 8, .n_heads = 4, .init_std = 0.1}>;
    using Shared =
        SharedAttention<SharedAttentionConfig{.d_model = 32, .n_heads = 4, .qkv_adapter_rank = 8, .init_std = 0.1}>;
    using Net = LanguageModel<vocabulary, HybridStack<2, 2, Mixer, Shared>, Head::own>;
    for (const char* name : {"embedding.weight", "head.weight", "layers.0.in_proj.weight", "layers.0.conv1d.weight",
                             "layers.1.out_proj.weight", "layers.1.linear.weight", "layers.1.q_adapter.b.weight",
                             "shared.0.q_proj.weight", "shared.0.down_proj.weight"})
      check_normal<Net>(name, 0.1);
    CHECK(fresh<Net>("layers.0.conv1d.bias") == std::vector<double>(32 * 2 + 16));
  }

  TEST_CASE("an embedding that is the head too is no larger than a head") {
    using Wide = UniformStack<1, MambaBlock<MambaConfig{.d_model = 3000}>>;
    check_normal<LanguageModel<8, Wide>>("embedding.weight", 1 / std::sqrt(9000.0));
    check_normal<LanguageModel<8, Wide, Head::own>>("embedding.weight", 0.02);
  }

  TEST_CASE("gradients: two shared blocks, the first layer hybrid") { check_gradients<TwoCopies>(); }
  TEST_CASE("gradients: two shared blocks with rope, and adapters for each use") { check_gradients<TwoAdapted>(); }
  TEST_CASE("gradients: Mamba-2 layers with a shared block") { check_gradients<Hybrid2>(); }
  TEST_CASE("gradients: transformer layers, a head of its own") { check_gradients<Transformer>(); }

  TEST_CASE("a head of its own") {
    using Tied = LanguageModel<vocabulary, Transformer::Stack>;
    CHECK(parameter_count<Transformer> == parameter_count<Tied> + vocabulary * 16);
    CHECK(active_parameter_count<Transformer> == active_parameter_count<Tied>);
    check_own_head<double>();
  }

  TEST_CASE("wrong input to loss is refused by name and leaves the state as it was") {
    const auto model = random_model<TwoCopies, double>();
    Context<cpu> ctx(1);
    auto state = model.new_state({.batch = 2, .max_length = 6});
    model.extend(state, {random_tokens(5), std::vector<Index>{3, 2}});
    const auto before = state.to_bytes();
    auto gradients = model.new_gradients();
    using Ids = std::vector<Token>;
    using Offsets = std::vector<Index>;
    const auto refused = [&](const Ids& tokens, const Ids& targets, const Offsets& offsets, const char* message) {
      CHECK_THROWS_WITH_AS(model.loss(ctx, {tokens, targets, offsets}, &state), message, Error);
      CHECK_THROWS_WITH_AS(model.loss_and_gradients(ctx, {tokens, targets, offsets}, gradients, {.state = &state}),
                           message, Error);
      CHECK(state.to_bytes() == before);
    };
    refused({}, {}, {0, 0, 0}, "zamba: loss: the batch is empty");
    refused({1, 2}, {1}, {0, 1, 2}, "zamba: loss: 2 tokens but 1 targets");
    for (const Offsets& offsets : {Offsets{}, Offsets{0}, Offsets{0, 1}, Offsets{1, 2}, Offsets{0, 3}})
      refused({1, 2}, {1, 2}, offsets,
              "zamba: loss: the offsets of documents must run from 0 to the number of tokens, 2");
    refused({1, 2}, {1, 2}, {0, 3, 2}, "zamba: loss: offset 2 is 2, before the previous one, 3");
    refused({1, 2}, {1, 2}, {0, -1, 2}, "zamba: loss: offset 1 is -1, before the previous one, 0");
    refused({1, 2}, {1, 2}, {0, 2}, "zamba: loss: the batch holds 1 documents, the state 2 rows");
    refused({1, 2, 3, 4}, {1, 2, 3, 4}, {0, 4, 4},
            "zamba: loss: row 0 holds 3 positions and would get 4 more, over max_length 6");
    refused({1, 29}, {1, 2}, {0, 1, 2}, "zamba: loss: token 29 at position 1 is outside the vocabulary of 29");
    refused({-1, 2}, {1, 2}, {0, 1, 2}, "zamba: loss: token -1 at position 0 is outside the vocabulary of 29");
    refused({1, 2}, {1, 29}, {0, 1, 2}, "zamba: loss: targets: token 29 at position 1 is outside the vocabulary of 29");
    CHECK(relative_error(all(gradients), std::vector<double>(all(gradients).size())) == 0);

    auto d_state = model.new_state_gradients(state);
    const Ids ids{1, 2};
    const Offsets offsets{0, 1, 2};
    CHECK_THROWS_WITH_AS(model.loss_and_gradients(ctx, {ids, ids, offsets}, gradients, {.d_state = &d_state}),
                         "zamba: loss: gradients of a state need that state, of the same batch and max_length", Error);
    // No target at all is no error: a loss of nothing.
    const Ids none{-1, -1};
    CHECK(model.loss_and_gradients(ctx, {ids, none, offsets}, gradients, {}).count == 0);
    CHECK(relative_error(all(gradients), std::vector<double>(all(gradients).size())) == 0);
  }

  TEST_CASE("weights stored as bf16 get the gradients of the same weights in double") {
    const auto stored = random_model<TwoCopies, bf16>();
    const auto wide = stored.to<double>();
    const Documents packed({17, 9});
    auto narrow_gradients = stored.new_gradients();
    auto gradients = wide.new_gradients();
    const LossSum narrow = stored.loss_and_gradients(packed, narrow_gradients);
    const LossSum sum = wide.loss_and_gradients(packed, gradients);
    // All arithmetic is float: an eps of 6e-8, carried on about a hundredfold.
    CHECK(std::abs(narrow.sum - sum.sum) <= 1e-5 * sum.sum);
    CHECK(relative_error(all(narrow_gradients), all(gradients)) <= 2e-5);
  }
}
