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
#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Rows of the weight that a block takes, and columns of a stage: whole lines of 128 bytes, which a warp copies for
/// four rows at a time; memory is read at its full rate only so.
struct LinearTile {
  static constexpr int rows = 128, depth = 64;
  static constexpr int pieces = depth / wide<bf16>;  // of 16 bytes, of a row in a stage

  /// Where a stage has a piece, in pieces. Odd rows have their halves exchanged.
  __host__ __device__ static constexpr int place(int row, int piece) { return row * pieces + (piece ^ (row % 2 * 4)); }
  /// Whether eight lanes that read a half of two rows meet the eight different groups of four banks.
  static constexpr bool conflict_free() {
    for (int half = 0; half < 2; ++half) {
      unsigned groups = 0;
      for (int lane = 0; lane < 8; ++lane) groups |= 1u << place(lane / 4, half * 4 + lane % 4) % 8;
      if (groups != 0xff) return false;
    }
    return true;
  }
};
static_assert(LinearTile::conflict_free(), "zamba: lanes that read together meet a bank twice");

/// Products for up to Tokens_ tokens, whose sums a block keeps in registers, each in two parts: four warps multiply 32
/// rows each of half of the columns of a stage, four others the other half.
template <int Tokens_, int Stages_>
struct LinearTileTraits : LinearTile {
  static constexpr int tokens = Tokens_, stages = Stages_;
  static constexpr int row_warps = 4, halves = 2, threads = row_warps * halves * 32;
  static constexpr int row_tiles = rows / row_warps / 16, token_tiles = tokens / 8;  // fragments of a warp
  static constexpr int weight_pieces = rows * pieces, token_pieces = tokens * pieces;
  static constexpr int weight_copies = weight_pieces / threads;
  static constexpr int token_copies = ceil_div(token_pieces, threads);
  static constexpr int row_stride = rows + 4;  // of the sums in shared memory: writing them meets no bank twice
  static constexpr std::size_t shared_bytes = std::size_t{16} * stages * (weight_pieces + token_pieces);
  static_assert(sizeof(float) * tokens * row_stride <= shared_bytes, "zamba: the sums take the place of the stages");
};

/// Where sums of bf16 products go. Whole: rows of y, residual and bias can be read and written 16 bytes at a time.
struct LinearResult {
  static constexpr int width = wide<bf16>;
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
        load_values<width>(&bias[out], values);
#pragma unroll
        for (int i = 0; i < width; ++i) sum[i] += values[i];
      }
      if (more) {
        float values[width];
        piece_at<width>(more).values(values);
#pragma unroll
        for (int i = 0; i < width; ++i) sum[i] += values[i];
      }
      store_piece<width>(to, sum);
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

/// What a block multiplies: rows of the weight from first_row on, `cols` columns of them from first_col on, of a head.
template <class Traits>
struct LinearBlock {
  Index head, first_row, first_col;
  int cols, count, tokens;  // count: of stages

  __device__ LinearBlock(const Tensor<const bf16, 3>& x, int stages_of_split)
      : head(blockIdx.z),
        first_row(Index{blockIdx.x} * Traits::rows),
        first_col(Index{blockIdx.y} * stages_of_split * Traits::depth),
        cols(static_cast<int>(::min(x.cols() - first_col, Index{stages_of_split} * Traits::depth))),
        count(ceil_div(cols, Traits::depth)),
        tokens(static_cast<int>(x.rows())) {}
};

/// One thread's part of loading stages: a piece of every copy_rows-th row, which is in the same place of each.
/// Shared memory: stages of (rows, depth) of the weight, then stages of (tokens, depth) of x.
template <class Traits>
class LinearLoader {
 public:
  __device__ LinearLoader(const Tensor<const bf16, 3>& x, const Tensor<const bf16, 3>& weight,
                          const LinearBlock<Traits>& block, uint4* stages)
      : block_(block),
        row_(threadIdx.x / Traits::pieces),
        col_(threadIdx.x % Traits::pieces * wide<bf16>),
        to_(stages + Traits::place(row_, threadIdx.x % Traits::pieces)),
        rows_left_(static_cast<int>(::min(weight.shape[1] - block.first_row, Index{Traits::rows})) - row_),
        weight_(weight.data + block.head * weight.stride[0] + (block.first_row + row_) * weight.stride[1] +
                block.first_col + col_),
        x_(x.data + block.head * x.stride[1] + row_ * x.stride[0] + block.first_col + col_),
        weight_stride_(weight.stride[1]),
        x_stride_(x.stride[0]) {}

  /// Begins to copy the weight of a stage; zeros where it has no more rows or columns.
  __device__ void begin_weight(int stage) const {
    if (stage >= block_.count) return;
    const int slot = stage % Traits::stages, k = stage * Traits::depth;
#pragma unroll
    for (int i = 0; i < Traits::weight_copies; ++i)
      copy_async_prefetch(to_ + slot * Traits::weight_pieces + i * Traits::threads,
                          weight_ + copy_rows * i * weight_stride_ + k,
                          k + col_ < block_.cols && copy_rows * i < rows_left_);
  }

