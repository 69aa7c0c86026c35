// SPDX-License-Identifier: MIT
// Fragment: the accumulators of a product on tensor cores as the registers of a warp hold them; and the online softmax
// over their rows (Milakov and Gimelshein, arXiv 1805.02867), as FlashAttention runs it between its two products.
//
// mma.m16n8k16 (mma.cuh) gives a warp tiles of 16 x 8; wgmma.m64nNk16 (sm90.cuh) gives each of a warpgroup's four warps
// 16 rows of such tiles. With g = lane / 4 and t = lane % 4, a lane has of tile (m, n), in this order:
//   (row 16m + g, column 8n + 2t), (the same row, column 8n + 2t + 1), and the two of row 16m + 8 + g
// So it has rows 8r + g, r = 0, 1, ..., and the four lanes of a quad share each of them.
#pragma once

#include <zamba/device.hpp>
#include <zamba/kernel/math.cuh>
#include <zamba/number.hpp>

namespace zamba::kernel {

/// The greatest, or the sum, over the four lanes of a quad.
__device__ inline float quad_max(float x) {
  x = ::max(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return ::max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// A number for each of a lane's rows, 8r + g.
template <int Rows>
struct RowValues {
  float row[Rows];

  __device__ float& operator[](int r) { return row[r]; }
  __device__ const float& operator[](int r) const { return row[r]; }

  static __device__ __forceinline__ RowValues filled(float x) {
    RowValues result;
#pragma unroll
    for (int r = 0; r < Rows; ++r) result[r] = x;
    return result;
  }
  __device__ __forceinline__ RowValues reciprocal() const {
    RowValues result;
#pragma unroll
    for (int r = 0; r < Rows; ++r) result[r] = 1 / row[r];
    return result;
  }
};

/// The first operand of a product, (16 RowTiles x 16 Steps) in bf16: for each tile of 16 x 16 the registers a of
/// mma.cuh.
template <int RowTiles, int Steps>
struct OperandFragment {
  unsigned tile[RowTiles][Steps][4];
};

/// (16 RowTiles x 8 ColumnTiles) in float.
template <int RowTiles, int ColumnTiles>
struct Fragment {
  static constexpr int rows = 2 * RowTiles, columns = 2 * ColumnTiles;  // of a lane
  float sums[4 * RowTiles * ColumnTiles];

  /// The lane's first row and column; its rows are 8 apart, its columns 1 and 7 in turn.
  static __device__ int first_row() { return threadIdx.x % 32 / 4; }
  static __device__ int first_column() { return threadIdx.x % 4 * 2; }

  /// Tile (m, n), as products take it.
  __device__ __forceinline__ float (&tile(int m, int n))[4] {
    return reinterpret_cast<float(&)[4]>(sums[4 * (m * ColumnTiles + n)]);
  }
  /// The lane's element of its row r and column c.
  __device__ __forceinline__ float& at(int r, int c) {
    return sums[4 * (r / 2 * ColumnTiles + c / 2) + 2 * (r % 2) + c % 2];
  }
  __device__ __forceinline__ float at(int r, int c) const { return const_cast<Fragment*>(this)->at(r, c); }

  /// f(element, row, column) for all of the lane, counted from its first row and column.
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int c = 0; c < columns; ++c) f(at(r, c), 8 * r, 8 * (c / 2) + c % 2);
  }

  /// Causal mask: elements of columns after row + diagonal become -infinity.
  __device__ __forceinline__ void mask_after(int diagonal) {
    const int reach = diagonal + first_row() - first_column();
    for_each([&](float& x, int row, int column) {
      if (column > reach + row) x = -INFINITY;
    });
  }

  /// The greatest of each row and of `least`, in all lanes that share the row.
  __device__ __forceinline__ RowValues<rows> row_max(const RowValues<rows>& least) const {
    RowValues<rows> most = least;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int c = 0; c < columns; c += 2) most[r] = ::max(most[r], ::max(at(r, c), at(r, c + 1)));
      most[r] = quad_max(most[r]);
    }
    return most;
  }

  /// This lane's share of the sum of each row.
  __device__ __forceinline__ RowValues<rows> row_sum() const {
    RowValues<rows> sum;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      sum[r] = 0;
#pragma unroll
      for (int c = 0; c < columns; c += 2) sum[r] += at(r, c) + at(r, c + 1);
    }
    return sum;
  }

  /// x becomes 2^(scale (x - origin of its row)).
  __device__ __forceinline__ void exp2_minus(const RowValues<rows>& origin, float scale) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const float shift = -origin[r] * scale;
