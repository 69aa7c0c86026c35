// SPDX-License-Identifier: MIT
// The gradients of ssd's inputs in bf16, chunk by chunk, as products on tensor cores; equations in backward.hpp, that
// of the decays in backward.cuh. Before it, state_gradient.cuh has left g, the gradient of the state after each chunk.
//
// A block takes one chunk of 64 tokens and some heads of a group, one after the other, so that C B^T is computed once,
// and dB, dC and d(C B^T) are summed over the heads in registers. Rows of all three belong to warps, 16 each:
//
//   four warps   gradients of u, D and delta: rows of B C^T and its gradient, so that what weighs dy below is the first
//                operand as it stands in registers
//                  du     = dt f (B g) + (dt M + D)^T dy          M^T = K^T * B C^T; D on the diagonal
//                  d_CB^T = sum over heads of K^T * (v dy^T)
//   four warps   gradients of B and C, through the states at both ends of the chunk
//                  dC     = sum over heads of (e dy) s^T          + d_CB B       when all heads are done
//                  dB     = sum over heads of (f v) g^T           + d_CB^T C
//
// While a head is computed, cp.async brings u, dy, g and s of the next; s, which is kept in float, the second four
// warps round for their products. What belongs to tokens of a head, sums over its channels and states, waits in shared
// memory for the end, when a warp finishes a head.
//
// Numeric contract: as of chunk_scan.cuh; factors of products that are rounded to bf16 are g, s, dt M + D and, after
// the sum over heads, d_CB. What is not summed on tensor cores is in float, the weights M (dy v^T) too.
#pragma once

#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/sm90.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/backward.cuh>
#include <zamba/ops/ssd/chunk_state.cuh>
#include <zamba/ops/ssd/tile.cuh>

namespace zamba::kernel {

/// States that a block has room for; what is not there is 0. Heads of more than P channels are taken in parts.
template <int N_>
struct SsdGradientTraits {
  static constexpr int N = N_, P = 64, Q = 64;
  static constexpr int most_heads = 16;  // of a block
  static constexpr int warps = Q / 16;   // of either kind
  static constexpr int threads = 2 * 32 * warps;
  static_assert(N >= Q, "zamba: the gradient of C B^T takes the place of a state");
};

/// What a block has of the tokens of a head, in shared memory; sums are those of the equation in backward.cuh.
struct SsdTokens {
  static constexpr int Q = 64, warps = 4;
  float dt[Q], l[Q];
  float through_s[Q], through_g[Q];  // e_t C_t . (s dy_t), and f_t B_t . (g v_t)
  float within[warps][Q];            // over the rows of each warp, of M (dy v^T) those of token t less those at t
  float d_v_u[Q], d_y_u[Q];          // over channels, dv . u and dy . u
  float states[warps];               // s . g, of each warp's threads
};

/// The shared memory of a block.
template <class Traits>
struct SsdGradientShared {
  static constexpr int N = Traits::N, P = Traits::P, Q = Traits::Q;
  static constexpr int BC_size = Q * N, u_size = Q * P, state_size = N * P, stage_size = 2 * u_size + state_size;
  static constexpr int tiles = 2 * BC_size + 2 * stage_size + state_size + u_size;
  static constexpr std::size_t bytes(Index heads) {
    return tiles * sizeof(bf16) + state_size * sizeof(float) + static_cast<std::size_t>(heads) * sizeof(SsdTokens);
  }

  bf16* memory;

  __device__ SsdSwizzled<N> B() const { return {memory, 0}; }        // (Q, N)
  __device__ SsdSwizzled<N> C() const { return {memory, BC_size}; }  // (Q, N)
  __device__ SsdSwizzled<P> u(int turn) const {                      // (Q, P)
    return {memory, 2 * BC_size + turn % 2 * stage_size};
  }
  __device__ SsdSwizzled<P> dy(int turn) const { return u(turn) + u_size; }               // (Q, P)
  __device__ SsdSwizzled<P> g(int turn) const { return u(turn) + 2 * u_size; }            // (N, P), after the chunk
  __device__ SsdSwizzled<P> s() const { return {memory, 2 * BC_size + 2 * stage_size}; }  // (N, P), before it
  __device__ SsdSwizzled<Q> d_CB() const { return {memory, s().at}; }  // (Q, Q), transposed, in the place of s
  __device__ SsdSwizzled<P> d_u() const { return s() + state_size; }   // (Q, P)
  __device__ float4* exact_s() const { return reinterpret_cast<float4*>(memory + tiles); }  // s in float, (N, P)
  __device__ SsdTokens& of_head(Index number) const {
    return reinterpret_cast<SsdTokens*>(memory + tiles + 2 * state_size)[number];
  }
};

/// What a block takes: a chunk and its heads.
template <class Traits>
struct SsdGradientPart {
  SsdBlock block;
  Index of_heads, slot, first;  // number of the block of heads, of the kept state, first token
  int count, states;

