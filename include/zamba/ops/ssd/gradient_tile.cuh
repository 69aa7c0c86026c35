// SPDX-License-Identifier: MIT
// Tiles of ssd's chunk gradient (chunk_gradient.cuh) in shared memory, and the asynchronous copies (cp.async) that
// bring them. For one chunk of Q tokens of a row, and for one head after the other:
//
//   B, C     (Q, N) bf16    tokens by states       once for all heads
//   u, dy    (Q, P) bf16    tokens by channels     one for even heads, one for odd ones
//   g        (N, P) bf16    the gradient of the state after the chunk      the same
//   s        (N, P) float   the state before it, as it is kept, and (N, P) bf16, rounded
//   d_u      (Q, P) bf16    where warps gather what they write
//   tokens                  sums over channels and states of each head, and what they are made of: SsdTokens
#pragma once

#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd.hpp>
#include <zamba/ops/ssd/tile.cuh>

namespace zamba::kernel {

/// States that a block has room for; what is not there is 0. Heads of more than P channels are taken in parts.
template <int N_>
struct SsdGradientTraits {
  static constexpr int N = N_, P = 64, Q = 64;
  static constexpr int most_heads = 16;  // of a block
  static constexpr int warps = Q / 16;   // of either kind
  static constexpr int threads = 2 * 32 * warps;
  static_assert(P == Q, "zamba: the gradient of C B^T takes the place of that of u");
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
  __device__ SsdSwizzled<P> d_u() const { return s() + state_size; }                      // (Q, P)
  __device__ SsdSwizzled<Q> d_CB() const { return {memory, d_u().at}; }  // (Q, Q), transposed, in the place of d_u
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

}  // namespace zamba::kernel
