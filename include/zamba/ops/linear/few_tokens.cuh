// SPDX-License-Identifier: MIT
// linear of bf16 for up to 32 tokens, on tensor cores at the pace at which memory delivers the weight.
//
// A block takes 128 rows of the weight, which pass through shared memory in stages of 64 columns, several of them on
// their way at any time. Where the rows make too few blocks for a GPU, blocks share the columns too, and a second
// kernel adds their sums.
//
// The order of a sum depends on the extents of the weight only: k in order within either half of 64 columns, then the
// halves, then the parts of the columns.
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
};

/// Products for up to Tokens_ tokens, whose sums a block keeps in registers, each in two parts.
///
/// Four warps multiply 32 rows each of half of the columns, four others the other half. A fragment of a takes
/// neighbouring columns 2t, 2t + 1 and 2t + 8, 2t + 9 of lane t; the order of columns within a sum is free as long as a
/// and b agree, so they are columns 8t to 8t + 3 of memory here, the next product taking 8t + 4 to 8t + 7: a lane reads
/// 16 bytes at once. Odd rows of a stage have its halves exchanged, so that eight lanes that read two rows meet no bank
/// twice.
template <int Tokens_, int Stages_>
struct LinearTileTraits : LinearTile {
  static constexpr int tokens = Tokens_, stages = Stages_;
  static constexpr int row_warps = 4, halves = 2, threads = row_warps * halves * 32;
  static constexpr int row_tiles = rows / row_warps / 16, token_tiles = tokens / 8;  // fragments of a warp
  static constexpr int pieces = depth / vector_width<bf16>;                          // of a row in a stage
  __device__ static constexpr int place(int row, int piece) { return row * pieces + (piece ^ (row % 2 * 4)); }
  static constexpr int weight_pieces = rows * pieces, token_pieces = tokens * pieces;
  static constexpr int weight_copies = weight_pieces / threads;
  static constexpr int token_copies = ceil_div(token_pieces, threads);
  static constexpr int row_stride = rows + 4;  // of the sums in shared memory: writing them meets no bank twice
  static constexpr std::size_t shared_bytes = std::size_t{16} * stages * (weight_pieces + token_pieces);
  static_assert(sizeof(float) * tokens * row_stride <= shared_bytes, "zamba: the sums take the place of the stages");
};

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

