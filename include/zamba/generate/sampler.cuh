// SPDX-License-Identifier: MIT
// sample_rows on CUDA; the steps of drawing and their order in sampler.hpp.
//
// A block a row finds the largest score, which is all that greedy sampling needs. Otherwise the whole GPU computes the
// weights, and a block a row draws. It does not sort: what top-k, top-p and min-p leave is in each case a beginning of
// one order, by weight and then by id, so that the mass of the shortest says everything, and a draw is the token at
// which the mass of that order exceeds a number. Such a token is found by descending through the bits of the weights,
// 11 at a time, with the count and the mass of the tokens for each value of these bits; mostly two such steps leave one
// token, and all searches share the first.
//
// Numeric contract: scores and weights in double, exp within its last bit. A mass is an integer, the weight in units of
// 2^-s, where s = 62 - log2 V, rounded down (47 for 32,000 tokens), so sums are exact in every order and a rerun is
// bit-equal. Against those of Sampler the boundaries between two tokens move by at most V 2^-s-1, of a sum of 1 or
// more, and by far less where roundings cancel; only a draw that falls there, or the end of what top-p keeps, is
// another.
#pragma once

#include <bit>
#include <limits>

#include <zamba/context.cuh>
#include <zamba/generate/sampler.hpp>
#include <zamba/generate/sampler/radix_select.cuh>
#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>

namespace zamba {

namespace kernel {

/// The token of the largest score, or the first whose score is a NaN.
struct BestToken {
  double score;
  Token token;
};

/// What the kernels of one draw share. Width_: neighbouring logits that a thread loads at once.
template <class A_, int Width_>
struct DrawTraits {
  using A = A_;
  static constexpr int width = Width_;
  static constexpr int threads = 1024, weigh_threads = 256, weights_a_thread = 4;
  static constexpr Index padding = 2 * threads;  // weights of a row come in multiples of it
  static constexpr Token none = std::numeric_limits<Token>::max();
};

/// A draw's input, and what its kernels leave for each other.
template <class A>
struct Draw {
  BatchSampler samplers;
  Matrix<const A> logits;  // (places, V)
  BestToken* best;         // (rows)
  Matrix<double> weights;  // (rows, V and zeros up to a multiple of DrawTraits::padding); none: greedy
  double whole;            // the mass of weight 1

  __device__ bool wanted(Index row) const { return samplers.left[row] > 0; }

  /// A token's logit after the penalty.
  __device__ double penalised(Index row, Index token, double logit, double penalty) const {
    if (penalty == 1 || !(samplers.seen(row, token / 32) >> token % 32 & 1)) return logit;
    return logit > 0 ? logit / penalty : logit * penalty;
  }
  /// The same, and -inf where the token is excluded.
  __device__ double score(Index row, Index token, double logit, double penalty) const {
    const bool excluded = samplers.excluded && samplers.excluded[token / 32] >> token % 32 & 1;
    return excluded ? -INFINITY : penalised(row, token, logit, penalty);
  }
  __device__ Index place(Index row) const { return samplers.places ? samplers.places[row] : row; }

  __device__ void leave(Index row, Index rows, Token token, Drawn::Outcome outcome) const {
    const Drawn result{token, outcome};
    samplers.drawn[row] = result;
    if (samplers.posted) samplers.posted[*samplers.turn * rows + row] = result;
  }
  /// Leaves the error that a row's best token is; false where it is none.
  __device__ bool failed(Index row, Index rows, const BestToken& best) const {
    const bool nan = ::isnan(best.score);
    if (!nan && best.score > -INFINITY) return false;
    if (threadIdx.x == 0) leave(row, rows, best.token, nan ? Drawn::met_nan : Drawn::all_impossible);
    return true;
  }
};

/// The largest of a thread's scores with the first token that has it, and the first token whose score is a NaN.
template <class S>
struct Largest {
  S score = -INFINITY;
  Token token, nan;

