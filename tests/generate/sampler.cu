// SPDX-License-Identifier: MIT
// sample_rows on CUDA draws the tokens that Sampler draws, whose distribution sampler.cpp checks.
//
// The device rounds weights to 2^-42 of the largest or finer, so one draw in some 10^9 may differ; the seeds are fixed.
#include <zamba/generate/sampler.cuh>

#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <doctest/doctest.h>

namespace {

using namespace zamba;

constexpr float inf = std::numeric_limits<float>::infinity();
using Tokens = std::vector<Token>;

/// An array in a device's memory, and the same on the host.
template <class T>
struct Shared {
  explicit Shared(std::vector<T> values)
      : host(std::move(values)), buffer(std::max<std::size_t>(host.size(), 1) * sizeof(T)) {
    send();
  }
  T* data() const { return reinterpret_cast<T*>(buffer.data()); }
  void send() { Memory<cuda>::copy_from_host(data(), host.data(), host.size() * sizeof(T)); }
  void fetch() { Memory<cuda>::copy_to_host(host.data(), data(), host.size() * sizeof(T)); }

  std::vector<T> host;
  Buffer<cuda> buffer;
};

/// Samplers of a batch on the device, with their histories.
template <class A>
class Batch {
 public:
  Batch(const SamplerOptions& options, Seed seed, Index vocabulary, Index rows)
      : rows_(rows),
        vocabulary_(vocabulary),
        words_(ceil_div(vocabulary, 32)),
        options_({options}),
        random_(streams(seed, rows)),
        seen_(std::vector<std::uint32_t>(static_cast<std::size_t>(rows * words_))),
        left(std::vector<Index>(static_cast<std::size_t>(rows), 1)),
        places(numbers(rows)),
        drawn(std::vector<Drawn>(static_cast<std::size_t>(rows), Drawn{-1, Drawn::drawn})) {}

  void exclude(Token token) {
    excluded.host.resize(static_cast<std::size_t>(words_));
    excluded.host[static_cast<std::size_t>(token / 32)] |= std::uint32_t{1} << token % 32;
    excluded.buffer = Buffer<cuda>(excluded.host.size() * sizeof(std::uint32_t));
    excluded.send();
  }

  void remember(Index row, Token token) {
    seen_.host[static_cast<std::size_t>(row * words_ + token / 32)] |= std::uint32_t{1} << token % 32;
    seen_.send();
  }

  /// logits (rows, V), row by row.
  const std::vector<Drawn>& sample(Context<cuda>& ctx, const std::vector<A>& logits) {
    const Shared<A> there(logits);
    const BatchSampler samplers{options_.data(), random_.data(), Matrix<std::uint32_t>(seen_.data(), rows_, words_),
                                left.data(),     places.data(),  drawn.data(),
                                nullptr,         nullptr,        excluded.host.empty() ? nullptr : excluded.data()};
    sample_rows(ctx, samplers, rows_, Matrix<const A>(there.data(), rows_, vocabulary_),
                options_.host[0].temperature == 0);
    ctx.synchronize();
    drawn.fetch();
    return drawn.host;
  }

 private:
  static std::vector<Random> streams(Seed seed, Index rows) {
    std::vector<Random> all;
    for (Index row = 0; row < rows; ++row) all.emplace_back(seed, static_cast<std::uint64_t>(row));
    return all;
  }
  static std::vector<Index> numbers(Index rows) {
    std::vector<Index> all;
    for (Index row = 0; row < rows; ++row) all.push_back(row);
    return all;
  }

  Index rows_, vocabulary_, words_;
  Shared<SamplerOptions> options_;
  Shared<Random> random_;
  Shared<std::uint32_t> seen_;