  /// Begins to copy x of a stage, and ends the group of copies of this stage, though there may be none.
  __device__ void begin_tokens(int stage) const {
    if (stage < block_.count) {
      const int slot = stage % Traits::stages, k = stage * Traits::depth;
#pragma unroll
      for (int i = 0; i < Traits::token_copies; ++i) {
        const int token = i * copy_rows + row_;
        if (Traits::token_pieces % Traits::threads == 0 || token < Traits::tokens)
          copy_async(to_ + Traits::stages * Traits::weight_pieces + slot * Traits::token_pieces + i * Traits::threads,
                     x_ + copy_rows * i * x_stride_ + k, k + col_ < block_.cols && token < block_.tokens);
      }
    }
    copy_async_commit();
  }

 private:
  static constexpr int copy_rows = Traits::threads / Traits::pieces;
  static_assert(copy_rows % 2 == 0, "zamba: what a thread copies lies in rows of one parity");

  const LinearBlock<Traits>& block_;
  int row_, col_;
  uint4* to_;
  int rows_left_;
  const bf16 *weight_, *x_;
  Index weight_stride_, x_stride_;
};

/// The sums of a warp: 32 rows of the weight by all tokens, of half of the columns. With g and t of mma.cuh, the order
/// of columns within a product is free as long as a and b agree: instead of 2t, 2t + 1 and 2t + 8, 2t + 9 they are
/// columns 8t to 8t + 3 of the half, the next product taking 8t + 4 to 8t + 7, so that a lane reads 16 bytes at once.
template <class Traits>
struct LinearSums {
  int g, t, half, row;                                    // row: the first of this lane's
  float sums[Traits::row_tiles][Traits::token_tiles][4];  // [m][n]: c (16 rows x 8 tokens)

  __device__ LinearSums()
      : g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4),
        half(threadIdx.x / 32 / Traits::row_warps),
        row(threadIdx.x / 32 % Traits::row_warps * 16 * Traits::row_tiles + g),
        sums{} {}

  /// sums += weight x^T of a stage's columns.
  __device__ void multiply(const uint4* stages, int stage) {
    const int slot = stage % Traits::stages;
    const int here = Traits::place(g, half * 4 + t);  // of a row that differs from g by a multiple of 8
    const uint4* const rows_here = stages + slot * Traits::weight_pieces + (row - g) * Traits::pieces + here;
    const uint4* const tokens_here =
        stages + Traits::stages * Traits::weight_pieces + slot * Traits::token_pieces + here;
    uint4 a[2 * Traits::row_tiles];  // a[2m], a[2m + 1]: rows g and g + 8 of 16, columns 8t ... 8t + 7
#pragma unroll
    for (int i = 0; i < 2 * Traits::row_tiles; ++i) a[i] = rows_here[8 * i * Traits::pieces];
#pragma unroll
    for (int tile = 0; tile < Traits::token_tiles; tile += 2) {
      // b[i]: token g of 8, columns 8t ... 8t + 7. Four independent products at a time, so that none waits for the one
      // before it.
      const uint4 b[] = {tokens_here[tile * 8 * Traits::pieces], tokens_here[(tile + 1) * 8 * Traits::pieces]};
#pragma unroll
      for (int m = 0; m < Traits::row_tiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          mma_m16n8k16(sums[m][tile + i], {a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y}, {b[i].x, b[i].y});
#pragma unroll
      for (int m = 0; m < Traits::row_tiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          mma_m16n8k16(sums[m][tile + i], {a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w}, {b[i].z, b[i].w});
    }
  }

  /// Adds the halves of the columns, into (tokens, rows) at `to`, where the stages were.
  __device__ void join_halves(float* to) {
    __syncthreads();
    if (half == 1) for_sums(to, [](float sum, float& at) { at = sum; });
    __syncthreads();
    if (half == 0) for_sums(to, [](float sum, float& at) { at = sum + at; });
    __syncthreads();
  }

 private:
  template <class F>
  __device__ void for_sums(float* to, F&& f) const {
#pragma unroll
    for (int m = 0; m < Traits::row_tiles; ++m)
#pragma unroll
      for (int tile = 0; tile < Traits::token_tiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f(sums[m][tile][i], to[(8 * tile + 2 * t + i % 2) * Traits::row_stride + row + 16 * m + 8 * (i / 2)]);
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
    load_written_values<width>(joined + token * Traits::row_stride + at, values);
    if (partial)
      store_values<width>(&partial(blockIdx.y, block.head, token, block.first_row + at), values);
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
    float values[2][wide<float>];
    piece_at<wide<float>>(from).values(values[0]);
    piece_at<wide<float>>(from + wide<float>).values(values[1]);
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += values[i / wide<float>][i % wide<float>];
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
    return tokens <= most_tokens && in_pieces(x) && in_pieces(weight);
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
    const bool whole = in_pieces(y) && (!residual || in_pieces(residual)) && aligned(bias, wide<float>);
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