  /// Slots are numbered as checkpoints are; some have no chunk, of 0 tokens.
  __device__ SsdGradientPart(const Sequences& sequences, const SsdBlocks& blocks)
      : of_heads(blockIdx.x % blocks.count()), slot(blockIdx.x / blocks.count()), states(static_cast<int>(blocks.N)) {
    block = blocks[of_heads];
    Index low = 0, high = sequences.rows;  // rows; low's first slot <= slot < high's
    const auto first_slot = [&](Index row) { return sequences.begin(row) / Traits::Q + row; };
    while (high - low > 1) {
      const Index middle = (low + high) / 2;
      (first_slot(middle) <= slot ? low : high) = middle;
    }
    const Index at = (slot - first_slot(low)) * Traits::Q;
    first = sequences.begin(low) + at;
    count = static_cast<int>(::max(Index{0}, ::min(Index{Traits::Q}, sequences.length(low) - at)));
  }
};

/// What a block does at a time: P channels of a head, or those that are left.
template <class Traits>
struct SsdTurn {
  int number, head, channel;  // of the turn, the block's head, the head's first channel
  const SsdBlock& block;

  __device__ explicit SsdTurn(const SsdBlock& of) : number(0), head(0), channel(0), block(of) {}
  __device__ explicit operator bool() const { return head < block.heads; }
  __device__ void next() {
    ++number;
    channel += Traits::P;
    if (channel >= block.P) channel = 0, ++head;
  }
  __device__ Index first() const { return (block.head + head) * block.P + channel; }
  __device__ int channels() const { return ::min(Traits::P, static_cast<int>(block.P) - channel); }
};

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

/// What the block loads, begun by all threads or by the second half of them.
template <class Traits>
class SsdGradientLoader {
 public:
  __device__ SsdGradientLoader(const SsdInputs<bf16, float>& in, const Matrix<const bf16>& d_y,
                               const Tensor<const float, 3>& before, const Tensor<const bf16, 3>& after,
                               const SsdGradientPart<Traits>& part, const SsdGradientShared<Traits>& shared)
      : shared_(shared),
        row_(static_cast<int>(threadIdx.x) / pieces),
        column_(static_cast<int>(threadIdx.x) % pieces * 8),
        count_(part.count),
        states_(part.states),
        u_stride_(in.u.stride[0]),
        y_stride_(d_y.stride[0]),
        g_stride_(after.stride[1]),
        s_stride_(before.stride[1]),
        u_(in.u.data + (part.first + row_) * u_stride_ + column_),
        d_y_(d_y.data + (part.first + row_) * y_stride_ + column_),
        g_(&after(part.slot, 0, 0) + row_ * g_stride_ + column_),
        s_(&before(part.slot, 0, 0) + state_row() * s_stride_ + state_column()) {
    const Index group = part.block.group;
    ssd_copy_tile<Q, N, Traits::threads>(&in.B(part.first, group, 0), in.B.stride[0], count_, states_, shared.B(),
                                         static_cast<int>(threadIdx.x));
    ssd_copy_tile<Q, N, Traits::threads>(&in.C(part.first, group, 0), in.C.stride[0], count_, states_, shared.C(),
                                         static_cast<int>(threadIdx.x));
  }

  /// u, dy and g of a turn; one group of copies, though there may be none.
  __device__ void load(const SsdTurn<Traits>& turn) const {
    if (turn) {
      const Index channel = turn.first();
      const bool there = column_ < turn.channels();
      copy<Q>(u_ + channel, u_stride_, there, count_, shared_.u(turn.number));
      copy<Q>(d_y_ + channel, y_stride_, there, count_, shared_.dy(turn.number));
      copy<N>(g_ + channel, g_stride_, there, states_, shared_.g(turn.number));
    }
    copy_async_commit();
  }

