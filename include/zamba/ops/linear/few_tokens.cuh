// SPDX-License-Identifier: MIT
// linear of bf16 for up to 32 tokens: a product on tensor cores, of a large matrix and a narrow one ("skinny GEMM"), at
// the pace at which memory delivers the weight.
//
// A block takes a tile of 128 rows of the weight, which passes through shared memory in stages of 64 columns, several
// of them on their way at any time (a multistage pipeline of cp.async). The weight is the left factor of the products,
// so that their 16 rows are rows of the weight and their 8 columns are tokens. Where the rows make too few blocks for a
// GPU, blocks split the columns too ("split-K"), and a second kernel adds their sums.
//
// The order of a sum depends on the extents of the weight only: k in order within either half of 64 columns, then the
// halves, then the splits of the columns.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/ops/linear/tile.cuh>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Where sums of bf16 products go. Whole: rows of y, residual and bias can be read and written 16 bytes at a time.
struct LinearResult {
  static constexpr int width = vector_width<bf16>;
  Tensor<bf16, 3> y;
  Matrix<const bf16> residual;
  Vector<const float> bias;
  bool whole;

  /// Outputs [out, out + width) of a token.
  __device__ void write(Index head, Index token, Index out, float (&sum)[width]) const {
    bf16* const to = y.data + token * y.stride[0] + head * y.stride[1] + out;
    const bf16* const more = residual ? &residual(token, out) : nullptr;
    if (whole) {
      if (bias) {
        float values[width];
        load_vector_readonly<width>(&bias[out]).unpack(values);
#pragma unroll
        for (int i = 0; i < width; ++i) sum[i] += values[i];
      }
      if (more) {
        float values[width];
        load_vector<width>(more).unpack(values);
#pragma unroll
        for (int i = 0; i < width; ++i) sum[i] += values[i];
      }
      store_vector(to, sum);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (out + i >= y.cols()) return;
        if (bias) sum[i] += bias[out + i];
        if (more) sum[i] += float(more[i]);
        to[i] = bf16(sum[i]);
      }
    }
  }
};

/// Blocks across: rows of the weight; down: splits of the columns, of so many stages each; deep: heads. With one split
/// the sums go to `result`, else to `partial` (splits, heads, tokens, rows of whole blocks).
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 2)
    linear_tile_kernel(Tensor<const bf16, 3> x, Tensor<const bf16, 3> weight, int stages_of_split, LinearResult result,
                       Tensor<float, 4> partial) {
  extern __shared__ uint4 linear_stages[];
  launch_dependents();
  const LinearBlock<Traits> block(x, stages_of_split);
  const LinearLoader<Traits> loader(x, weight, block, linear_stages);
  LinearSums<Traits> sums;
  constexpr int ahead = Traits::stages - 1;
  // The weight of the first stages is on its way while what was queued before still runs.
  for (int stage = 0; stage < ahead; ++stage) loader.begin_weight(stage);
  grid_dependency_wait();
  for (int stage = 0; stage < ahead; ++stage) loader.begin_tokens(stage);
  for (int stage = 0; stage < block.count; ++stage) {
    copy_async_wait<ahead - 1>();
    __syncthreads();  // the stage is there, and nobody still reads what the next copies replace
    loader.begin_weight(stage + ahead);
    loader.begin_tokens(stage + ahead);
    sums.multiply(linear_stages, stage);
  }

  float* const joined = reinterpret_cast<float*>(linear_stages);
  sums.join_halves(joined);
  constexpr int width = LinearResult::width, pieces = Traits::rows / width;
  for (int piece = threadIdx.x; piece < ::min(block.tokens, Traits::tokens) * pieces; piece += Traits::threads) {
    const int token = piece / pieces, at = piece % pieces * width;
    if (block.first_row + at >= weight.shape[1]) continue;
    float values[width];
    load_vector<width>(joined + token * Traits::row_stride + at).unpack(values);
    if (partial)
      store_vector(&partial(blockIdx.y, block.head, token, block.first_row + at), values);
    else
      result.write(block.head, token, block.first_row + at, values);
  }
}

/// Adds the sums of the splits, in order. Blocks across: outputs; down: tokens; deep: heads.
template <class Threads>
__global__ void __launch_bounds__(Threads::value)
    linear_combine_kernel(Tensor<const float, 4> partial, LinearResult result) {
  constexpr int width = LinearResult::width;
  launch_dependents();
  grid_dependency_wait();
  const Index head = blockIdx.z, token = blockIdx.y;
  const Index out = (Index{blockIdx.x} * Threads::value + threadIdx.x) * width;
  if (out >= result.y.cols()) return;
  float sum[width] = {};
#pragma unroll 4
  for (Index split = 0; split < partial.shape[0]; ++split) {
    const float* const from = &partial(split, head, token, out);
    float values[2][vector_width<float>];
    load_vector<vector_width<float>>(from).unpack(values[0]);
    load_vector<vector_width<float>>(from + vector_width<float>).unpack(values[1]);
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += values[i / vector_width<float>][i % vector_width<float>];
  }
  result.write(head, token, out, sum);
}

