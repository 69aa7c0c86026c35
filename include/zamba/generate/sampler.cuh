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
// bit-equal. A token differs from that of Sampler only where a draw, or the mass that top-p asks for, is within V 2^-s
// of the boundary between two tokens: for 32,000 tokens about once in 10^10 draws.
#pragma once

#include <bit>
#include <limits>

#include <zamba/context.cuh>
#include <zamba/detail/block_scan.cuh>
#include <zamba/detail/block_sum.cuh>
#include <zamba/detail/launch.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/generate/sampler.hpp>
#include <zamba/number.hpp>

namespace zamba {

namespace detail {

/// The token of the largest score, or the first whose score is a NaN.
struct BestToken {
  double score;
  Token token;
};

/// What the kernels of one draw share.
/// Width_: neighbouring logits that a thread loads at once.
template <class A_, int Width_>
struct DrawTraits {
  using A = A_;
  static constexpr int width = Width_;
  static constexpr int threads = 1024, weigh_threads = 256, weights_a_thread = 4;
  static constexpr int warps = threads / warp_size;
  static constexpr Index padding = 2 * threads;  // weights of a row come in multiples of it
  static constexpr int digit_bits = 11, bins = 1 << digit_bits;
  static constexpr Token none = std::numeric_limits<Token>::max();
  static_assert(bins == 2 * threads, "zamba: a thread has two bins");
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
  __device__ double score(Index row, Index token, double logit, double penalty) const {
    if (penalty == 1 || !(samplers.seen(row, token / 32) >> token % 32 & 1)) return logit;
    return logit > 0 ? logit / penalty : logit * penalty;
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
    if (::isnan(next)) nan = ::min(nan, of);
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
  let_next_begin();
  wait_for_previous();
  const Index row = blockIdx.x;
  if (!draw.wanted(row)) return;
  const int V = static_cast<int>(draw.logits.cols());
  const auto* logits = &draw.logits(draw.place(row), 0);
  const double penalty = draw.samplers.options->repetition_penalty;
  Largest<double> mine(none);
  if (penalty == 1) {  // then as they are, which is exact and takes less
    Largest<F> plain(none);
#pragma unroll 4
    for (int i = threadIdx.x * width; i < V; i += Traits::threads * width) {
      F values[width];
      piece_at<width>(logits + i).values(values);
#pragma unroll
      for (int k = 0; k < width; ++k) plain.add(values[k], i + k);
    }
    mine.score = plain.score;
    mine.token = plain.token;
    mine.nan = plain.nan;
  } else {
#pragma unroll 2
    for (int i = threadIdx.x * width; i < V; i += Traits::threads * width) {
      F values[width];
      piece_at<width>(logits + i).values(values);
#pragma unroll
      for (int k = 0; k < width; ++k) mine.add(draw.score(row, i + k, values[k], penalty), i + k);
    }
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
  let_next_begin();
  wait_for_previous();
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

/// How many tokens, and their mass.
struct Amount {
  unsigned count;
  std::uint64_t mass;

  __device__ Amount operator+(const Amount& other) const { return {count + other.count, mass + other.mass}; }
};

/// By what a search measures the order.
enum class Measure { count, mass };

/// The tokens of a row in the order of their weights, as a block of Traits::threads sees them. All threads call each
/// member; the results are the same for all.
template <class Traits>
class WeightOrder {
 public:
  /// Some tokens of equal weight, or one, or some without mass: those whose key, without its last `shift` bits, is
  /// `key`.
  struct Place {
    std::uint64_t key;
    int shift;
    Amount before, here;  // of all tokens that come earlier; of these

    __device__ std::uint64_t mass_of_one() const { return here.mass / here.count; }
  };
  struct Shared {
    unsigned counts[Traits::bins], low[Traits::bins], high[Traits::bins];  // of masses, 32 bits each
    Place found;
    std::uint64_t of_warps[Traits::warps];
  };

  __device__ WeightOrder(Shared& shared, const double* weights, int size, double whole)
      : shared_(shared), weights_(weights), size_(size), whole_(whole) {}

  __device__ std::uint64_t mass(double weight) const { return __double2ull_rn(weight * whole_); }
  /// Small for large weights; any two differ where the weights do.
  __device__ static std::uint64_t key(double weight) {
    return __double_as_longlong(1.0) - __double_as_longlong(weight);
  }

  /// Counts everything; to be called before find().
  __device__ Amount count_all() {
    first_ = histogram(0, Place{0, key_bits, {}, {}}, nullptr);
    return total_;
  }

  /// The token at which the measure of the order exceeds `target`, which is less than the whole.
  __device__ Place find(Measure measure, std::uint64_t target) {
    Place place{0, key_bits, {}, {}};
    choose(place, first_, 0, measure, target);
    for (int level = 1; place.here.count > 1 && place.here.mass > 0 && place.shift > 0; ++level) {
      bool equal = false;
      const Bins bins = histogram(level, place, &equal);
      if (equal) {  // in all bits
        place = {shared_.found.key, 0, place.before, place.here};
        break;
      }
      choose(place, bins, level, measure, target);
    }
    return place;
  }

  /// The sum of value(weight) over all tokens.
  template <class Value>
  __device__ std::uint64_t sum_by_id(Value value) {
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, part = size_ / Traits::warps;
    std::uint64_t sum = 0;
#pragma unroll 4
    for (int i = 2 * lane; i < part; i += 2 * warp_size) {
      const double2 two = *reinterpret_cast<const double2*>(weights_ + warp * part + i);
      sum += value(two.x) + value(two.y);
    }
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    __syncthreads();  // what an earlier call left has been read
    if (lane == 0) shared_.of_warps[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < Traits::warps; ++w) sum += shared_.of_warps[w];
    return sum;
  }
  /// After it: the token at which that sum exceeds `target`, known to one thread only; the others get -1.
  template <class Value>
  __device__ int find_by_id(std::uint64_t target, Value value) const {
    const int part = size_ / Traits::warps;
    int warp = 0;
    std::uint64_t before = 0;
    for (; before + shared_.of_warps[warp] <= target; ++warp) before += shared_.of_warps[warp];
    for (int i = threadIdx.x;; i += Traits::threads) {
      const std::uint64_t mine = i < part ? value(weights_[warp * part + i]) : 0;
      std::uint64_t here;
      const std::uint64_t before_mine = before + block_exclusive_sum<Traits::threads>(mine, here);
      if (before + here > target) return before_mine <= target && target < before_mine + mine ? warp * part + i : -1;
      before += here;
    }
  }

 private:
  /// Of weights of 2^-64 and more. Smaller ones have no mass, and share the last bin of the first histogram.
  static constexpr int key_bits = 58;

  /// A thread's two bins, and all that lie before them.
  struct Bins {
    Amount of[2], before;
  };

  /// Exact, in whatever order threads come: every overflow of the low half is seen by one of them.
  __device__ void put(unsigned bin, const Amount& amount) {
    if (amount.count == 0) return;
    atomicAdd(&shared_.counts[bin], amount.count);
    const auto low = static_cast<unsigned>(amount.mass), high = static_cast<unsigned>(amount.mass >> 32);
    const unsigned before = atomicAdd(&shared_.low[bin], low), carry = before + low < low;
    if (high + carry > 0) atomicAdd(&shared_.high[bin], high + carry);
  }

  __device__ static int shift_of(int level) { return ::max(key_bits - Traits::digit_bits * (level + 1), 0); }

  /// The bins of the bits of a level, for the tokens at `place`; whether all their keys are equal, where asked for, and
  /// then that key is in shared_.found.
  __device__ Bins histogram(int level, const Place& place, bool* equal) {
    const int shift = shift_of(level);
    const std::uint64_t mask = (std::uint64_t{1} << (place.shift - shift)) - 1;
    __syncthreads();
    for (int bin = threadIdx.x; bin < Traits::bins; bin += Traits::threads) {
      shared_.counts[bin] = 0;
      shared_.low[bin] = 0;
      shared_.high[bin] = 0;
    }
    __syncthreads();
    std::uint64_t least = ~std::uint64_t{0}, greatest = 0;
    unsigned bin = 0;
    Amount gathered{};  // for one bin, as neighbours may be in the same
    const auto take = [&](double weight) {
      const std::uint64_t k = key(weight);
      if (!(weight > 0) || (level > 0 && k >> place.shift != place.key)) return;
      least = ::min(least, k);
      greatest = ::max(greatest, k);
      const auto next = static_cast<unsigned>(level > 0 ? k >> shift & mask : ::min(k >> shift, mask));
      if (next != bin) {
        put(bin, gathered);
        gathered = {};
        bin = next;
      }
      gathered = gathered + Amount{1, mass(weight)};
    };
#pragma unroll 4
    for (int i = 2 * threadIdx.x; i < size_; i += 2 * Traits::threads) {
      const double2 two = *reinterpret_cast<const double2*>(weights_ + i);
      take(two.x);
      take(two.y);
    }
    put(bin, gathered);
    if (equal) {
      least = block_min<Traits::threads>(least);
      greatest = block_max<Traits::threads>(greatest);
      *equal = least == greatest;
      if (threadIdx.x == 0) shared_.found.key = least;
    }
    __syncthreads();
    Bins bins;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int bin = 2 * threadIdx.x + i;
      bins.of[i] = {shared_.counts[bin], std::uint64_t{shared_.high[bin]} << 32 | shared_.low[bin]};
    }
    const Amount both = bins.of[0] + bins.of[1];
    bins.before.count = block_exclusive_sum<Traits::threads>(both.count, total_.count);
    bins.before.mass = block_exclusive_sum<Traits::threads>(both.mass, total_.mass);
    return bins;
  }

  /// Goes from `place` to the bin in which the measure exceeds `target`.
  __device__ void choose(Place& place, const Bins& bins, int level, Measure measure, std::uint64_t target) {
    const auto of = [&](const Amount& amount) { return measure == Measure::count ? amount.count : amount.mass; };
    const int shift = shift_of(level);
    __syncthreads();  // what was found before has been read
    Amount before = place.before + bins.before;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Amount after = before + bins.of[i];
      if (of(before) <= target && target < of(after))
        shared_.found = {place.key << (place.shift - shift) | (2 * threadIdx.x + i), shift, before, bins.of[i]};
      before = after;
    }
    __syncthreads();
    place = shared_.found;
  }

  Shared& shared_;
  const double* weights_;
  int size_;
  double whole_;
  Bins first_;
  Amount total_;  // of the last histogram
};

/// Blocks: rows.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads) draw_token_kernel(Draw<typename Traits::A> draw) {
  using Order = WeightOrder<Traits>;
  __shared__ typename Order::Shared shared;
  let_next_begin();
  wait_for_previous();
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

}  // namespace detail

template <>
struct SampleRows<cuda> {
  template <class A>
  static void sample(Context<cuda>& ctx, const BatchSampler& samplers, Index rows, Matrix<const A> logits,
                     bool greedy) {
    if (rows == 0) return;
    if (detail::in_pieces(logits))
      launch<detail::DrawTraits<A, detail::wide<A>>>(ctx, samplers, rows, logits, greedy);
    else
      launch<detail::DrawTraits<A, 1>>(ctx, samplers, rows, logits, greedy);
  }

