// SPDX-License-Identifier: MIT
// The gradients of ssd's inputs in bf16, chunk by chunk, as products on tensor cores; equations in backward.hpp, that
// of the decays in backward.cuh. Before it, state_gradient.cuh has left g, the gradient of the state after each chunk.
//
// A block takes one chunk of 64 tokens and some heads of a group, one after the other, so that C B^T is computed once,
// and dB, dC and d(C B^T) are summed over the heads in registers. Rows of all three belong to warps, 16 each:
//
//   four warps   gradients of u, D and delta: rows of B C^T and its gradient, so that what weighs dy below is the first
//                operand as it stands in registers
//                  dv     = f (B g) + M^T dy                      M^T = K^T * B C^T
//                  d_CB^T = sum over heads of K^T * (v dy^T)
//   four warps   gradients of B and C, through the states at both ends of the chunk
//                  dC     = sum over heads of (e dy) s^T          + d_CB B       when all heads are done
//                  dB     = sum over heads of (f v) g^T           + d_CB^T C
//
// While a head is computed, cp.async brings u, dy, g and s of the next; s, which is kept in float, the second four
// warps round for their products. What belongs to tokens of a head, sums over its channels and states, waits in shared
// memory for the end, when a warp finishes a head.
//
// Numeric contract: as of chunk_scan.cuh; factors of products that are rounded to bf16 are g, s, M and, after the sum
// over heads, d_CB.
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
  float d_v_u[Q], d_y_u[Q];          // over channels
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

/// What a block takes: a chunk and its heads; by turns, 64 channels of them or less.
template <class Traits>
struct SsdGradientPart {
  SsdBlock block;
  Index of_heads, slot, first;  // number of the block of heads, of the kept state, first token
  int count, parts, turns, states;

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
    parts = static_cast<int>(ceil_div(block.P, Traits::P));
    turns = static_cast<int>(block.heads) * parts;
  }
  __device__ Index channel(int turn) const {
    return (block.head + turn / parts) * block.P + turn % parts * Index{Traits::P};
  }
  __device__ int channels(int turn) const {
    return static_cast<int>(::min(Index{Traits::P}, block.P - turn % parts * Index{Traits::P}));
  }
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

  /// A head, or a part of it.
  __device__ void differentiate(int turn, SsdTokens& of, float D) {
    const float dt[2] = {of.dt[first_ + g_], of.dt[first_ + g_ + 8]}, l[2] = {of.l[first_ + g_], of.l[first_ + g_ + 8]};
    const auto u = load_rows<P / 16>(shared_.u(turn), first_, 0);
    Fragment<1, P / 8> d_v{};  // (16 tokens x P)
    through_state_after(turn, of.l[Q - 1], l, d_v);
    const RowValues<2> through_g = row_products(d_v, u);
    float rows[2] = {};
    within_chunk<0>(turn, of, dt, l, u, d_v, rows);
    within_chunk<1>(turn, of, dt, l, u, d_v, rows);
    const RowValues<2> d_v_u = row_products(d_v, u);
    d_v.for_each([&](float& x, int row, int) { x *= dt[row / 8]; });
    const RowValues<2> d_y_u = add_skip(turn, D, u, d_v);
    __syncwarp();  // the columns' sums are there
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int j = first_ + g_ + 8 * r;
      rows[r] = quad_sum(rows[r]);
      if (t_ == 0) {
        of.within[first_ / 16][j] -= rows[r];
        of.through_g[j] += dt[r] * through_g[r];
        of.d_v_u[j] += d_v_u[r];
        of.d_y_u[j] += d_y_u[r];
      }
    }
    gather(d_v);
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
  __device__ void share() const { gather_in(shared_.d_CB(), d_CB_); }

 private:
  static constexpr int N = Traits::N, P = Traits::P, Q = Traits::Q;

  /// dv = f (B g)
  __device__ void through_state_after(int turn, float last, const float (&l)[2], Fragment<1, P / 8>& d_v) const {
    const auto g = shared_.g(turn).ldmatrix_by_columns(0, 0);
    const auto B = shared_.B().ldmatrix_by_columns(first_, 0);
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      unsigned rows[4];  // a (16 tokens x 16 states)
      ldmatrix(rows, B.address(0, n));
      multiply(d_v, rows, g, n);
    }
    const float f[2] = {exp2_approximate(last - l[0]), exp2_approximate(last - l[1])};
    d_v.for_each([&](float& x, int row, int) { x *= f[row / 8]; });
  }

  /// dv += M^T dy and d_CB^T += K^T * (v dy^T), of tokens 32 Half ... 32 Half + 31 that dy is of. rows: sums of
  /// M^T * (v dy^T), of later tokens only.
  template <int Half>
  __device__ void within_chunk(int turn, SsdTokens& of, const float (&dt)[2], const float (&l)[2],
                               const OperandFragment<1, P / 16>& u, Fragment<1, P / 8>& d_v, float (&rows)[2]) {
    constexpr int from = 32 * Half;
    if (from + 32 <= first_) return;
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
      const int t = from + 8 * (c / 2) + c % 2 + t_;
      const float l_t = of.l[t];
      columns[c] = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int j = first_ + g_ + 8 * r;
        const float K = t >= j ? exp2_approximate(l_t - l[r]) : 0.0f;
        const float d_CB = t >= j ? K * dt[r] * product.at(r, c) : 0.0f, CB = CB_.at(r, 8 * Half + c);
        const float passing = t > j ? d_CB * CB : 0.0f;
        d_CB_.at(r, 8 * Half + c) += d_CB;
        M.at(r, c) = K * CB;
        rows[r] += passing;
        columns[c] += passing;
      }
    }
    const auto factor = M.operand();
    const auto by_columns = shared_.dy(turn).ldmatrix_by_columns(0, 0);