 public:
  Shared<Index> left, places;
  Shared<Drawn> drawn;
  Shared<std::uint32_t> excluded{std::vector<std::uint32_t>()};
};

enum class Kind { smooth, ties, holes };

/// Logits of a trained model's spread; many equal ones; or some of them impossible.
template <class A>
std::vector<A> random_logits(Index rows, Index vocabulary, Kind kind, std::uint64_t stream) {
  Random random(Seed{77}, stream);
  std::vector<A> logits;
  for (Index i = 0; i < rows * vocabulary; ++i) {
    double logit = 3 * random.normal();
    if (kind == Kind::ties) logit = std::floor(logit);
    if (kind == Kind::holes && random.below(3) == 0 && i % vocabulary > 0) logit = -inf;
    logits.push_back(A(static_cast<compute_t<A>>(logit)));
  }
  return logits;
}

/// Sampler's token for a row of logits.
template <class A>
Token on_host(Sampler& sampler, const A* logits, Index vocabulary, const Tokens& history) {
  if constexpr (std::is_same_v<A, bf16>)
    return sampler.sample(std::vector<float>(logits, logits + vocabulary), history);
  else
    return sampler.sample(std::span<const A>(logits, static_cast<std::size_t>(vocabulary)), history);
}

/// Some steps of a batch, each row's history growing by what was drawn: the number of tokens that differ.
template <class A>
int differences(const SamplerOptions& options, Index vocabulary, Index rows, Kind kind, int steps,
                const Tokens& excluded = {}) {
  Context<cuda> ctx;
  Batch<A> batch(options, Seed{5}, vocabulary, rows);
  std::vector<Sampler> samplers;
  std::vector<Tokens> histories(static_cast<std::size_t>(rows));
  for (Index row = 0; row < rows; ++row)
    samplers.emplace_back(options, Seed{5}, vocabulary, static_cast<std::uint64_t>(row), excluded);
  for (const Token token : excluded) batch.exclude(token);
  int different = 0;
  for (int step = 0; step < steps; ++step) {
    const auto logits = random_logits<A>(rows, vocabulary, kind, static_cast<std::uint64_t>(step));
    const std::vector<Drawn> drawn = batch.sample(ctx, logits);
    for (Index row = 0; row < rows; ++row) {
      Tokens& history = histories[static_cast<std::size_t>(row)];
      const Token wanted =
          on_host(samplers[static_cast<std::size_t>(row)], logits.data() + row * vocabulary, vocabulary, history);
      different += drawn[static_cast<std::size_t>(row)].checked() != wanted;
      history.push_back(wanted);
      batch.remember(row, wanted);
    }
  }
  return different;
}

const std::vector<SamplerOptions>& every_kind_of_options() {
  static const std::vector<SamplerOptions> all{
      {.temperature = 0},
      {.temperature = 0, .repetition_penalty = 1.5},
      {},
      {.temperature = 0.3},
      {.temperature = 40},
      {.temperature = 1e300},
      {.temperature = 1e-300},
      {.top_k = 1},
      {.top_k = 2},
      {.temperature = 2, .top_k = 50},
      {.top_k = 5000},
      {.top_k = 1000000},
      {.top_p = 1e-9},
      {.top_p = 0.5},
      {.temperature = 1.5, .top_p = 0.95},
      {.top_p = 0.999999},
      {.min_p = 0.05},
      {.temperature = 3, .min_p = 1e-4},
      {.min_p = 1},
      {.top_k = 40, .top_p = 0.9},
      {.top_k = 40, .min_p = 0.1},
      {.top_p = 0.9, .min_p = 0.02},
      {.temperature = 0.8, .top_k = 100, .top_p = 0.95, .min_p = 0.01, .repetition_penalty = 1.3},
      {.temperature = 1.2, .repetition_penalty = 0.7},
  };
  return all;
}

template <class A>
void check_all(Index vocabulary, Index rows, int steps) {
  CAPTURE(vocabulary);
  CAPTURE(rows);
  for (std::size_t i = 0; i < every_kind_of_options().size(); ++i)
    for (const Kind kind : {Kind::smooth, Kind::ties, Kind::holes}) {
      CAPTURE(i);
      CAPTURE(static_cast<int>(kind));
      CHECK(differences<A>(every_kind_of_options()[i], vocabulary, rows, kind, steps) == 0);
    }
}

template <class A>
std::string error_of(const std::vector<float>& logits, const SamplerOptions& options) {
  Context<cuda> ctx;
  Batch<A> batch(options, Seed{1}, static_cast<Index>(logits.size()), 1);
  std::vector<A> stored;
  for (const float logit : logits) stored.push_back(A(logit));
  try {
    batch.sample(ctx, stored)[0].checked();
  } catch (const Error& error) {
    return error.what();
  }
  return "none";
}

}  // namespace