  /// s of a turn, by the second half of the threads, each of which reads what it has copied itself; one group of
  /// copies.
  __device__ void load_state(const SsdTurn<Traits>& turn) const {
    if (turn) {
      const float* const from = s_ + turn.first();
      const bool there = state_column() < turn.channels();
#pragma unroll
      for (int i = 0; i < N / state_rows; ++i)
        copy_async(state_piece(i), from + i * state_rows * s_stride_, there && state_row() + i * state_rows < states_);
    }
    copy_async_commit();
  }
  /// Rounds s for the products. Returns this thread's share of s . g.
  __device__ float round_state(int turn) const {
    const int row = state_row(), column = state_column();
    const auto to = shared_.s().in_tile(row, column) + column % 8;
    const auto from = shared_.g(turn).in_tile(row, column) + column % 8;
    float product = 0;
#pragma unroll
    for (int i = 0; i < N / state_rows; ++i) {
      const float4 s = *state_piece(i);
      const uint2 g = *reinterpret_cast<const uint2*>(from.address(i * state_rows, 0));
      product = ::fmaf(s.x, __uint_as_float(g.x << 16), product);
      product = ::fmaf(s.y, __uint_as_float(g.x & 0xffff0000u), product);
      product = ::fmaf(s.z, __uint_as_float(g.y << 16), product);
      product = ::fmaf(s.w, __uint_as_float(g.y & 0xffff0000u), product);
      *reinterpret_cast<uint2*>(to.address(i * state_rows, 0)) = make_uint2(pack_bf16(s.x, s.y), pack_bf16(s.z, s.w));
    }
    return product;
  }

 private:
  static constexpr int N = Traits::N, P = Traits::P, Q = Traits::Q, pieces = P / 8;
  static constexpr int rows = Traits::threads / pieces;             // of a tile that are copied at once
  static constexpr int state_rows = Traits::threads / 2 / (P / 4);  // the same of s
  static_assert(Q % rows == 0 && N % rows == 0 && state_rows == 8,
                "zamba: threads keep to a column of a swizzled tile");

  /// Rows of a tile, of which `count` are there.
  template <int Rows>
  __device__ void copy(const bf16* from, Index stride, bool there, int count, const SsdSwizzled<P>& to) const {
    const auto place = to.in_tile(row_, column_);
#pragma unroll
    for (int i = 0; i < Rows / rows; ++i)
      copy_async(place.address(i * rows, 0), from + i * rows * stride, there && row_ + i * rows < count);
  }
  __device__ static int state_row() { return static_cast<int>(threadIdx.x) % (Traits::threads / 2) / (P / 4); }
  __device__ static int state_column() { return static_cast<int>(threadIdx.x) % (P / 4) * 4; }
  __device__ float4* state_piece(int i) const {
    return shared_.exact_s() + threadIdx.x % (Traits::threads / 2) + i * (Traits::threads / 2);
  }

  SsdGradientShared<Traits> shared_;
  int row_, column_, count_, states_;  // of this thread, in tiles of bf16; tokens, states that are there
  Index u_stride_, y_stride_, g_stride_, s_stride_;
  const bf16 *u_, *d_y_, *g_;  // this thread's places, of channel 0
  const float* s_;
};

/// The gradients of delta of a head, and of its parameters in this chunk, by a warp: a lane has tokens 2 lane and
/// 2 lane + 1.
template <class Traits>
__device__ void ssd_finish_head(const SsdInputs<bf16, float>& in, const SsdGradients<bf16, float>& out,
                                const SsdGradientPart<Traits>& part, const SsdTokens& of, Index head,
                                const Tensor<float, 3>& parameters) {
  const int lane = threadIdx.x % 32;
  const float a = -::exp(in.A_log[head]);
  float span[2], after[2], through_g[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    span[i] = of.through_s[t];
    for (int warp = 0; warp < Traits::warps; ++warp) span[i] += of.within[warp][t];
    through_g[i] = of.through_g[t];
  }
  float later = span[0] + span[1], before = through_g[0] + through_g[1];  // of the lanes from, and up to, this one
  for (int distance = 1; distance < 32; distance *= 2) {
    const float more = __shfl_down_sync(0xffffffffu, later, distance);
    const float less = __shfl_up_sync(0xffffffffu, before, distance);
    if (lane + distance < 32) later += more;
    if (lane >= distance) before += less;
  }
  later = __shfl_down_sync(0xffffffffu, later, 1);
  before = __shfl_up_sync(0xffffffffu, before, 1);
  if (lane == 31) later = 0;
  if (lane == 0) before = 0;
  float states = 0;
  for (int warp = 0; warp < Traits::warps; ++warp) states += of.states[warp];
  const float passing = exp2_approximate(of.l[Traits::Q - 1]) * states;
  after[1] = passing + (later + span[1]) + (before + through_g[0]);
  after[0] = passing + (later + span[1] + span[0]) + before;

  float sums[3] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    if (t >= part.count) continue;
    const float x = float(in.delta(part.first + t, head)) + in.dt_bias[head];
    const float slope = x > 20 ? 1.0f : 1 / (1 + ::exp(-x)), d_dt = a * after[i] + of.d_v_u[t];
    const float d_delta = of.dt[t] > static_cast<float>(in.dt_min) ? d_dt * slope : 0.0f;
    out.delta(part.first + t, head) = bf16(d_delta);
    sums[0] += a * after[i] * of.dt[t];
    sums[1] += of.d_y_u[t];
    sums[2] += d_delta;
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    for (int distance = 16; distance > 0; distance /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
    if (lane == 0) parameters(i, head, part.slot) = sums[i];
  }
}

/// The first four warps of a block.
template <class Traits>
__device__ void ssd_input_warps(const SsdInputs<bf16, float>& in, const SsdGradients<bf16, float>& out,
                                const SsdGradientPart<Traits>& part, const SsdGradientShared<Traits>& shared,
                                const SsdGradientLoader<Traits>& loader, const Tensor<float, 3>& parameters) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  SsdInputGradient<Traits> own(shared, warp * 16);
  for (SsdTurn<Traits> turn(part.block), next = turn; turn; turn.next()) {
    copy_async_wait<0>();
    __syncthreads();
    next.next();
    loader.load(next);
    own.differentiate(turn.number, shared.of_head(turn.head), in.D[part.block.head + turn.head]);
    own.store(part.count, turn.channels(), &out.u(part.first, turn.first()), out.u.stride[0]);
  }
  __syncthreads();
  own.share();
  __syncthreads();
  for (Index number = warp; number < part.block.heads; number += Traits::warps)
    ssd_finish_head(in, out, part, shared.of_head(number), part.block.head + number, parameters);
}