/// Blocks across: rows of the weight; down: parts of the columns, of so many stages each; deep: heads. With one part
/// the sums go to `result`, else to `partial` (parts, heads, tokens, rows of whole blocks).
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 2)
    linear_tile_kernel(Tensor<const bf16, 3> x, Tensor<const bf16, 3> weight, int stages_of_part, LinearResult result,
                       Tensor<float, 4> partial) {
  extern __shared__ uint4 linear_stages[];
  launch_dependents();
  constexpr int stages = Traits::stages, tokens = Traits::tokens, token_tiles = Traits::token_tiles;
  uint4* const weight_stages = linear_stages;
  uint4* const token_stages = linear_stages + stages * Traits::weight_pieces;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int row_warp = thread / 32 % Traits::row_warps, half = thread / 32 / Traits::row_warps;
  const Index head = blockIdx.z, first_row = Index{blockIdx.x} * Traits::rows;
  const Index first_col = Index{blockIdx.y} * stages_of_part * Traits::depth;
  const int cols = static_cast<int>(::min(x.cols() - first_col, Index{stages_of_part} * Traits::depth));
  const int count = ceil_div(cols, Traits::depth), n = static_cast<int>(x.rows());

  // This thread copies a piece of every `copy_rows`-th row, which is in the same place of each.
  constexpr int copy_rows = Traits::threads / Traits::pieces;
  static_assert(copy_rows % 2 == 0, "zamba: what a thread copies lies in rows of one parity");
  const int piece = thread % Traits::pieces, copy_row = thread / Traits::pieces, col = piece * vector_width<bf16>;
  const int copy_to = Traits::place(copy_row, piece);
  const int rows_left = static_cast<int>(::min(weight.shape[1] - first_row, Index{Traits::rows})) - copy_row;
  const bf16* const w =
      weight.data + head * weight.stride[0] + (first_row + copy_row) * weight.stride[1] + first_col + col;
  const bf16* const in = x.data + head * x.stride[1] + copy_row * x.stride[0] + first_col + col;
  const auto begin_weight = [&](int stage) {
    if (stage < count) {
      const int slot = stage % stages, k = stage * Traits::depth;
#pragma unroll
      for (int i = 0; i < Traits::weight_copies; ++i)
        copy_async_prefetch(weight_stages + slot * Traits::weight_pieces + i * Traits::threads + copy_to,
                            w + copy_rows * i * weight.stride[1] + k, k + col < cols && copy_rows * i < rows_left);
    }
  };
  const auto begin_tokens = [&](int stage) {
    if (stage < count) {
      const int slot = stage % stages, k = stage * Traits::depth;
#pragma unroll
      for (int i = 0; i < Traits::token_copies; ++i) {
        const int token = i * copy_rows + copy_row;
        if (Traits::token_pieces % Traits::threads == 0 || token < tokens)
          copy_async(token_stages + slot * Traits::token_pieces + i * Traits::threads + copy_to,
                     in + copy_rows * i * x.stride[0] + k, k + col < cols && token < n);
      }
    }
    copy_async_commit();
  };

  const int row = row_warp * 16 * Traits::row_tiles + g;  // the first of this lane's
  float sums[Traits::row_tiles][token_tiles][4] = {};
  // The weight of the first stages is on its way while what was queued before still runs.
  for (int stage = 0; stage < stages - 1; ++stage) begin_weight(stage);
  grid_dependency_wait();
  for (int stage = 0; stage < stages - 1; ++stage) begin_tokens(stage);
  for (int stage = 0; stage < count; ++stage) {
    copy_async_wait<stages - 2>();
    __syncthreads();  // the stage is there, and nobody still reads what the next copies replace
    begin_weight(stage + stages - 1);
    begin_tokens(stage + stages - 1);
    const int slot = stage % stages;
    const int here = Traits::place(g, half * 4 + t);  // of a row that differs from g by a multiple of 8
    const uint4* const rows_here = weight_stages + slot * Traits::weight_pieces + (row - g) * Traits::pieces + here;
    const uint4* const tokens_here = token_stages + slot * Traits::token_pieces + here;
    uint4 a[2 * Traits::row_tiles];
#pragma unroll
    for (int i = 0; i < 2 * Traits::row_tiles; ++i) a[i] = rows_here[8 * i * Traits::pieces];
#pragma unroll
    for (int tile = 0; tile < token_tiles; tile += 2) {
      // Four independent products at a time, so that none waits for the one before it.
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

  // The halves of the columns join, and rows lie beside each other for the writing.
  float* const tile_sums = reinterpret_cast<float*>(linear_stages);
  const auto for_sums = [&](auto&& f) {
#pragma unroll
    for (int m = 0; m < Traits::row_tiles; ++m)
#pragma unroll
      for (int tile = 0; tile < token_tiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f(sums[m][tile][i], tile_sums[(8 * tile + 2 * t + i % 2) * Traits::row_stride + row + 16 * m + 8 * (i / 2)]);
  };
  __syncthreads();
  if (half == 1) for_sums([](float sum, float& to) { to = sum; });
  __syncthreads();
  if (half == 0) for_sums([](float sum, float& to) { to = sum + to; });
  __syncthreads();
  constexpr int width = LinearResult::width, pieces = Traits::rows / width;
  for (int piece = thread; piece < ::min(n, tokens) * pieces; piece += Traits::threads) {
    const int token = piece / pieces, at = piece % pieces * width;
    if (first_row + at >= weight.shape[1]) continue;
    float values[width];
    load_vector<width>(tile_sums + token * Traits::row_stride + at).unpack(values);
    if (partial)
      store_vector(&partial(blockIdx.y, head, token, first_row + at), values);
    else
      result.write(head, token, first_row + at, values);
  }
}

/// Adds the parts in order. Blocks across: outputs; down: tokens; deep: heads.
template <class Threads>
__global__ void __launch_bounds__(Threads::value)
    linear_join_kernel(Tensor<const float, 4> partial, LinearResult result) {
  constexpr int width = LinearResult::width;
  launch_dependents();
  grid_dependency_wait();
  const Index head = blockIdx.z, token = blockIdx.y;
  const Index out = (Index{blockIdx.x} * Threads::value + threadIdx.x) * width;
  if (out >= result.y.cols()) return;
  float sum[width] = {};
#pragma unroll 4
  for (Index part = 0; part < partial.shape[0]; ++part) {
    const float* const from = &partial(part, head, token, out);
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

  /// The sums of the parts (parts, heads, tokens, rows of whole blocks), where there are several.
  template <class Ctx>
  static Tensor<float, 4> scratch(Ctx& ctx, Tensor<const bf16, 3> weight, Index tokens) {
    const Parts parts = parts_of(weight);
    if (parts.count == 1) return {};
    return ctx.arena().template tensor<float>(parts.count, weight.shape[0], tokens, parts.across * rows);
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
  /// Stages of a part of the columns, at least: with fewer, the sums of the parts would be what takes the time.
  static constexpr Index least_stages = 4;

  /// How blocks share out a weight: rows among `across`, columns among `count` parts of so many stages.
  struct Parts {
    Index across, of_part, count;
  };
  static Parts parts_of(Tensor<const bf16, 3> weight) {
    const Index across = ceil_div(weight.shape[1], rows);
    const Index stages = std::max<Index>(1, ceil_div(weight.cols(), depth));
    const Index most = std::max<Index>(1, std::min(blocks / (across * weight.shape[0]), stages / least_stages));
    const Index of_part = ceil_div(stages, most);
    return {across, of_part, ceil_div(stages, of_part)};
  }

  template <class Traits>
  static void launch(Context<cuda>& ctx, Tensor<const bf16, 3> x, Tensor<const bf16, 3> weight, Tensor<bf16, 3> y,
                     Matrix<const bf16> residual, Vector<const float> bias) {
    const Index heads = weight.shape[0];
    const auto [across, of_part, parts] = parts_of(weight);
    const bool whole = in_vectors(y) && (!residual || in_vectors(residual)) && aligned(bias, vector_width<float>);
    const LinearResult result{y, residual, bias, whole};
    ArenaScope scope(ctx.arena());
    const Tensor<float, 4> partial = scratch(ctx, weight, y.rows());

    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(parts), static_cast<unsigned>(heads));
    // Where each has a multiprocessor of its own, two must not share one because they began while others were busy.
    const std::size_t alone = ctx.most_shared() / 2 + 1;
    const bool spread = across * parts * heads <= ctx.multiprocessors();
    const Overlap overlap = overlap_for(y.rows());
    kernel::launch(ctx, overlap, "linear", linear_tile_kernel<Traits>, grid, Traits::threads,
                   spread ? std::max(alone, Traits::shared_bytes) : Traits::shared_bytes, x, weight,
                   static_cast<int>(of_part), result, partial);
    if (parts == 1) return;
    using Threads = std::integral_constant<int, 128>;
    const dim3 of_join(blocks_for(y.cols(), Threads::value * LinearResult::width), static_cast<unsigned>(y.rows()),
                       static_cast<unsigned>(heads));
    kernel::launch(ctx, overlap, "linear: join", linear_join_kernel<Threads>, of_join, Threads::value, 0,
                   Tensor<const float, 4>(partial), result);
  }
};

}  // namespace zamba::kernel
