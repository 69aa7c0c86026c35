// SPDX-License-Identifier: MIT
// Generation on CUDA: the promises of generator.cpp, and the same tokens and states as a loop on the host that draws
// from logits which it fetches.
#include <zamba/zamba.cuh>

#define ZAMBA_TEST_DEVICE cuda
#include "generator.cpp"

namespace {

Prompts ragged_prompts(Index rows, std::uint64_t stream) {
  Prompts prompts;
  for (Index row = 0; row < rows; ++row)
    prompts.push_back(random_tokens(1 + (row * 5 + 2) % 7, stream + static_cast<std::uint64_t>(row)));
  return prompts;
}

/// The loop of a device that does not draw.
template <class Net, class T, class Callback>
Prompts generate_by_host(Context<cuda>& ctx, const Model<Net, T, cuda>& model, State<Net, T, cuda>& state,
                         const Prompts& prompts, const GenerationOptions& options, Callback&& callback) {
  return detail::generate_rows<cuda>([&](const Tokens& tokens) { return model.extend(ctx, state, tokens); },
                                     model.vocabulary(), state, std::span(prompts), options, callback);
}

/// Ends row r after 3 + 4 r tokens, but for every third row.
struct EndsRows {
  std::vector<Index> came;
  explicit EndsRows(Index rows) : came(static_cast<std::size_t>(rows)) {}
  bool operator()(Index row, Token) { return ++came[static_cast<std::size_t>(row)] < 3 + 4 * row || row % 3 == 2; }
};

/// Some calls in turn on one state, by the device and by the host: the same tokens, the same lengths, states to
/// rounding, and the tokens that one chunk more gives.
template <class Net, class T>
void agrees_with_host(Index rows, const GenerationOptions& options, double bound) {
  const auto model = random_model<Net, T, cuda>();
  Context<cuda> ctx;
  auto here = model.new_state({.batch = rows, .max_length = 60}), there = here;
  poison(here);
  poison(there);
  for (const bool with_callback : {false, true, false}) {
    CAPTURE(with_callback);
    const Prompts prompts = ragged_prompts(rows, with_callback);
    Prompts got, wanted;
    if (with_callback) {
      got = generate(ctx, model, there, std::span(prompts), options, EndsRows(rows));
      wanted = generate_by_host(ctx, model, here, prompts, options, EndsRows(rows));
    } else {
      got = generate(ctx, model, there, std::span(prompts), options);
      wanted = generate_by_host(ctx, model, here, prompts, options, RunOn());
    }
    CHECK(got == wanted);
    CHECK(std::equal(here.lengths().begin(), here.lengths().end(), there.lengths().begin()));
    CHECK(relative_error(values(there), values(here)) < bound);
  }
}

/// A step of five rows, of which two have no token and are full: with as many places as rows, and with just enough.
template <class Net, class T>
void places_beyond() {
  using A = typename Model<Net, T, cuda>::A;
  const auto model = random_model<Net, T, cuda>();
  const std::vector<Index> offsets{0, 1, 1, 2, 3, 3}, lengths{3, 4, 3, 1, 4};
  const std::vector<Token> tokens{3, 1, 4, 0, 28};
  Context<cuda> ctx;
  auto before = model.new_state({.batch = 5, .max_length = 4});
  poison(before);
  model.extend(ctx, before, {random_tokens(15), lengths});
  auto exact = before, surplus = before;
  const auto forward = [&](auto& state, Index places) {
    poison(state);
    ArenaScope scope(ctx.arena());
    const Sequences sequences{ctx.readable(offsets.data(), 6), ctx.readable(lengths.data(), 5), 5, places, 1};
    const auto s = Net::template forward<A>(ctx, model.parameters(), ctx.readable(tokens.data(), places), sequences,
                                            state.views(), Keep::nothing);
    ctx.synchronize();
    return values<cuda>(s.x.slice(0, offsets[5]));
  };
  const std::vector<double> wanted = forward(exact, offsets[5]), got = forward(surplus, 5);
  CHECK(relative_error(got, wanted) < 1e-4);  // products of another number of tokens may take another way
  CHECK(relative_error(values(surplus), values(exact)) < 1e-4);
  for (const Index row : {1, 4})  // to the bit
    CHECK(surplus.gather(std::vector<Index>{row}).to_bytes() == before.gather(std::vector<Index>{row}).to_bytes());
}

}  // namespace