/// The other four.
template <class Traits>
__device__ void ssd_projection_warps(const SsdGradientPart<Traits>& part, const SsdGradientShared<Traits>& shared,
                                     const SsdGradientLoader<Traits>& loader, const Matrix<float>& d_BC) {
  const int warp = static_cast<int>(threadIdx.x) / 32 - Traits::warps;
  SsdProjectionGradient<Traits> own(shared, warp * 16);
  for (SsdTurn<Traits> turn(part.block), next = turn; turn; turn.next()) {
    copy_async_wait<0>();
    __syncthreads();
    next.next();
    loader.load(next);
    SsdTokens& of = shared.of_head(turn.head);
    float product = loader.round_state(turn.number);
    loader.load_state(next);
    for (int distance = 16; distance > 0; distance /= 2) product += __shfl_xor_sync(0xffffffffu, product, distance);
    if (threadIdx.x % 32 == 0) of.states[warp] += product;
    named_barrier_sync(1, Traits::threads / 2);  // s is rounded
    own.differentiate(turn.number, of);
  }
  __syncthreads();
  __syncthreads();
  own.within_chunk();
  own.store(part.count, part.states, d_BC.slice(part.first, part.count));
}

/// before, after (kept states, N, D): the states before the chunks, the gradients of those after them. Blocks: of
/// heads, then slots of kept states.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_chunk_gradient_kernel(Matrix<const bf16> d_y, SsdInputs<bf16, float> in, Sequences sequences,
                              Tensor<const float, 3> before, Tensor<const bf16, 3> after, SsdGradients<bf16, float> out,
                              SsdBlocks blocks, SsdGradientParts<float> parts) {
  extern __shared__ __align__(128) unsigned char ssd_memory[];
  const SsdGradientShared<Traits> shared{reinterpret_cast<bf16*>(ssd_memory)};
  launch_dependents();
  grid_dependency_wait();
  const SsdGradientPart<Traits> part(sequences, blocks);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (part.count == 0) {
    for (int i = threadIdx.x; i < 3 * part.block.heads; i += Traits::threads)
      parts.parameters(i % 3, part.block.head + i / 3, part.slot) = 0;
    return;
  }
  const SsdGradientLoader<Traits> loader(in, d_y, before, after, part, shared);
  loader.load(SsdTurn<Traits>(part.block));
  const bool of_inputs = warp < Traits::warps;
  if (!of_inputs) loader.load_state(SsdTurn<Traits>(part.block));
  for (Index number = warp; number < part.block.heads; number += 2 * Traits::warps) {
    const Index head = part.block.head + number;
    SsdTokens& of = shared.of_head(number);
    for (int i = lane; i < static_cast<int>(sizeof(SsdTokens) / sizeof(float)); i += 32)
      reinterpret_cast<float*>(&of)[i] = 0;
    __syncwarp();
    float x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane + i;
      x[i] = t < part.count ? float(in.delta(part.first + t, head)) + in.dt_bias[head] : 0.0f;
    }
    SsdSteps(x, part.count, -::exp(in.A_log[head]) * log2_e, static_cast<float>(in.dt_min)).store(of.dt, of.l);
  }
  copy_async_wait<0>();
  __syncthreads();
  // Warps go their own ways between the barriers of the block, one a turn and two at the end.
  if (of_inputs)
    ssd_input_warps(in, out, part, shared, loader, parts.parameters);
  else
    ssd_projection_warps(part, shared, loader, parts.BC[part.of_heads]);
}

}  // namespace zamba::kernel