  __device__ explicit Largest(Token none) : token(none), nan(none) {}
  __device__ void add(S next, Token of) {
    if (::isnan(next)) nan = ::min(nan, of);  // one instruction; no flag of nvcc takes it away
    if (next > score) {
      score = next;
      token = of;
    }
  }
};

/// Blocks: rows.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads) best_token_kernel(Draw<typename Traits::A> draw) {
  using F = compute_t<typename Traits::A>;
  constexpr int width = Traits::width;
  constexpr Token none = Traits::none;
  launch_dependents();
  grid_dependency_wait();
  const Index row = blockIdx.x;
  if (!draw.wanted(row)) return;
  const int V = static_cast<int>(draw.logits.cols());
  const auto* logits = &draw.logits(draw.place(row), 0);
  const double penalty = draw.samplers.options->repetition_penalty;
  Largest<double> mine(none);
  const auto add_scores = [&](auto score) {
#pragma unroll 2
    for (int i = threadIdx.x * width; i < V; i += Traits::threads * width) {
      F values[width];
      load_vector<width>(logits + i).unpack(values);
#pragma unroll
      for (int k = 0; k < width; ++k) mine.add(score(i + k, values[k]), i + k);
    }
  };
  if (draw.samplers.excluded) {
    add_scores([&](Index token, double logit) { return draw.score(row, token, logit, penalty); });
  } else if (penalty == 1) {  // then as they are, which is exact and takes less
    Largest<F> plain(none);
#pragma unroll 4
    for (int i = threadIdx.x * width; i < V; i += Traits::threads * width) {
      F values[width];
      load_vector<width>(logits + i).unpack(values);
#pragma unroll
      for (int k = 0; k < width; ++k) plain.add(values[k], i + k);
    }
    mine.score = plain.score;
    mine.token = plain.token;
    mine.nan = plain.nan;
  } else {
    add_scores([&](Index token, double logit) { return draw.penalised(row, token, logit, penalty); });
  }
  const Token nan = block_min<Traits::threads>(mine.nan);
  const double largest = block_max<Traits::threads>(mine.score);
  const Token token = block_min<Traits::threads>(mine.score == largest ? mine.token : none);
  if (threadIdx.x != 0) return;
  const BestToken best = nan == none ? BestToken{largest, token} : BestToken{NAN, nan};
  draw.best[row] = best;
  if (!draw.weights && !draw.failed(row, gridDim.x, best)) draw.leave(row, gridDim.x, best.token, Drawn::drawn);
}

/// weights (rows, V) = exp((score - largest) / T). Blocks across: rows; down: tokens.
template <class Traits>
__global__ void __launch_bounds__(Traits::weigh_threads) weigh_tokens_kernel(Draw<typename Traits::A> draw) {
  launch_dependents();
  grid_dependency_wait();
  const Index row = blockIdx.x, V = draw.logits.cols();
  if (!draw.wanted(row)) return;
  const double largest = draw.best[row].score;
  const Index place = draw.place(row);
  const double penalty = draw.samplers.options->repetition_penalty;
  const double temperature = draw.samplers.options->temperature;
#pragma unroll
  for (int i = 0; i < Traits::weights_a_thread; ++i) {
    const Index token = (Index{blockIdx.y} * Traits::weights_a_thread + i) * Traits::weigh_threads + threadIdx.x;
    double weight = 0;
    if (token < V) {
      const double logit = static_cast<double>(static_cast<compute_t<typename Traits::A>>(draw.logits(place, token)));
      const double score = draw.score(row, token, logit, penalty);
      // Equal scores first: the difference of two infinities is a NaN.
      weight = score == largest ? 1.0 : ::exp((score - largest) / temperature);
    }
    draw.weights(row, token) = weight;
  }
}

/// Blocks: rows.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads) draw_token_kernel(Draw<typename Traits::A> draw) {
  using Order = RadixSelect<Traits::threads>;
  __shared__ typename Order::Shared shared;
  launch_dependents();
  grid_dependency_wait();
  const Index row = blockIdx.x;
  if (!draw.wanted(row) || draw.failed(row, gridDim.x, draw.best[row])) return;
  const SamplerOptions& options = *draw.samplers.options;
  const double top_p = options.top_p, min_p = options.min_p;
  const auto top_k = static_cast<std::uint64_t>(options.top_k);
  Random random = draw.samplers.random[row];
  const double uniform = random.uniform();
  Order order(shared, &draw.weights(row, 0), static_cast<int>(draw.weights.cols()), draw.whole);

