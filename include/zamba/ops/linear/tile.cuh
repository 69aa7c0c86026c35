// SPDX-License-Identifier: MIT
// What a block multiplies for few_tokens.cuh: a tile of the weight and the tokens, in stages of shared memory, by
// asynchronous copies (cp.async) and products on tensor cores (mma.m16n8k16).
#pragma once

#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Rows of the weight that a block takes, and columns of a stage: whole lines of 128 bytes, which a warp copies for
/// four rows at a time; memory is read at its full rate only so.
struct LinearTile {
  static constexpr int rows = 128, depth = 64;
  static constexpr int pieces = depth / vector_width<bf16>;  // of 16 bytes, of a row in a stage

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
        col_(threadIdx.x % Traits::pieces * vector_width<bf16>),
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

}  // namespace zamba::kernel
