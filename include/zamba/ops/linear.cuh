// SPDX-License-Identifier: MIT
// linear on CUDA, forward; equations and shapes in linear.hpp.
//
//   1 to 4 tokens      a block takes four rows of the weight, 16 bytes a lane; its threads share the columns. Of short
//                      rows a warp takes four. In float and double it is for 1 to 8 tokens
//   5 to 64, bf16      tensor cores: a block takes 128 rows of the weight, which pass through shared memory in stages
//                      of 64 columns, several of them on their way at any time. Where the rows make too few blocks for
//                      a GPU, blocks share the columns too, and a second kernel adds their sums
//   more               cuBLAS, all heads in one call; also where rows are no multiples of 16 bytes
//
// The first two read the weight once, bound by memory bandwidth.
//
// With few tokens the first pieces of the weight are read while what was queued before still runs, see launch.cuh: a
// kernel that is queued just before must not write the weight.
//
// Numeric contract: products and sums in compute_t, rounded once when written, except that with cuBLAS a bias joins in
// a second rounding. With each of the first two ways a row of y is the same whichever rows it is computed with: the
// order of a sum depends on the extents of the weight only. With cuBLAS it is what that chooses for these extents. A
// rerun is bit-equal.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/detail/elementwise.cuh>
#include <zamba/detail/launch.cuh>
#include <zamba/detail/tensor_core.cuh>
#include <zamba/detail/wide_load.cuh>
#include <zamba/ops/linear.hpp>

namespace zamba {

namespace detail {

/// Weights of A_ for up to Tokens_ tokens: Team_ warps together take four rows, whose columns they share.
template <class A_, int Tokens_, int Team_>
struct LinearTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int rows = 4, tokens = Tokens_, team = Team_;
  static constexpr int threads = 256, warps = threads / 32, teams = warps / team;
  static constexpr int width = wide<A>;  // elements of one load
  // Loads of each row on their way before the first is used; the order of a sum does not depend on it.
  static constexpr int ahead = tokens <= 4 ? 2 : 1;
  // Blocks of a multiprocessor, at least, as far as registers allow it without spills.
  static constexpr int blocks = std::is_same_v<A, double> ? 1 : tokens == 1 ? 4 : tokens == 2 ? 3 : 2;
};

/// Blocks across: rows of the weight; down: heads. Wide: rows begin at multiples of 16 bytes and are whole numbers of
/// them.
template <class Traits, bool Wide>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    linear_kernel(Tensor<const typename Traits::A, 3> x_heads, Tensor<const typename Traits::A, 3> weight_heads,
                  Tensor<typename Traits::A, 3> y_heads, Matrix<const typename Traits::A> residual,
                  Vector<const typename Traits::F> bias) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  let_next_begin();
  const Index head = blockIdx.y;
  const auto x = head_of(x_heads, head), weight = weight_heads[head];
  const auto y = head_of(y_heads, head);
  constexpr int rows = Traits::rows, tokens = Traits::tokens, width = Wide ? Traits::width : 1;
  constexpr int team_threads = 32 * Traits::team, values = rows * tokens;  // a team's sums
  __shared__ F of_warps[Traits::teams][Traits::team][values];
  const int warp = threadIdx.x / 32, team = warp / Traits::team;
  const Index first = Index{blockIdx.x} * Traits::teams * rows, first_of_team = first + team * rows;
  const A* const w = weight.data + first_of_team * weight.stride[0];
  int at[rows];  // where a row begins, the last one's place for those beyond it
  const A* in[tokens];
#pragma unroll
  for (int r = 0; r < rows; ++r)
    at[r] = static_cast<int>((::min(first_of_team + r, weight.rows() - 1) - first_of_team) * weight.stride[0]);
#pragma unroll
  for (int s = 0; s < tokens; ++s) in[s] = x.data + ::min(Index{s}, x.rows() - 1) * x.stride[0];