/// What fits the kernels above, their scratch and their launch. A is bf16; templates, so that only what uses the
/// kernels compiles them.
class LinearTiles {
 public:
  static constexpr Index most_tokens = 32;  // cuBLAS takes less time for more

  /// Otherwise: too many tokens, or rows that are no multiples of 16 bytes.
  template <class A>
  static bool fit(Tensor<const A, 3> x, Tensor<const A, 3> weight, Index tokens) {
    return tokens <= most_tokens && in_vectors(x) && in_vectors(weight);
  }

  /// The sums of the splits (splits, heads, tokens, rows of whole blocks), where there are several.
  template <class Ctx>
  static Tensor<float, 4> scratch(Ctx& ctx, Tensor<const bf16, 3> weight, Index tokens) {
    const Splits splits = splits_of(weight);
    if (splits.count == 1) return {};
    return ctx.arena().template tensor<float>(splits.count, weight.shape[0], tokens, splits.across * rows);
  }

  /// y (n, heads, out); with a residual or a bias it is one head.
  template <class A>
  static void forward(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                      Matrix<const A> residual, Vector<const float> bias) {
    // As many stages as shared memory has room for; all give the same bits.
    const auto serves = [&]<class Traits>(Traits) {
      return y.rows() <= Traits::tokens && Traits::shared_bytes <= ctx.most_shared();
    };
    using For16 = LinearTileTraits<16, 6>;
    using For32 = LinearTileTraits<most_tokens, 5>;
    if (serves(For16{}))
      launch<For16>(ctx, x, weight, y, residual, bias);
    else if (serves(For32{}))
      launch<For32>(ctx, x, weight, y, residual, bias);
    else
      launch<LinearTileTraits<most_tokens, 4>>(ctx, x, weight, y, residual, bias);
  }

 private:
  static constexpr Index rows = LinearTile::rows, depth = LinearTile::depth;
  /// Blocks for which columns are shared out: about one for each multiprocessor. A constant, so that sums are the same
  /// on all GPUs.
  static constexpr Index blocks = 132;
  /// Stages of a split, at least: with fewer, the sums of the splits would be what takes the time.
  static constexpr Index least_stages = 4;

  /// How blocks share out a weight: rows among `across`, columns among `count` splits of so many stages.
  struct Splits {
    Index across, of_split, count;
  };
  static Splits splits_of(Tensor<const bf16, 3> weight) {
    const Index across = ceil_div(weight.shape[1], rows);
    const Index stages = std::max<Index>(1, ceil_div(weight.cols(), depth));
    const Index most = std::max<Index>(1, std::min(blocks / (across * weight.shape[0]), stages / least_stages));
    const Index of_split = ceil_div(stages, most);
    return {across, of_split, ceil_div(stages, of_split)};
  }

  template <class Traits>
  static void launch(Context<cuda>& ctx, Tensor<const bf16, 3> x, Tensor<const bf16, 3> weight, Tensor<bf16, 3> y,
                     Matrix<const bf16> residual, Vector<const float> bias) {
    const Index heads = weight.shape[0];
    const auto [across, of_split, splits] = splits_of(weight);
    const bool whole = in_vectors(y) && (!residual || in_vectors(residual)) && aligned(bias, vector_width<float>);
    const LinearResult result{y, residual, bias, whole};
    ArenaScope scope(ctx.arena());
    const Tensor<float, 4> partial = scratch(ctx, weight, y.rows());

    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(splits), static_cast<unsigned>(heads));
    // Where each has a multiprocessor of its own, two must not share one because they began while others were busy.
    const std::size_t alone = ctx.most_shared() / 2 + 1;
    const bool spread = across * splits * heads <= ctx.multiprocessors();
    const Overlap overlap = overlap_for(y.rows());
    kernel::launch(ctx, overlap, "linear", linear_tile_kernel<Traits>, grid, Traits::threads,
                   spread ? std::max(alone, Traits::shared_bytes) : Traits::shared_bytes, x, weight,
                   static_cast<int>(of_split), result, partial);
    if (splits == 1) return;
    using Threads = std::integral_constant<int, 128>;
    const dim3 of_combine(blocks_for(y.cols(), Threads::value * LinearResult::width), static_cast<unsigned>(y.rows()),
                          static_cast<unsigned>(heads));
    kernel::launch(ctx, overlap, "linear: combine", linear_combine_kernel<Threads>, of_combine, Threads::value, 0,
                   Tensor<const float, 4>(partial), result);
  }
};

}  // namespace zamba::kernel
