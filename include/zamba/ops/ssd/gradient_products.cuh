// SPDX-License-Identifier: MIT
// Products of ssd's chunk gradient (chunk_gradient.cuh), where each of four warps has 16 rows of tokens: gradients of
// u, D and delta (SsdInputGradient), and of B and C (SsdProjectionGradient). Fragments are a, b and c of mma.cuh.
#pragma once

#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd/gradient_tile.cuh>
#include <zamba/ops/ssd/tile.cuh>

namespace zamba::kernel {

/// Each of the lane's rows of x times the same row of a (16 x 16 Steps) as it lies in an operand, summed over columns.
template <int Steps>
__device__ __forceinline__ RowValues<2> row_products(const Fragment<1, 2 * Steps>& x,
                                                     const OperandFragment<1, Steps>& a) {
  RowValues<2> sum = RowValues<2>::filled(0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < 2 * Steps; ++j) {
      const unsigned pair = a.tile[0][j / 2][j % 2 * 2 + r];
      sum[r] = ::fmaf(x.at(r, 2 * j), __uint_as_float(pair << 16), sum[r]);
      sum[r] = ::fmaf(x.at(r, 2 * j + 1), __uint_as_float(pair & 0xffff0000u), sum[r]);
    }
    sum[r] = quad_sum(sum[r]);
  }
  return sum;
}

/// Eight columns summed over the lanes of equal t (fragment.cuh): the lane of g gets the sum of column g.
__device__ __forceinline__ float column_sums(float (&x)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & 4 * half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float away = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(0xffffffffu, away, 4 * half);
    }
  }
  return x[0];
}

/// c (16 x 64) += a b^T, b's rows being rows first ... first + 63 of a tile.
template <int Width, int Steps>
__device__ __forceinline__ void multiply_transposed(Fragment<1, 8>& c, const OperandFragment<1, Steps>& a,
                                                    const SsdSwizzled<Width>& tile, int first) {
  const auto address = tile.ldmatrix_by_rows(0, 0);
#pragma unroll
  for (int k = 0; k < 16 * Steps; k += 16)
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      unsigned b[4];  // two b (16 columns of the tile x 8 rows), from rows 8 j and 8 j + 8 on
      ldmatrix(b, address.address(first + 8 * j, k));
      mma_m16n8k16(c.tile(0, j), a.tile[0][k / 16], {b[0], b[1]});
      mma_m16n8k16(c.tile(0, j + 1), a.tile[0][k / 16], {b[2], b[3]});
    }
}

/// c (16 x Width) += a b, b being 16 rows of a tile from `first` on.
template <int Width>
__device__ __forceinline__ void multiply(Fragment<1, Width / 8>& c, const unsigned (&a)[4],
                                         const SsdSwizzled<Width>& by_columns, int first) {
#pragma unroll
  for (int j = 0; j < Width / 8; j += 2) {
    unsigned b[4];  // two b (16 rows x 8 columns), from columns 8 j and 8 j + 8 on
    ldmatrix_transposed(b, by_columns.address(first, 8 * j));
    mma_m16n8k16(c.tile(0, j), a, {b[0], b[1]});
    mma_m16n8k16(c.tile(0, j + 1), a, {b[2], b[3]});
  }
}

/// 16 rows of a tile, from `first` on, columns column ... column + 16 Steps - 1, as first operand.
template <int Steps, int Width>
__device__ __forceinline__ OperandFragment<1, Steps> load_rows(const SsdSwizzled<Width>& tile, int first, int column) {
  OperandFragment<1, Steps> a;
  const auto address = tile.ldmatrix_by_columns(first, 0);
#pragma unroll
  for (int k = 0; k < Steps; ++k) ldmatrix(a.tile[0][k], address.address(0, column + 16 * k));
  return a;
}

/// Gradients of u, D and delta of 16 tokens j of a chunk, from `first` on, by a warp; and of C B^T over all heads.
template <class Traits>
class SsdInputGradient {
 public:
  using Shared = SsdGradientShared<Traits>;

  __device__ SsdInputGradient(const Shared& shared, int first)
      : shared_(shared), first_(first), g_(CB_.first_row()), t_(CB_.first_column()), CB_{}, d_CB_{} {
    multiply_transposed(CB_, load_rows<N / 16>(shared.B(), first, 0), shared.C(), 0);
  }