  constexpr int step = team_threads * width, ahead = Traits::ahead;
  const int cols = static_cast<int>(x.cols());
  int first_k = static_cast<int>(threadIdx.x) % team_threads * width;
  Piece<width, A> pieces[ahead][rows];
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < ahead; ++i)
#pragma unroll
      for (int r = 0; r < rows; ++r)
        if (first_k + i * step < cols) pieces[i][r] = piece_once_at<width>(w + (at[r] + first_k + i * step));
  };
  load();
  wait_for_previous();
  F sum[rows][tokens] = {};
  while (first_k < cols) {
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int k = first_k + i * step;
      if (k >= cols) break;
      F weights[rows][width];
#pragma unroll
      for (int r = 0; r < rows; ++r) pieces[i][r].values(weights[r]);
#pragma unroll
      for (int s = 0; s < tokens; ++s) {
        F inputs[width];
        piece_at<width>(in[s] + k).values(inputs);
#pragma unroll
        for (int r = 0; r < rows; ++r)
#pragma unroll
          for (int j = 0; j < width; ++j) sum[r][s] += weights[r][j] * inputs[j];
      }
    }
    first_k += ahead * step;
    load();
  }
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int s = 0; s < tokens; ++s) {
      for (int distance = 16; distance > 0; distance /= 2)
        sum[r][s] += __shfl_xor_sync(0xffffffffu, sum[r][s], distance);
      if (threadIdx.x % 32 == 0) of_warps[team][warp % Traits::team][r * tokens + s] = sum[r][s];
    }
  __syncthreads();
  const Index out = first + threadIdx.x / tokens, token = threadIdx.x % tokens;
  if (threadIdx.x >= Traits::teams * values || out >= weight.rows() || token >= y.rows()) return;
  F total = bias ? bias[out] : F(0);
#pragma unroll
  for (int part = 0; part < Traits::team; ++part) total += of_warps[threadIdx.x / values][part][threadIdx.x % values];
  y(token, out) = A(residual ? total + F(residual(token, out)) : total);
}

/// Products of bf16 for up to Tokens_ tokens, whose sums a block keeps in registers: of 128 rows of the weight, each in
/// two parts.
///
/// A stage is 64 columns, whole lines of 128 bytes, which a warp copies for four rows at a time: memory is read at its
/// full rate only so. Four warps multiply 32 rows each of half of the columns, four others the other half. A fragment
/// of a takes neighbouring columns 2t, 2t + 1 and 2t + 8, 2t + 9 of lane t; the order of columns within a sum is free
/// as long as a and b agree, so they are columns 8t to 8t + 3 of memory here, the next product taking 8t + 4 to 8t + 7:
/// a lane reads 16 bytes at once. Odd rows of a stage have its halves exchanged, so that eight lanes that read two rows
/// meet no bank twice.
template <int Tokens_, int Stages_>
struct LinearTileTraits {
  static constexpr int tokens = Tokens_, stages = Stages_;
  static constexpr int rows = 128, depth = 64;
  static constexpr int row_warps = 4, halves = 2, threads = row_warps * halves * 32;
  static constexpr int row_tiles = rows / row_warps / 16, token_tiles = tokens / 8;  // fragments of a warp
  static constexpr int pieces = depth / wide<bf16>;                                  // of a row in a stage
  __device__ static constexpr int place(int row, int piece) { return row * pieces + (piece ^ (row % 2 * 4)); }
  static constexpr int weight_pieces = rows * pieces, token_pieces = tokens * pieces;
  static constexpr int weight_copies = weight_pieces / threads;
  static constexpr int token_copies = (token_pieces + threads - 1) / threads;
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

/// Blocks across: rows of the weight; down: parts of the columns, of so many stages each; deep: heads. With one part
/// the sums go to `result`, else to `partial` (parts, heads, tokens, rows of whole blocks).
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 2)
    linear_tile_kernel(Tensor<const bf16, 3> x, Tensor<const bf16, 3> weight, int stages_of_part, LinearResult result,
                       Tensor<float, 4> partial) {
  extern __shared__ uint4 linear_stages[];
  let_next_begin();
  constexpr int stages = Traits::stages, tokens = Traits::tokens, token_tiles = Traits::token_tiles;
  uint4* const weight_stages = linear_stages;
  uint4* const token_stages = linear_stages + stages * Traits::weight_pieces;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int row_warp = thread / 32 % Traits::row_warps, half = thread / 32 / Traits::row_warps;
  const Index head = blockIdx.z, first_row = Index{blockIdx.x} * Traits::rows;
  const Index first_col = Index{blockIdx.y} * stages_of_part * Traits::depth;
  const int cols = static_cast<int>(::min(x.cols() - first_col, Index{stages_of_part} * Traits::depth));
  const int count = (cols + Traits::depth - 1) / Traits::depth, n = static_cast<int>(x.rows());

  // This thread copies a piece of every `copy_rows`-th row, which is in the same place of each.
  constexpr int copy_rows = Traits::threads / Traits::pieces;
  static_assert(copy_rows % 2 == 0, "zamba: what a thread copies lies in rows of one parity");
  const int piece = thread % Traits::pieces, copy_row = thread / Traits::pieces, col = piece * wide<bf16>;
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
        copy_async_ahead(weight_stages + slot * Traits::weight_pieces + i * Traits::threads + copy_to,
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
  wait_for_previous();
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
          mma_16x8x16(sums[m][tile + i], {a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y}, {b[i].x, b[i].y});
#pragma unroll
      for (int m = 0; m < Traits::row_tiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          mma_16x8x16(sums[m][tile + i], {a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w}, {b[i].z, b[i].w});
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
    const float* const from = tile_sums + token * Traits::row_stride + at;
    const auto low = piece_at<4>(from), high = piece_at<4>(from + 4);
    if (partial) {
      float* const to = &partial(blockIdx.y, head, token, first_row + at);
      store_piece(to, low), store_piece(to + 4, high);
    } else {
      float values[width], rest[4];
      high.values(rest);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[4 + i] = rest[i];
      low.values(rest);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = rest[i];
      result.write(head, token, first_row + at, values);
    }
  }
}

/// Adds the parts in order. Blocks across: outputs; down: tokens; deep: heads.
template <class Threads>
__global__ void __launch_bounds__(Threads::value)
    linear_join_kernel(Tensor<const float, 4> partial, LinearResult result) {
  constexpr int width = LinearResult::width;
  let_next_begin();
  wait_for_previous();
  const Index head = blockIdx.z, token = blockIdx.y;
  const Index out = (Index{blockIdx.x} * Threads::value + threadIdx.x) * width;
  if (out >= result.y.cols()) return;
  float sum[width] = {};
#pragma unroll 4
  for (Index part = 0; part < partial.shape[0]; ++part) {
    const float* const from = &partial(part, head, token, out);
    float values[2][wide<float>];
    piece_at<wide<float>>(from).values(values[0]);
    piece_at<wide<float>>(from + wide<float>).values(values[1]);
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += values[i / wide<float>][i % wide<float>];
  }
  result.write(head, token, out, sum);
}

template <class A>
struct AddBias {
  Vector<const compute_t<A>> bias;
  Matrix<A> y;

  __device__ void operator()(Index t, Index c) const { y(t, c) = A(compute_t<A>(y(t, c)) + bias[c]); }
};

}  // namespace detail