#pragma unroll
    for (int k = 0; k < 2; ++k) multiply(d_v, factor.tile[0][k], by_columns, from + 16 * k);
    const int column = 8 * (g_ / 2) + g_ % 2;
    of.within[first_ / 16][from + column + t_] += column_sums(columns);
  }

  /// du += D dy; returns dy . u.
  __device__ RowValues<2> add_skip(int turn, float D, const OperandFragment<1, P / 16>& u,
                                   Fragment<1, P / 8>& d_u) const {
    const auto dy = load_rows<P / 16>(shared_.dy(turn), first_, 0);
    Fragment<1, P / 8> exact;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < P / 8; ++j) {
        const unsigned pair = dy.tile[0][j / 2][j % 2 * 2 + r];
        exact.at(r, 2 * j) = __uint_as_float(pair << 16);
        exact.at(r, 2 * j + 1) = __uint_as_float(pair & 0xffff0000u);
        d_u.at(r, 2 * j) = ::fmaf(D, exact.at(r, 2 * j), d_u.at(r, 2 * j));
        d_u.at(r, 2 * j + 1) = ::fmaf(D, exact.at(r, 2 * j + 1), d_u.at(r, 2 * j + 1));
      }
    return row_products(exact, u);
  }

  /// The warp's rows, rounded, where it gathers the gradient of u.
  __device__ void gather(const Fragment<1, P / 8>& d_u) const {
    gather_in(shared_.d_u(), d_u);
    __syncwarp();
  }
  template <int Width>
  __device__ void gather_in(const SsdSwizzled<Width>& tile, const Fragment<1, Width / 8>& x) const {
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
      product.for_each([&](float& x, int r, int) { x *= e[r / 8]; });
      add(product, n, d_C_);
      const RowValues<2> of_states = row_products(product, load_rows<4>(shared_.C(), first_, n));
#pragma unroll
      for (int r = 0; r < 2; ++r) through_s[r] += of_states[r];
    }
    if (threadIdx.x % 4 == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r) of.through_s[row + 8 * r] += through_s[r];
    const auto u = load_rows<P / 16>(shared_.u(turn), first_, 0);
#pragma unroll
    for (int n = 0; n < N; n += 64) {
      Fragment<1, 8> product{};
      multiply_transposed(product, u, shared_.g(turn), n);
      product.for_each([&](float& x, int r, int) { x *= f_dt[r / 8]; });
      add(product, n, d_B_);
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

  /// Columns n ... n + 63 of `to` += product.
  __device__ static void add(const Fragment<1, 8>& product, int n, Fragment<1, N / 8>& to) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < 16; ++c) to.at(r, n / 4 + c) += product.at(r, c);
  }

  Shared shared_;
  int first_;
  Fragment<1, N / 8> d_B_, d_C_;  // (16 tokens x N)
};

/// What the block loads, begun by all threads or by those of one kind.
template <class Traits>
struct SsdGradientLoader {
  static constexpr int N = Traits::N, P = Traits::P, Q = Traits::Q, half = Traits::threads / 2;

  const SsdInputs<bf16, float>& in;
  const Matrix<const bf16>& d_y;
  const Tensor<const float, 3>& before;
  const Tensor<const bf16, 3>& after;
  const SsdGradientPart<Traits>& part;
  SsdGradientShared<Traits> shared;

