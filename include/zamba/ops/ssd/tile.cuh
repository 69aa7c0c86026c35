// SPDX-License-Identifier: MIT
// Tiles of ssd's chunk scan in shared memory: their layout, their XOR swizzle, and the pipeline of asynchronous copies
// (cp.async, several stages) that brings them. For each chunk of Q tokens, of one head:
//
//   u       (Q, P) bf16    tokens by channels        in as many places as the pipeline has stages
//   B, C    (Q, N) bf16    tokens by states          the same
//   state   (P, N) bf16    S^T before the chunk      one for even chunks, one for odd ones
//   dt, l   (Q) float      step, and logarithm       one for even chunks, one for odd ones
//                          (base 2) of the decay from the chunk's beginning
//   start   (P, N) float   S before the segment      in the order in which the threads keep S, see chunk_state.cuh
//
// A kernel that makes states only has neither C, nor state, nor start.
#pragma once

#include <zamba/kernel/mma.cuh>
#include <zamba/ops/ssd.hpp>

namespace zamba::kernel {

/// States and channels that a block has room for; what is not there is 0. Outputs_: it computes y, not the state only.
template <int N_, int P_, bool Outputs_ = true>
struct SsdChunkTraits {
  static constexpr int N = N_, P = P_, Q = 64;  // Q: tokens of a chunk
  static constexpr bool outputs = Outputs_;
  static constexpr int segment = 8;               // chunks
  static constexpr int stages = outputs ? 2 : 4;  // chunks in shared memory: one in use, the others on their way
  static constexpr int output_warps = outputs ? Q / 16 : 0, state_warps = P / 16;
  static constexpr int threads = 32 * (output_warps + state_warps);
  static constexpr int blocks = (N <= 64 ? 2 : 1) * (outputs ? 1 : 2);  // on a multiprocessor
  static_assert(Q == 64, "zamba: a lane of one warp has two tokens of a chunk");
  static_assert(P <= N, "zamba: a warp gathers its rows of y where its rows of C were");
};

/// The XOR swizzle of a tile of rows of Width bf16. Rows are pieces of 16 bytes; a piece lies at its number, xor
/// something of the row, so that ldmatrix, which reads a piece of each of eight rows at a time, meets no bank twice.
template <int Width>
struct SsdSwizzle {
  static constexpr int pieces = Width / 8;

  /// In elements, of the piece of column, a multiple of 8.
  __host__ __device__ static constexpr int offset(int row, int column) {
    const int turn = pieces >= 8 ? row & 7 : (row >> 1) & (pieces - 1);
    return row * Width + ((column / 8) ^ turn) * 8;
  }

  /// Whether the pieces of any column in rows 8 i ... 8 i + 7 lie in the eight different groups of four banks.
  static constexpr bool conflict_free() {
    for (int first = 0; first < 64; first += 8)
      for (int column = 0; column < Width; column += 8) {
        unsigned groups = 0;
        for (int row = first; row < first + 8; ++row) groups |= 1u << offset(row, column) / 8 % 8;
        if (groups != 0xff) return false;
      }
    return true;
  }

  /// Whether 8 rows down is 8 Width further, and a column of bits that this one has not, an exclusive or away.
  static constexpr bool moves() {
    for (int row = 0; row < 56; ++row)
      for (int column = 0; column < Width; column += 8)
        for (int more = 0; more < Width; more += 8)
          if ((column & more) == 0 && offset(row + 8, column + more) != (offset(row, column) ^ more) + 8 * Width)
            return false;
    return true;
  }
};
template <int Width>
inline constexpr bool swizzled_well = SsdSwizzle<Width>::conflict_free() && SsdSwizzle<Width>::moves();
static_assert(swizzled_well<32>, "zamba: u of 32 channels");
static_assert(swizzled_well<64>, "zamba: u of 64 channels; B, C and the state of 64 states");
static_assert(swizzled_well<128>, "zamba: B, C and the state of 128 states");

/// A place in a swizzled tile. `at` counts from `memory`, where tiles begin at multiples of their width.
template <int Width>
struct SsdSwizzled {
  bf16* memory;
  int at;

  /// In the tile that begins here; column is a multiple of 8.
  __device__ SsdSwizzled in_tile(int row, int column) const {
    return {memory, at + SsdSwizzle<Width>::offset(row, column)};
  }
  /// The swizzled address so many rows and columns from here. rows: a multiple of 8; column: a multiple of 8 of no bit
  /// that the column of this place has.
  __device__ bf16* address(int rows, int column) const { return memory + ((at ^ column) + rows * Width); }
  __device__ SsdSwizzled operator+(int elements) const { return {memory, at + elements}; }

  /// The address of ldmatrix, for this lane, of the 16 x 16 from (row, column) of the tile that begins here, both
  /// multiples of 8. Its registers 0 ... 3 are the four 8 x 8 of
  ///   by columns   0 2      by rows   0 1
  ///                1 3                2 3
  __device__ SsdSwizzled ldmatrix_by_columns(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return in_tile(row + lane % 16, column + lane / 16 * 8);
  }
  __device__ SsdSwizzled ldmatrix_by_rows(int row, int column) const {
    const int lane = threadIdx.x % 32;
    return in_tile(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8);
  }
};

/// The shared memory of a block.
template <class Traits>
struct SsdShared {
  static constexpr int u_size = Traits::Q * Traits::P, B_size = Traits::Q * Traits::N;
  static constexpr int stage_size = u_size + B_size * (Traits::outputs ? 2 : 1);
  static constexpr int state_size = Traits::outputs ? Traits::P * Traits::N : 0;
  static constexpr int tiles = Traits::stages * stage_size + 2 * state_size;
  static constexpr std::size_t bytes = tiles * sizeof(bf16) + (4 * Traits::Q + state_size) * sizeof(float);
  static_assert(u_size % 128 == 0 && B_size % 128 == 0 && state_size % 128 == 0,
                "zamba: tiles begin at multiples of their width and of all banks");