#pragma unroll
      for (int c = 0; c < columns; ++c) at(r, c) = exp2_approximate(::fmaf(at(r, c), scale, shift));
    }
  }

  /// Every row times its factor. Most often no row has a greater score than before, and nothing is to do.
  __device__ __forceinline__ void scale_rows(const RowValues<rows>& factor) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < rows; ++r) any |= factor[r] != 1;
    if (!__any_sync(0xffffffffu, any)) return;
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int c = 0; c < columns; ++c) at(r, c) *= factor[r];
  }

  /// Rounded to bf16, as the first operand of the next product.
  __device__ __forceinline__ OperandFragment<RowTiles, ColumnTiles / 2> operand() const {
    OperandFragment<RowTiles, ColumnTiles / 2> result;
#pragma unroll
    for (int m = 0; m < RowTiles; ++m)
#pragma unroll
      for (int k = 0; k < ColumnTiles / 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 2 * m + i % 2, c = 4 * k + i / 2 * 2;
          result.tile[m][k][i] = pack_bf16(at(r, c), at(r, c + 1));
        }
    return result;
  }

  /// Writes all of it, rounded to bf16, to a matrix whose rows lie `stride` apart.
  __device__ __forceinline__ void store(bf16* to, int stride) const {
    unsigned* words = reinterpret_cast<unsigned*>(to + first_row() * stride + first_column());
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int c = 0; c < columns; c += 2) words[4 * r * stride + 2 * c] = pack_bf16(at(r, c), at(r, c + 1));
  }

  /// Writes every row times its factor, rounded to bf16, to (rows, columns) whose rows lie `stride` apart; `columns` is
  /// even, what lies beyond them is not written.
  __device__ __forceinline__ void store(bf16* to, Index stride, int to_rows, int to_columns,
                                        const RowValues<rows>& factor) const {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int row = 8 * r + first_row();
      if (row >= to_rows) continue;
#pragma unroll
      for (int c = 0; c < columns; c += 2)
        if (const int column = 4 * c + first_column(); column < to_columns)
          *reinterpret_cast<unsigned*>(to + row * stride + column) =
              pack_bf16(at(r, c) * factor[r], at(r, c + 1) * factor[r]);
    }
  }
};

/// The state of an online softmax of one row: the greatest score m so far, and the sum of exp(score - m).
template <class F>
struct SoftmaxRow {
  F max = -INFINITY, sum = 0;

  /// Moves to a maximum that is not less. Returns the factor, exp(max - next), of all that was summed before, which is
  /// 0 where nothing was.
  template <class Exp>
  __device__ __forceinline__ F raise(F next, Exp&& exp) {
    const F rescale = exp(max - next);
    max = next;
    sum *= rescale;
    return rescale;
  }
};

/// The online softmax of a fragment's rows. For each tile of scores S, scale being theirs times log2(e):
///   m' = max(m, row_max(S)),   P = exp2(scale (S - m')),   sum = sum * rescale + row_sum(P),
///   rescale = exp2(scale (m - m')), which the caller's O takes too:   O = O * rescale + P V
template <int Rows>
struct OnlineSoftmax {
  SoftmaxRow<float> row[Rows];  // sum: this lane's share

  __device__ __forceinline__ RowValues<Rows> max() const {
    RowValues<Rows> result;
#pragma unroll
    for (int r = 0; r < Rows; ++r) result[r] = row[r].max;
    return result;
  }
  /// The sums of whole rows.
  __device__ __forceinline__ RowValues<Rows> total() const {
    RowValues<Rows> result;
#pragma unroll
    for (int r = 0; r < Rows; ++r) result[r] = quad_sum(row[r].sum);
    return result;
  }

  /// S becomes P; returns rescale. next: m', where other warps have columns of these rows too.
  template <class Scores>
  __device__ __forceinline__ RowValues<Rows> update(Scores& s, const RowValues<Rows>& next, float scale) {
    RowValues<Rows> rescale;
#pragma unroll
    for (int r = 0; r < Rows; ++r)
      rescale[r] = row[r].raise(next[r], [&](float x) { return exp2_approximate(x * scale); });
    s.exp2_minus(next, scale);
    const RowValues<Rows> of_tile = s.row_sum();
#pragma unroll
    for (int r = 0; r < Rows; ++r) row[r].sum += of_tile[r];
    return rescale;
  }
  template <class Scores>
  __device__ __forceinline__ RowValues<Rows> update(Scores& s, float scale) {
    return update(s, s.row_max(max()), scale);
  }
};

}  // namespace zamba::kernel