TEST_SUITE("generator on CUDA") {
  // Random weights as large as these amplify what enters a layer; tests/model.cu has the same bounds.
  TEST_CASE("tokens and states are those of a loop on the host") {
    for (const SamplerOptions& sampling :
         {SamplerOptions{.temperature = 0},
          {.temperature = 0, .repetition_penalty = 1.3},
          {},
          {.temperature = 0.8, .top_k = 12, .top_p = 0.9, .min_p = 0.02, .repetition_penalty = 1.1}})
      for (const std::vector<Token>& stops : {std::vector<Token>{}, {3, 17}})
        for (const Index rows : {1, 5}) {
          CAPTURE(rows);
          CAPTURE(stops.size());
          CAPTURE(sampling.temperature);
          const GenerationOptions options{
              .sampling = sampling, .max_new_tokens = 13, .stop_tokens = stops, .seed = {21}, .stream = 4};
          agrees_with_host<Hybrid, double>(rows, options, 1e-12);
          agrees_with_host<Hybrid, float>(rows, options, 1e-4);
          agrees_with_host<Second, float>(rows, options, 1e-4);
          agrees_with_host<Transformer, float>(rows, options, 1e-4);
          agrees_with_host<Plain, double>(rows, options, 1e-12);
        }
  }

  TEST_CASE("more rows than a block has threads") {
    agrees_with_host<Hybrid, double>(300, {.max_new_tokens = 7, .stop_tokens = {1, 2, 3, 4}, .seed = {22}}, 1e-12);
  }

  TEST_CASE("greedy tokens are those of the CPU") {
    const auto on_cpu = random_model<Hybrid, float>();
    const auto on_gpu = random_model<Hybrid, float, cuda>();
    const Prompts prompts = ragged_prompts(6, 3);
    auto here = on_cpu.new_state({.batch = 6, .max_length = 64});
    auto there = on_gpu.new_state({.batch = 6, .max_length = 64});
    GenerationOptions options = greedy;
    options.max_new_tokens = 40;
    CHECK(generate(on_gpu, there, prompts, options) == generate(on_cpu, here, prompts, options));
  }

  TEST_CASE("a step is recorded once for a state, whatever the options, and nothing is allocated after the first") {
    Context<cuda> ctx;
    auto state = model().new_state({.batch = 3, .max_length = 500});
    const Prompts prompts = ragged_prompts(3, 1);
    Index recorded = 0;
    std::size_t generation = 0;
    for (int call = 0; call < 6; ++call) {
      GenerationOptions options{.sampling = {.top_p = 0.5 + 0.05 * call, .repetition_penalty = 1 + 0.1 * call},
                                .max_new_tokens = 20 + 3 * call,
                                .seed = {static_cast<std::uint64_t>(call)}};
      options.stop_tokens.assign(static_cast<std::size_t>(call), 5);
      Index came = 0;
      generate(ctx, model(), state, std::span(prompts), options, [&](Index row, Token) {
        if (row == 0 && ++came == 3) generation = ctx.arena().generation();  // two steps have grown the arena
        if (came > 3) CHECK(ctx.arena().generation() == generation);
        return true;
      });
      // The arena becomes one block after the first call, so the second records anew.
      if (call < 2) recorded = ctx.recorded();
      CHECK(ctx.recorded() == recorded);
      CHECK(recorded <= 2);
    }
  }

  TEST_CASE("logits that are NaN are an error, and the state holds what a loop on the host leaves") {
    auto model = random_model<Plain, double, cuda>();
    // What token 7 embeds is a NaN, so its row fails in the step after it.
    const ParameterEntry& table = model.entries().front();
    std::vector<double> values_of_table = model.read(table);
    std::fill_n(values_of_table.begin() + 7 * table.shape[1], table.shape[1], NAN);
    Context<cuda> ctx;
    const GenerationOptions options{.sampling = {.temperature = 5}, .max_new_tokens = 100, .seed = {31}};
    const Prompts prompts = ragged_prompts(4, 9);
    model.write(table, values_of_table);
    auto here = model.new_state({.batch = 4, .max_length = 128}), there = here;
    const std::string by_host = [&] {
      try {
        generate_by_host(ctx, model, here, prompts, options, RunOn());
      } catch (const Error& error) {
        return std::string(error.what());
      }
      return std::string();
    }();
    CHECK(by_host.find("is NaN") != std::string::npos);
    CHECK_THROWS_WITH_AS(generate(ctx, model, there, std::span(prompts), options), by_host.c_str(), Error);
    CHECK(std::equal(here.lengths().begin(), here.lengths().end(), there.lengths().begin()));
  }

  TEST_CASE("places for tokens that no row has change nothing") {
    places_beyond<Hybrid, float>();
    places_beyond<Plain, float>();
    places_beyond<Second, float>();
    places_beyond<Transformer, float>();
    places_beyond<Hybrid, double>();
  }
}