TEST_CASE("sample_rows draws what Sampler draws: small vocabularies, every option, float, double and bfloat16") {
  for (const Index vocabulary : {1, 7, 33, 300}) {
    check_all<float>(vocabulary, 5, 3);
    check_all<double>(vocabulary, 5, 3);
    check_all<bf16>(vocabulary, 5, 3);
  }
}

TEST_CASE("sample_rows draws what Sampler draws: vocabularies of models") {
  check_all<float>(32000, 2, 1);
  check_all<bf16>(50280, 2, 1);
}

TEST_CASE("sample_rows draws what Sampler draws: 64 rows, with excluded tokens and without") {
  for (const SamplerOptions& options : {SamplerOptions{.temperature = 0, .repetition_penalty = 1.1},
                                        {.temperature = 0},
                                        {},
                                        {.temperature = 0.8, .top_p = 0.95},
                                        {.top_k = 50, .top_p = 0.9, .min_p = 0.01}})
    for (const auto& excluded : {std::vector<Token>{}, {1, 31, 32, 700, 2047}})
      CHECK(differences<float>(options, 2048, 64, Kind::smooth, 6, excluded) == 0);
}

TEST_CASE("sample_rows: infinities, and weights that are exact in binary") {
  Context<cuda> ctx;
  const auto agrees = [&](const std::vector<float>& logits, const SamplerOptions& options) {
    const auto V = static_cast<Index>(logits.size());
    Batch<float> batch(options, Seed{9}, V, 1);
    Sampler sampler(options, Seed{9}, V);
    for (int i = 0; i < 40; ++i) CHECK(batch.sample(ctx, logits)[0].checked() == sampler.sample(logits));
  };
  for (const SamplerOptions& options :
       {SamplerOptions{}, {.temperature = 0}, {.top_k = 2}, {.top_p = 0.99}, {.top_p = 0.5}, {.min_p = 0.5}}) {
    agrees({inf, 0, inf, 1e30f}, options);
    agrees({-inf, 1000, -inf, 1000}, options);
    agrees({-3e38f, -3e38f, 3e38f, -inf}, options);
    agrees({-inf, 3, 3, 3, 3}, options);
    agrees(std::vector<float>(5000, 2.5f), options);
  }
}

TEST_CASE("sample_rows: errors are those of Sampler, and come with the first token in question") {
  for (const SamplerOptions& options :
       {SamplerOptions{}, {.temperature = 0}, {.top_p = 0.9, .repetition_penalty = 2}}) {
    CHECK(error_of<float>({0, 1, NAN, 2, NAN}, options) == "zamba: argmax: the logit of token 2 is NaN");
    CHECK(error_of<bf16>({NAN, inf, 3, 2}, options) == "zamba: argmax: the logit of token 0 is NaN");
    CHECK(error_of<double>({-inf, -inf, -inf}, options) == "zamba: argmax: every logit is -inf");
    std::vector<float> many(40000, 1);
    many[39999] = NAN;
    CHECK(error_of<float>(many, options) == "zamba: argmax: the logit of token 39999 is NaN");
  }
}

TEST_CASE("sample_rows: rows that get no token, rows that find their logits elsewhere, copies for the host") {
  Context<cuda> ctx;
  const Index rows = 40, V = 100;
  const SamplerOptions options{.top_p = 0.9};
  Batch<float> batch(options, Seed{3}, V, rows);
  for (Index row = 0; row < rows; ++row) {
    batch.left.host[static_cast<std::size_t>(row)] = row % 3;
    batch.places.host[static_cast<std::size_t>(row)] = row % 3 == 0 ? 1000000 : rows - 1 - row;
  }
  batch.left.send();
  batch.places.send();
  const auto logits = random_logits<float>(rows, V, Kind::smooth, 4);
  const std::vector<Drawn> drawn = batch.sample(ctx, logits);
  for (Index row = 0; row < rows; ++row) {
    Sampler sampler(options, Seed{3}, V, static_cast<std::uint64_t>(row));
    const float* of_row = logits.data() + (rows - 1 - row) * V;
    CHECK(drawn[static_cast<std::size_t>(row)].token ==
          (row % 3 == 0 ? -1 : sampler.sample(std::span(of_row, static_cast<std::size_t>(V)))));
  }
}
