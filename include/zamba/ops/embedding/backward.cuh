// SPDX-License-Identifier: MIT
// The backward pass of embedding on CUDA, a segmented sum: the positions are sorted by token, those of one token lie
// side by side then, and their rows are added in order, without atomics.
//
//   sort       radix sort from the least significant digit (LSD), which is stable: (token, position), 8 bits at a time
//   segments   for every place of the sorted list where its token's begin and end, by binary search
//   pieces     of at most 64 places from a token's beginning on: the first adds its rows to the table, each further one
//              sums them in a row of scratch
//   join       those sums are added to the table, in order
//
// So a token that is most of the batch is summed in parallel, and one that occurs up to 64 times as if by a loop over
// the positions.
#pragma once

#include <cuda_runtime.h>

#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/block_scan.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

struct TokenAt {
  Token token;
  int position;
};

/// One block sorts, in tiles: the positions of a training step are few, and the block meets its own writes.
struct TokenSortTraits {
  static constexpr int threads = 1024, warps = threads / warp_size;
  static constexpr int rounds = 4, tile = threads * rounds;  // places of a thread at a time, and of the block
  static constexpr int bits = 8, digits = 1 << bits;
};

/// One more occurrence of each lane's digit in a warp's counts. Gives how many there were before it: those counted, and
/// those of lower lanes.
__device__ inline int count_digit(int* counts, int digit) {
  const unsigned same = __match_any_sync(0xffffffffu, digit);
  const unsigned below = same & ((1u << threadIdx.x % warp_size) - 1);
  const int before = counts[digit];
  __syncwarp();
  if (below == 0) counts[digit] = before + __popc(same);
  __syncwarp();
  return before + __popc(below);
}

/// A stable pass over one digit of the tokens. `from` is nothing where the positions are in order still.
template <class Traits>
__device__ void sort_by_digit(const Token* tokens, const TokenAt* from, TokenAt* to, int count, int shift,
                              int (&counts)[Traits::warps][Traits::digits + 1]) {
  constexpr int warps = Traits::warps, rounds = Traits::rounds, digits = Traits::digits;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
  const auto element = [&](int i) {
    if (i >= count) return TokenAt{-1, 0};
    return from ? from[i] : TokenAt{tokens[i], i};
  };
  // A digit of its own, the last, for what lies beyond the end.
  const auto digit_of = [&](TokenAt at) { return at.token < 0 ? digits : at.token >> shift & (digits - 1); };
  const auto clear_counts = [&] {
    for (int digit = lane; digit <= digits; digit += warp_size) counts[warp][digit] = 0;
    __syncwarp();
  };

  // Where the first place of each digit is: a thread's digit is its number.
  clear_counts();
  for (int first = warp * warp_size; first < count; first += Traits::threads)
    count_digit(counts[warp], digit_of(element(first + lane)));
  __syncthreads();
  int all = 0, total;
  if (thread < digits)
    for (int w = 0; w < warps; ++w) all += counts[w][thread];
  int next = block_exclusive_sum<Traits::threads>(all, total);  // behind its barriers, all have read the counts

  for (int tile = 0; tile < count; tile += Traits::tile) {
    TokenAt mine[rounds];
    int rank[rounds];
#pragma unroll
    for (int r = 0; r < rounds; ++r) mine[r] = element(tile + (warp * rounds + r) * warp_size + lane);
    clear_counts();
#pragma unroll
    for (int r = 0; r < rounds; ++r) rank[r] = count_digit(counts[warp], digit_of(mine[r]));
    __syncthreads();
    if (thread < digits)  // counts become places: those of the warps before come first
#pragma unroll 8
      for (int w = 0; w < warps; ++w) {
        const int of_warp = counts[w][thread];
        counts[w][thread] = next;
        next += of_warp;
      }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < rounds; ++r)
      if (mine[r].token >= 0) to[counts[warp][digit_of(mine[r])] + rank[r]] = mine[r];
    __syncwarp();  // the warp's counts have been read
  }
}

/// sorted (count): the positions by token, those of one token in order. `other` is scratch of the same extent.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    sort_by_token_kernel(const Token* tokens, int count, int passes, TokenAt* sorted, TokenAt* other) {
  launch_dependents();
  grid_dependency_wait();
  __shared__ int counts[Traits::warps][Traits::digits + 1];
  const TokenAt* from = nullptr;
  for (int pass = 0; pass < passes; ++pass) {
    TokenAt* const to = (passes - pass) % 2 ? sorted : other;
    sort_by_digit<Traits>(tokens, from, to, count, pass * Traits::bits, counts);
    __syncthreads();  // what was written is read by all
    from = to;
  }
}

/// Places [begin, end) of the sorted list.
struct TokenSegment {
  int begin, end;
};

/// Of every place the segment that it lies in.
struct FindSegments {
  Vector<const TokenAt> sorted;
  TokenSegment* segments;

  /// The first place in [low, high) whose token is not below the wanted one, or high.
  __device__ int first_from(int low, int high, Token wanted) const {
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (sorted[middle].token < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  __device__ void operator()(Index, Index place) const {
    const int at = static_cast<int>(place);
    const Token token = sorted[at].token;
    segments[at] = {first_from(0, at, token), first_from(at + 1, static_cast<int>(sorted.size()), token + 1)};
  }
};

inline constexpr int rows_of_piece = 64;

/// For the place where a piece begins, the sum of its rows: added to the table, or in partial (pieces, d) at the number
/// of the 64 places in which it begins, which no other further piece does.
template <class A>
struct AddPieces {
  using F = compute_t<A>;
  Vector<const TokenAt> sorted;
  const TokenSegment* segments;
  Matrix<const A> d_out;
  Matrix<F> d_table, partial;

  template <int Width>
  __device__ void vector(Index place, Index c) const {
    const int at = static_cast<int>(place);
    const TokenSegment segment = segments[at];
    if ((at - segment.begin) % rows_of_piece != 0) return;
    const int end = ::min(segment.end, at + rows_of_piece);
    F* const to = at == segment.begin ? &d_table(sorted[at].token, c) : &partial(at / rows_of_piece, c);
    F sums[Width] = {};
    if (at == segment.begin) load_vector<Width>(to).unpack(sums);
#pragma unroll 4
    for (int i = at; i < end; ++i) {
      const auto row = load_vector<Width>(&d_out(sorted[i].position, c));
#pragma unroll
      for (int k = 0; k < Width; ++k) sums[k] += row[k];
    }
    store_vector(to, sums);
  }
};

/// For the 64 places in which a segment's second piece begins, the sums of all but its first piece.
template <class F>
struct JoinPieces {
  Vector<const TokenAt> sorted;
  const TokenSegment* segments;
  Matrix<const F> partial;
  Matrix<F> d_table;

  template <int Width>
  __device__ void vector(Index piece, Index c) const {
    const int at = static_cast<int>(piece) * rows_of_piece;
    const TokenSegment segment = segments[at];  // one that begins before these places is in the first of them
    const int second = segment.begin + rows_of_piece;
    if (second / rows_of_piece != piece || second >= segment.end) return;
    F* const to = &d_table(sorted[at].token, c);
    F sums[Width];
    load_vector<Width>(to).unpack(sums);
    const Index pieces = ceil_div(segment.end - second, rows_of_piece);
#pragma unroll 4
    for (Index i = 0; i < pieces; ++i) {
      const auto sum = load_vector<Width>(&partial(piece + i, c));
#pragma unroll
      for (int k = 0; k < Width; ++k) sums[k] += sum[k];
    }
    store_vector(to, sums);
  }
};

}  // namespace zamba::kernel