  bf16* memory;

  __device__ SsdSwizzled<Traits::P> u(int chunk) const { return {memory, chunk % Traits::stages * stage_size}; }
  __device__ SsdSwizzled<Traits::N> B(int chunk) const {
    return {memory, chunk % Traits::stages * stage_size + u_size};
  }
  __device__ SsdSwizzled<Traits::N> C(int chunk) const { return B(chunk) + B_size; }
  __device__ SsdSwizzled<Traits::N> state(int chunk) const {
    return {memory, Traits::stages * stage_size + chunk % 2 * state_size};
  }
  __device__ float* dt(int chunk) const { return reinterpret_cast<float*>(memory + tiles) + chunk % 2 * Traits::Q; }
  __device__ float* l(int chunk) const { return dt(chunk) + 2 * Traits::Q; }
  __device__ float* start() const { return dt(0) + 4 * Traits::Q; }
};

/// What a block takes: a head, or P channels of it, of one row, or of a segment of it.
template <class Traits>
struct SsdPart {
  Index begin, length, row;    // of the block's tokens
  Index of_row;                // tokens
  Index index;                 // among the parts of all rows
  int segment;                 // that it begins with
  Index head, group, channel;  // the first channel
  int channels;                // at most P
  int states;                  // at most N

  __device__ SsdPart(const SsdInputs<bf16, float>& in, const Sequences& sequences, int segments) {
    const Index heads = in.delta.cols(), per_head = in.u.cols() / heads;
    const Index parts = ceil_div(per_head, Traits::P);
    segment = static_cast<int>(blockIdx.x % segments);
    index = blockIdx.x / segments;
    const Index part = index % parts;
    row = index / (parts * heads);
    head = index / parts % heads;
    group = head / (heads / in.B.shape[1]);
    channel = head * per_head + part * Traits::P;
    channels = static_cast<int>(::min(per_head - part * Traits::P, Index{Traits::P}));
    states = static_cast<int>(in.B.shape[2]);
    constexpr Index tokens = Traits::segment * Traits::Q;
    of_row = sequences.length(row);
    begin = sequences.begin(row) + segment * tokens;
    length = ::max(Index{0}, of_row - segment * tokens);
    if (segments > 1 || !Traits::outputs) length = ::min(length, tokens);
  }
  __device__ bool ends_row() const { return segment * Index{Traits::segment * Traits::Q} + length == of_row; }
  __device__ int chunks() const { return static_cast<int>(ceil_div(length, Traits::Q)); }
  /// Tokens of a chunk; 0 behind the last one.
  __device__ int count(int chunk) const {
    return static_cast<int>(::max(Index{0}, ::min(Index{Traits::Q}, length - Index{chunk} * Traits::Q)));
  }
};

/// Begins to copy (Rows, Width), zeros outside of (count, columns). thread: of those that do.
template <int Rows, int Width, int Threads>
__device__ void ssd_copy_tile(const bf16* from, Index stride, int count, int columns, SsdSwizzled<Width> to,
                              int thread) {
  constexpr int pieces = Width / 8;
  static_assert(Threads % pieces == 0, "zamba: a thread keeps to a column");
  const int column = thread % pieces * 8;
#pragma unroll 4
  for (int row = thread / pieces; row < Rows; row += Threads / pieces) {
    const bool there = row < count && column < columns;
    copy_async(to.in_tile(row, column).address(0, 0), there ? from + row * stride + column : from, there);
  }
}

/// The producer's side of the pipeline: one thread of the state warps, which together load u, B and C of chunks.
template <class Traits>
class SsdLoader {
 public:
  __device__ SsdLoader(const SsdInputs<bf16, float>& in, const SsdPart<Traits>& part, SsdShared<Traits> shared)
      : in_(in), part_(part), shared_(shared), thread_(threadIdx.x - 32 * Traits::output_warps) {}

  /// Begins to load the first chunks.
  __device__ void begin() const {
    for (int chunk = 0; chunk + 1 < Traits::stages; ++chunk) load(chunk);
  }

  /// Waits for a chunk, with all warps of the block, and begins to load one into the place of the chunk before it.
  __device__ void wait_for(int chunk) const {
    copy_async_wait<Traits::stages - 2>();
    __syncthreads();
    load(chunk + Traits::stages - 1);
  }

 private:
  /// Begins to copy a chunk; one group of copies, though there may be none.
  __device__ void load(int chunk) const {
    const int count = part_.count(chunk);
    const Index first = part_.begin + Index{chunk} * Traits::Q;
    if (count > 0) {
      copy<Traits::P>(&in_.u(first, part_.channel), in_.u.stride[0], count, part_.channels, shared_.u(chunk));
      copy<Traits::N>(&in_.B(first, part_.group, 0), in_.B.stride[0], count, part_.states, shared_.B(chunk));
      if constexpr (Traits::outputs)
        copy<Traits::N>(&in_.C(first, part_.group, 0), in_.C.stride[0], count, part_.states, shared_.C(chunk));
    }
    copy_async_commit();
  }

  template <int Width>
  __device__ void copy(const bf16* from, Index stride, int count, int columns, SsdSwizzled<Width> to) const {
    ssd_copy_tile<Traits::Q, Width, 32 * Traits::state_warps>(from, stride, count, columns, to, thread_);
  }

  const SsdInputs<bf16, float>& in_;
  const SsdPart<Traits>& part_;
  SsdShared<Traits> shared_;
  int thread_;
};

}  // namespace zamba::kernel