 private:
  template <class Traits, class A>
  static void launch(Context<cuda>& ctx, const BatchSampler& samplers, Index rows, Matrix<const A> logits,
                     bool greedy) {
    const Index V = logits.cols(), padded = (V + Traits::padding - 1) / Traits::padding * Traits::padding;
    const int bits = std::bit_width(static_cast<std::uint64_t>(V - 1));  // V <= 2^bits, so all masses are below 2^63
    require(V <= Index{1} << 25, "sample_rows: on CUDA the vocabulary is at most 2^25, got ", V);
    const dim3 across(static_cast<unsigned>(rows));
    ArenaScope scope(ctx.arena());
    detail::Draw<A> draw{samplers,
                         logits,
                         ctx.arena().template tensor<detail::BestToken>(rows).data,
                         {},
                         static_cast<double>(std::uint64_t{1} << (62 - bits))};
    if (!greedy) draw.weights = ctx.arena().template tensor<double>(rows, padded);
    detail::launch(ctx, "sample_rows: best", detail::best_token_kernel<Traits>, across, Traits::threads, 0, draw);
    if (greedy) return;
    // The weights need no wide loads, so there is one version of these.
    using Single = detail::DrawTraits<A, 1>;
    const dim3 parts(across.x, detail::blocks_for(padded, Traits::weigh_threads * Traits::weights_a_thread));
    detail::launch(ctx, "sample_rows: weights", detail::weigh_tokens_kernel<Single>, parts, Traits::weigh_threads, 0,
                   draw);
    detail::launch(ctx, "sample_rows: draw", detail::draw_token_kernel<Single>, across, Traits::threads, 0, draw);
  }
};

}  // namespace zamba