  /// A head, or a part of it. The gradient of u remains where the warp gathers it.
  __device__ void differentiate(int turn, SsdTokens& of, float D) {
    const Rows rows{{of.dt[first_ + g_], of.dt[first_ + g_ + 8]}, {of.l[first_ + g_], of.l[first_ + g_ + 8]}};
    const auto u = load_rows<P / 16>(shared_.u(turn), first_, 0);
    Fragment<1, P / 8> d_u{};  // (16 tokens x P)
    Sums sums{};
    through_state_after(turn, of.l[Q - 1], rows, u, d_u, sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (32 * half + 32 <= first_) continue;
      if (32 * half >= first_ + 16)
        within_chunk<false>(half, turn, of, rows, D, u, d_u, sums);
      else
        within_chunk<true>(half, turn, of, rows, D, u, d_u, sums);
    }
    __syncwarp();  // the columns' sums are there
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int j = first_ + g_ + 8 * r;
      const float later = quad_sum(sums.later[r]), own = quad_sum(sums.own[r]), d_y_u = quad_sum(sums.d_y_u[r]);
      if (t_ == 0) {
        of.within[first_ / 16][j] -= rows.dt[r] * later;
        of.through_g[j] += rows.dt[r] * sums.through_g[r];
        of.d_v_u[j] += sums.through_g[r] + (later + own);
        of.d_y_u[j] += d_y_u;
      }
    }
    gather(shared_.d_u(), d_u);
    __syncwarp();
  }

  /// Writes the gradient of u of `count` tokens of the chunk, from the chunk's first at `to` on, in whole pieces of 16
  /// bytes.
  __device__ void store(int count, int channels, bf16* to, Index stride) const {
    constexpr int pieces = P / 8;
    const int lane = threadIdx.x % 32, column = lane % pieces * 8;
#pragma unroll
    for (int row = first_ + lane / pieces; row < first_ + 16; row += 32 / pieces)
      if (row < count && column < channels)
        *reinterpret_cast<uint4*>(to + row * stride + column) =
            *reinterpret_cast<const uint4*>(shared_.d_u().in_tile(row, column).address(0, 0));
  }

  /// Shares the gradient of C B^T, of all heads.
  __device__ void share() const { gather(shared_.d_CB(), d_CB_); }

 private:
  static constexpr int N = Traits::N, P = Traits::P, Q = Traits::Q;

  /// Of the lane's two tokens j.
  struct Rows {
    float dt[2], l[2];
  };
  struct Sums {
    float through_g[2];      // f (B g) . u
    float later[2], own[2];  // of M (dy u^T), of tokens after j, and of j; this lane's share
    float d_y_u[2];          // dy . u, this lane's share
  };

  /// du = dt f (B g)
  __device__ void through_state_after(int turn, float last, const Rows& rows, const OperandFragment<1, P / 16>& u,
                                      Fragment<1, P / 8>& d_u, Sums& sums) const {
    const auto g = shared_.g(turn).ldmatrix_by_columns(0, 0);
    const auto B = shared_.B().ldmatrix_by_columns(first_, 0);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      unsigned B_rows[4];  // a (16 tokens x 16 states)
      ldmatrix(B_rows, B.address(0, n));
      multiply(d_u, B_rows, g, n);
    }
    const RowValues<2> product = row_products(d_u, u);
    float f_dt[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float f = exp2_approximate(last - rows.l[r]);
      sums.through_g[r] = f * product[r];
      f_dt[r] = f * rows.dt[r];
    }
    d_u.for_each([&](float& x, int row, int) { x *= f_dt[row / 8]; });
  }

  /// du += (dt M + D)^T dy and d_CB^T += K^T * (v dy^T), of the tokens 32 half ... 32 half + 31 that dy is of. Masked:
  /// some of them are j, or before it.
  template <bool Masked>
  __device__ void within_chunk(int half, int turn, SsdTokens& of, const Rows& rows, float D,
                               const OperandFragment<1, P / 16>& u, Fragment<1, P / 8>& d_u, Sums& sums) {
    const int from = 32 * half;
    Fragment<1, 4> product{}, M;  // (16 tokens x 32 tokens)
    const auto by_rows = shared_.dy(turn).ldmatrix_by_rows(0, 0);
#pragma unroll
    for (int p = 0; p < P; p += 16)
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        unsigned dy[4];  // two b (16 channels x 8 tokens), from tokens 8 j and 8 j + 8 on
        ldmatrix(dy, by_rows.address(from + 8 * j, p));
        mma_m16n8k16(product.tile(0, j), u.tile[0][p / 16], {dy[0], dy[1]});
        mma_m16n8k16(product.tile(0, j + 1), u.tile[0][p / 16], {dy[2], dy[3]});
      }
    float columns[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int after = from + 8 * (c / 2) + c % 2 + t_ - first_ - g_;  // the first of the lane's tokens j
      const float l_t = of.l[from + 8 * (c / 2) + c % 2 + t_];
      columns[c] = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool there = !Masked || after >= 8 * r, own = Masked && after == 8 * r;
        const float K = there ? exp2_approximate(l_t - rows.l[r]) : 0.0f;
        const float weight = K * CB_.at(r, 8 * half + c), d_y_u = product.at(r, c), d_y_v = rows.dt[r] * d_y_u;
        d_CB_.at(r, 8 * half + c) = ::fmaf(K, d_y_v, d_CB_.at(r, 8 * half + c));
        M.at(r, c) = rows.dt[r] * weight;
        if (own) {
          sums.own[r] = weight * d_y_u;
          sums.d_y_u[r] = d_y_u;
          M.at(r, c) += D;
        } else {
          sums.later[r] = ::fmaf(weight, d_y_u, sums.later[r]);
          columns[c] = ::fmaf(weight, d_y_v, columns[c]);
        }
      }
    }
    const auto factor = M.operand();
    const auto by_columns = shared_.dy(turn).ldmatrix_by_columns(0, 0);