  __device__ void load_projections() const {
    const int thread = threadIdx.x, count = part.count;
    ssd_copy_tile<Q, N, Traits::threads>(&in.B(part.first, part.block.group, 0), in.B.stride[0], count, part.states,
                                         shared.B(), thread);
    ssd_copy_tile<Q, N, Traits::threads>(&in.C(part.first, part.block.group, 0), in.C.stride[0], count, part.states,
                                         shared.C(), thread);
  }
  /// u, dy and g of a turn; one group of copies, though there may be none.
  __device__ void load(int turn) const {
    if (turn < part.turns) {
      const int thread = threadIdx.x, count = part.count, channels = part.channels(turn);
      const Index channel = part.channel(turn);
      ssd_copy_tile<Q, P, Traits::threads>(&in.u(part.first, channel), in.u.stride[0], count, channels, shared.u(turn),
                                           thread);
      ssd_copy_tile<Q, P, Traits::threads>(&d_y(part.first, channel), d_y.stride[0], count, channels, shared.dy(turn),
                                           thread);
      ssd_copy_tile<N, P, Traits::threads>(&after(part.slot, 0, channel), after.stride[1], part.states, channels,
                                           shared.g(turn), thread);
    }
    copy_async_commit();
  }

  /// s of a turn, by half of the threads, each of which reads what it has copied itself; one group of copies.
  __device__ void load_state(int turn) const {
    if (turn < part.turns) {
      const int channels = part.channels(turn);
      const float* const from = &before(part.slot, 0, part.channel(turn));
      for_pieces([&](int at, int n, int p) {
        const bool there = n < part.states && p < channels;
        copy_async(shared.exact_s() + at, there ? from + n * before.stride[1] + p : from, there);
      });
    }
    copy_async_commit();
  }
  /// Rounds s for the products. Returns this thread's share of s . g.
  __device__ float round_state(int turn) const {
    float product = 0;
    for_pieces([&](int at, int n, int p) {
      const float4 s = shared.exact_s()[at];
      const auto place = [&](const SsdSwizzled<P>& tile) {
        return reinterpret_cast<uint2*>(tile.in_tile(n, p).address(0, 0) + p % 8);
      };
      const uint2 g = *place(shared.g(turn));
      product += s.x * __uint_as_float(g.x << 16) + s.y * __uint_as_float(g.x & 0xffff0000u);
      product += s.z * __uint_as_float(g.y << 16) + s.w * __uint_as_float(g.y & 0xffff0000u);
      *place(shared.s()) = make_uint2(pack_bf16(s.x, s.y), pack_bf16(s.z, s.w));
    });
    return product;
  }

 private:
  /// f(number, n, p) for this thread's pieces of four channels of s.
  template <class F>
  __device__ static void for_pieces(F&& f) {
#pragma unroll 4
    for (int at = threadIdx.x % half; at < N * P / 4; at += half) f(at, at / (P / 4), at % (P / 4) * 4);
  }
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
__device__ void ssd_input_warps(const SsdGradientLoader<Traits>& loader, const SsdGradients<bf16, float>& out,
                                const Tensor<float, 3>& parameters) {
  const auto& part = loader.part;
  const auto& shared = loader.shared;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  SsdInputGradient<Traits> own(shared, warp * 16);
  for (int turn = 0; turn < part.turns; ++turn) {
    copy_async_wait<0>();
    __syncthreads();
    loader.load(turn + 1);
    const int number = turn / part.parts;
    own.differentiate(turn, shared.of_head(number), loader.in.D[part.block.head + number]);
    own.store(part.count, part.channels(turn), &out.u(part.first, part.channel(turn)), out.u.stride[0]);
  }
  __syncthreads();
  own.share();
  __syncthreads();
  for (Index number = warp; number < part.block.heads; number += Traits::warps)
    ssd_finish_head(loader.in, out, part, shared.of_head(number), part.block.head + number, parameters);
}

/// The other four.
template <class Traits>
__device__ void ssd_projection_warps(const SsdGradientLoader<Traits>& loader, const Matrix<float>& d_BC) {
  const auto& part = loader.part;
  const auto& shared = loader.shared;
  const int warp = static_cast<int>(threadIdx.x) / 32 - Traits::warps;
  SsdProjectionGradient<Traits> own(shared, warp * 16);
  for (int turn = 0; turn < part.turns; ++turn) {
    copy_async_wait<0>();
    __syncthreads();
    loader.load(turn + 1);
    SsdTokens& of = shared.of_head(turn / part.parts);
    float product = loader.round_state(turn);
    for (int distance = 16; distance > 0; distance /= 2) product += __shfl_xor_sync(0xffffffffu, product, distance);
    if (threadIdx.x % 32 == 0) of.states[warp] += product;
    named_barrier_sync(1, Traits::threads / 2);  // s is rounded
    loader.load_state(turn + 1);
    own.differentiate(turn, of);
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
  const SsdGradientLoader<Traits> loader{in, d_y, before, after, part, shared};
  loader.load_projections();
  loader.load(0);
  const bool of_inputs = warp < Traits::warps;
  if (!of_inputs) loader.load_state(0);
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
    ssd_input_warps(loader, out, parts.parameters);
  else
    ssd_projection_warps(loader, parts.BC[part.of_heads]);
}

}  // namespace zamba::kernel