template <>
struct Linear<cuda> {
  template <class A, class W, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const W> weight, Matrix<A> y,
                      Matrix<const A> residual, Vector<const F> bias) {
    static_assert(std::is_same_v<A, W>, "zamba: on CUDA activations are of the type of the weights");
    if (y.rows() == 0 || y.cols() == 0) return;
    any_number<A>(ctx, split_heads(x, 1), one_head(weight), split_heads(y, 1), residual, bias);
  }

  template <class A, class W>
  static void forward_heads(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const W, 3> weight, Tensor<A, 3> y) {
    static_assert(std::is_same_v<A, W>, "zamba: on CUDA activations are of the type of the weights");
    if (y.size() == 0) return;
    any_number<A>(ctx, x, weight, y, {}, Vector<const compute_t<A>>{});
  }

  template <class Ctx, class A, class F>
  static void scratch(Ctx& ctx, Matrix<const A> x, Matrix<const A> weight, Matrix<A> y, Matrix<const A>,
                      Vector<const F>) {
    scratch(ctx, split_heads(x, 1), one_head(weight), split_heads(y, 1));
  }
  template <class Ctx, class A>
  static void scratch(Ctx& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y) {
    if constexpr (std::is_same_v<A, bf16>)
      if (y.rows() <= tile_tokens && detail::in_pieces(x) && detail::in_pieces(weight))
        tile_scratch<detail::LinearTileTraits<tile_tokens, 4>>(ctx, weight, y);
  }

 private:
  /// Up to so many tokens the kernels here read the weight once, the first in any type, the second on tensor cores.
  template <class A>
  static constexpr Index few_tokens = std::is_same_v<A, bf16> ? 4 : 8;
  static constexpr Index tile_tokens = 64;
  /// Blocks of the second for which columns are shared out: about one for each multiprocessor. A constant, so that sums
  /// are the same on all GPUs.
  static constexpr Index tile_blocks = 132;
  /// Stages of a part of the columns, at least: with fewer, the sums of the parts would be what takes the time.
  static constexpr Index least_stages = 4;

  /// y (n, heads, out); with a residual or a bias it is one head.
  template <class A, class F>
  static void any_number(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                         Matrix<const A> residual, Vector<const F> bias) {
    if (y.rows() <= few_tokens<A>) return few<A>(ctx, x, weight, y, residual, bias);
    if constexpr (std::is_same_v<A, bf16>)
      if (y.rows() <= tile_tokens && detail::in_pieces(x) && detail::in_pieces(weight))
        return tiles(ctx, x, weight, y, residual, bias);
    many<A>(ctx, x, weight, y, residual, bias);
  }

  /// (out, in) as (1, out, in).
  template <class A>
  static Tensor<const A, 3> one_head(Matrix<const A> weight) {
    Tensor<const A, 3> heads(weight.data, 1, weight.rows(), weight.cols());
    heads.stride[1] = weight.stride[0];
    return heads;
  }

  template <class A, class F>
  static void few(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                  Matrix<const A> residual, Vector<const F> bias) {
    if (y.rows() == 1)
      launch<A, 1>(ctx, x, weight, y, residual, bias);
    else if (y.rows() == 2)
      launch<A, 2>(ctx, x, weight, y, residual, bias);
    else if (y.rows() <= 4)
      launch<A, 4>(ctx, x, weight, y, residual, bias);
    else if constexpr (few_tokens<A> > 4)
      launch<A, 8>(ctx, x, weight, y, residual, bias);
  }

  /// Short rows are for a warp each four, long ones for a block.
  template <class A, int Tokens, class F>
  static void launch(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                     Matrix<const A> residual, Vector<const F> bias) {
    if (x.cols() <= 2 * 32 * detail::wide<A>)
      launch_teams<detail::LinearTraits<A, Tokens, 1>>(ctx, x, weight, y, residual, bias);
    else
      launch_teams<detail::LinearTraits<A, Tokens, 8>>(ctx, x, weight, y, residual, bias);
  }

  template <class Traits, class A, class F>
  static void launch_teams(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                           Matrix<const A> residual, Vector<const F> bias) {
    constexpr Index rows = Traits::rows * Traits::teams;
    const dim3 grid(static_cast<unsigned>((weight.shape[1] + rows - 1) / rows), static_cast<unsigned>(weight.shape[0]));
    const bool wide = detail::in_pieces(x) && detail::in_pieces(weight);
    detail::launch(ctx, detail::overlap_for(y.rows()), "linear",
                   wide ? detail::linear_kernel<Traits, true> : detail::linear_kernel<Traits, false>, grid,
                   Traits::threads, 0, x, weight, y, residual, bias);
  }

  static void tiles(Context<cuda>& ctx, Tensor<const bf16, 3> x, Tensor<const bf16, 3> weight, Tensor<bf16, 3> y,
                    Matrix<const bf16> residual, Vector<const float> bias) {
    if (y.rows() <= 16)
      launch_tiles<detail::LinearTileTraits<16, 6>>(ctx, x, weight, y, residual, bias);
    else if (y.rows() <= 32)
      launch_tiles<detail::LinearTileTraits<32, 5>>(ctx, x, weight, y, residual, bias);
    else
      launch_tiles<detail::LinearTileTraits<64, 4>>(ctx, x, weight, y, residual, bias);
  }

  /// How blocks share out a weight: rows among `across`, columns among `count` parts of so many stages.
  struct TileParts {
    Index across, of_part, count;
  };
  template <class Traits>
  static TileParts tile_parts(Tensor<const bf16, 3> weight) {
    const Index across = (weight.shape[1] + Traits::rows - 1) / Traits::rows;
    const Index stages = std::max<Index>(1, (weight.cols() + Traits::depth - 1) / Traits::depth);
    const Index most = std::max<Index>(1, std::min(tile_blocks / (across * weight.shape[0]), stages / least_stages));
    const Index of_part = (stages + most - 1) / most;
    return {across, of_part, (stages + of_part - 1) / of_part};
  }

  /// The sums of the parts, where there are several.
  template <class Traits, class Ctx>
  static Tensor<float, 4> tile_scratch(Ctx& ctx, Tensor<const bf16, 3> weight, Tensor<bf16, 3> y) {
    const TileParts parts = tile_parts<Traits>(weight);
    if (parts.count == 1) return {};
    return ctx.arena().template tensor<float>(parts.count, weight.shape[0], y.rows(), parts.across * Traits::rows);
  }

  template <class Traits>
  static void launch_tiles(Context<cuda>& ctx, Tensor<const bf16, 3> x, Tensor<const bf16, 3> weight, Tensor<bf16, 3> y,
                           Matrix<const bf16> residual, Vector<const float> bias) {
    const Index heads = weight.shape[0];
    const auto [across, of_part, parts] = tile_parts<Traits>(weight);
    const bool whole = detail::in_pieces(y) && (!residual || detail::in_pieces(residual)) &&
                       detail::aligned(bias, detail::wide<float>);
    const detail::LinearResult result{y, residual, bias, whole};
    ArenaScope scope(ctx.arena());
    const Tensor<float, 4> partial = tile_scratch<Traits>(ctx, weight, y);

    const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(parts), static_cast<unsigned>(heads));
    // Where each has a multiprocessor of its own, two must not share one because they began while others were busy.
    const std::size_t alone = ctx.most_shared() / 2 + 1;
    const bool spread = across * parts * heads <= ctx.multiprocessors();
    const detail::Overlap overlap = detail::overlap_for(y.rows());
    detail::launch(ctx, overlap, "linear", detail::linear_tile_kernel<Traits>, grid, Traits::threads,
                   spread ? std::max(alone, Traits::shared_bytes) : Traits::shared_bytes, x, weight,
                   static_cast<int>(of_part), result, partial);
    if (parts == 1) return;
    using Threads = std::integral_constant<int, 128>;
    const dim3 of_join(detail::blocks_for(y.cols(), Threads::value * detail::LinearResult::width),
                       static_cast<unsigned>(y.rows()), static_cast<unsigned>(heads));
    detail::launch(ctx, overlap, "linear: join", detail::linear_join_kernel<Threads>, of_join, Threads::value, 0,
                   Tensor<const float, 4>(partial), result);
  }

  template <class A>
  static constexpr cudaDataType_t type_of = std::is_same_v<A, double>  ? CUDA_R_64F
                                            : std::is_same_v<A, float> ? CUDA_R_32F
                                                                       : CUDA_R_16BF;

  /// In cuBLAS's column-major terms: y^T (out, n) = W (out, in) x^T (in, n), for every head.
  template <class A, class F>
  static void many(Context<cuda>& ctx, Tensor<const A, 3> x, Tensor<const A, 3> weight, Tensor<A, 3> y,
                   Matrix<const A> residual, Vector<const F> bias) {
    const Index heads = weight.shape[0], out = weight.shape[1];
    if (residual && residual.data != y.data)
      detail::check_cuda(cudaMemcpy2DAsync(y.data, static_cast<std::size_t>(y.stride[0]) * sizeof(A), residual.data,
                                           static_cast<std::size_t>(residual.stride[0]) * sizeof(A),
                                           static_cast<std::size_t>(out) * sizeof(A),
                                           static_cast<std::size_t>(y.rows()), cudaMemcpyDeviceToDevice, ctx.stream()),
                         "linear: residual");
    const F one = 1, of_residual = residual ? 1 : 0;
    constexpr auto compute = std::is_same_v<F, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    if (heads == 1)
      detail::check_cublas(cublasGemmEx_64(ctx.blas(), CUBLAS_OP_T, CUBLAS_OP_N, out, y.rows(), x.cols(), &one,
                                           weight.data, type_of<A>, weight.stride[1], x.data, type_of<A>, x.stride[0],
                                           &of_residual, y.data, type_of<A>, y.stride[0], compute, CUBLAS_GEMM_DEFAULT),
                           "linear: cublasGemmEx");
    else
      detail::check_cublas(
          cublasGemmStridedBatchedEx_64(ctx.blas(), CUBLAS_OP_T, CUBLAS_OP_N, out, y.rows(), x.cols(), &one,
                                        weight.data, type_of<A>, weight.stride[1], weight.stride[0], x.data, type_of<A>,
                                        x.stride[0], x.stride[1], &of_residual, y.data, type_of<A>, y.stride[0],
                                        y.stride[1], heads, compute, CUBLAS_GEMM_DEFAULT),
          "linear: cublasGemmStridedBatchedEx");
    if (bias) detail::for_elements(ctx, y.rows(), out, detail::AddBias<A>{bias, head_of(y, 0)}, "linear: bias");
  }
};

}  // namespace zamba