#pragma unroll
    for (int k = 0; k < 2; ++k) multiply(d_u, factor.tile[0][k], by_columns, from + 16 * k);
    of.within[first_ / 16][from + 8 * (g_ / 2) + g_ % 2 + t_] += column_sums(columns);
  }

  /// Writes the warp's rows, rounded, to a tile.
  template <int Width>
  __device__ void gather(const SsdSwizzled<Width>& tile, const Fragment<1, Width / 8>& x) const {
    const auto own = tile.in_tile(first_ + g_, 0) + t_;
#pragma unroll
    for (int j = 0; j < Width / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<unsigned*>(own.address(8 * r, 8 * j)) = pack_bf16(x.at(r, 2 * j), x.at(r, 2 * j + 1));
  }

  Shared shared_;
  int first_, g_, t_;             // token; the lane's first row and column
  Fragment<1, Q / 8> CB_, d_CB_;  // (16 tokens j x Q tokens t)
};

/// Gradients of B and C of 16 tokens of a chunk, from `first` on, by a warp.
template <class Traits>
class SsdProjectionGradient {
 public:
  using Shared = SsdGradientShared<Traits>;

  __device__ SsdProjectionGradient(const Shared& shared, int first) : shared_(shared), first_(first), d_B_{}, d_C_{} {}

  /// A head, or a part of it.
  __device__ void differentiate(int turn, SsdTokens& of) {
    const int row = first_ + d_B_.first_row();
    const float last = of.l[Q - 1], l[2] = {of.l[row], of.l[row + 8]};
    const float e[2] = {exp2_approximate(l[0]), exp2_approximate(l[1])};
    const float f_dt[2] = {exp2_approximate(last - l[0]) * of.dt[row], exp2_approximate(last - l[1]) * of.dt[row + 8]};
    float through_s[2] = {};
    const auto dy = load_rows<P / 16>(shared_.dy(turn), first_, 0);
#pragma unroll
    for (int n = 0; n < N; n += 64) {
      Fragment<1, 8> product{};  // (16 tokens x 64 states)
      multiply_transposed(product, dy, shared_.s(), n);
      add(e, product, n, d_C_);
      const RowValues<2> of_states = row_products(product, load_rows<4>(shared_.C(), first_, n));
#pragma unroll
      for (int r = 0; r < 2; ++r) through_s[r] += e[r] * of_states[r];
    }
    if (threadIdx.x % 4 == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r) of.through_s[row + 8 * r] += through_s[r];
    const auto u = load_rows<P / 16>(shared_.u(turn), first_, 0);
#pragma unroll
    for (int n = 0; n < N; n += 64) {
      Fragment<1, 8> product{};
      multiply_transposed(product, u, shared_.g(turn), n);
      add(f_dt, product, n, d_B_);
    }
  }

  /// dC += d_CB B and dB += d_CB^T C
  __device__ void within_chunk() {
    const auto transposed = shared_.d_CB().ldmatrix_by_columns(first_, 0);
    const auto plain = shared_.d_CB().ldmatrix_by_rows(0, first_);
    const auto B = shared_.B().ldmatrix_by_columns(0, 0), C = shared_.C().ldmatrix_by_columns(0, 0);
#pragma unroll
    for (int k = 0; k < Q; k += 16) {
      unsigned of_B[4], of_C[4];  // a (16 tokens j x 16 tokens t), and (16 tokens t x 16 tokens j)
      ldmatrix(of_B, transposed.address(0, k));
      ldmatrix_transposed(of_C, plain.address(k, 0));
      multiply(d_B_, of_B, C, k);
      multiply(d_C_, of_C, B, k);
    }
  }

  /// Writes both, of `count` tokens of the chunk, to (tokens, 2 states).
  __device__ void store(int count, int states, const Matrix<float>& to) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_ + d_B_.first_row() + 8 * r;
      if (row >= count) continue;
#pragma unroll
      for (int c = 0; c < N / 4; c += 2)
        if (const int n = 4 * c + d_B_.first_column(); n < states) {
          *reinterpret_cast<float2*>(&to(row, n)) = make_float2(d_B_.at(r, c), d_B_.at(r, c + 1));
          *reinterpret_cast<float2*>(&to(row, states + n)) = make_float2(d_C_.at(r, c), d_C_.at(r, c + 1));
        }
    }
  }

 private:
  static constexpr int N = Traits::N, P = Traits::P, Q = Traits::Q;

  /// Columns n ... n + 63 of `to` += weight of the row * product.
  __device__ static void add(const float (&weight)[2], const Fragment<1, 8>& product, int n, Fragment<1, N / 8>& to) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 16; ++c) to.at(r, n / 4 + c) = ::fmaf(weight[r], product.at(r, c), to.at(r, n / 4 + c));
  }

  Shared shared_;
  int first_;
  Fragment<1, N / 8> d_B_, d_C_;  // (16 tokens x N)
};

}  // namespace zamba::kernel