  std::uint64_t kept = ~std::uint64_t{0};  // the mass of what is left
  bool by_weight = false;
  if (top_k > 0 || top_p < 1) {
    const Amount all = order.count_all();
    kept = all.mass;
    if (top_k > 0 && top_k < all.count) {
      by_weight = true;
      const auto last = order.find(Measure::count, top_k - 1);
      kept = last.before.mass + (top_k - last.before.count) * last.mass_of_one();
    }
    if (top_p < 1) {
      by_weight = true;
      const auto wanted = static_cast<std::uint64_t>(::ceil(top_p * static_cast<double>(kept)));
      const std::uint64_t target = ::max(wanted, std::uint64_t{1}) - 1;
      const auto last = order.find(Measure::mass, target);
      const std::uint64_t of_one = last.mass_of_one();
      kept = ::min(kept, last.before.mass + ((target - last.before.mass) / of_one + 1) * of_one);
    }
  }
  const auto mass_of_kept = [&](double weight) { return weight >= min_p ? order.mass(weight) : 0; };
  if (min_p > 0 || !by_weight) kept = ::min(kept, order.sum_by_id(mass_of_kept));
  const std::uint64_t target = ::min(static_cast<std::uint64_t>(uniform * static_cast<double>(kept)), kept - 1);
  int token;
  if (by_weight) {
    const auto place = order.find(Measure::mass, target);
    const auto is_there = [&](double weight) {
      return std::uint64_t{weight > 0 && Order::key(weight) >> place.shift == place.key};
    };
    order.sum_by_id(is_there);
    token = order.find_by_id((target - place.before.mass) / place.mass_of_one(), is_there);
  } else {
    token = order.find_by_id(target, mass_of_kept);
  }
  if (token < 0) return;
  draw.samplers.random[row] = random;
  draw.leave(row, gridDim.x, token, Drawn::drawn);
}

}  // namespace kernel

template <>
struct SampleRows<cuda> {
  template <class A>
  static void sample(Context<cuda>& ctx, const BatchSampler& samplers, Index rows, Matrix<const A> logits,
                     bool greedy) {
    if (rows == 0) return;
    if (kernel::in_vectors(logits))
      launch<kernel::DrawTraits<A, kernel::vector_width<A>>>(ctx, samplers, rows, logits, greedy);
    else
      launch<kernel::DrawTraits<A, 1>>(ctx, samplers, rows, logits, greedy);
  }

 private:
  template <class Traits, class A>
  static void launch(Context<cuda>& ctx, const BatchSampler& samplers, Index rows, Matrix<const A> logits,
                     bool greedy) {
    const Index V = logits.cols(), padded = ceil_div(V, Traits::padding) * Traits::padding;
    const int bits = std::bit_width(static_cast<std::uint64_t>(V - 1));  // V <= 2^bits, so all masses are below 2^63
    require(V <= Index{1} << 25, "sample_rows: on CUDA the vocabulary is at most 2^25, got ", V);
    const dim3 across(static_cast<unsigned>(rows));
    ArenaScope scope(ctx.arena());
    kernel::Draw<A> draw{samplers,
                         logits,
                         ctx.arena().template tensor<kernel::BestToken>(rows).data,
                         {},
                         static_cast<double>(std::uint64_t{1} << (62 - bits))};
    if (!greedy) draw.weights = ctx.arena().template tensor<double>(rows, padded);
    kernel::launch(ctx, "sample_rows: best", kernel::best_token_kernel<Traits>, across, Traits::threads, 0, draw);
    if (greedy) return;
    // The weights need no wide loads, so there is one version of these.
    using Single = kernel::DrawTraits<A, 1>;
    const dim3 parts(across.x, kernel::blocks_for(padded, Traits::weigh_threads * Traits::weights_a_thread));
    kernel::launch(ctx, "sample_rows: weights", kernel::weigh_tokens_kernel<Single>, parts, Traits::weigh_threads, 0,
                   draw);
    kernel::launch(ctx, "sample_rows: draw", kernel::draw_token_kernel<Single>, across, Traits::threads, 0, draw);
  }
};

}  // namespace zamba
