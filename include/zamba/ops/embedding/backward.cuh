// SPDX-License-Identifier: MIT
// The backward pass of embedding on CUDA, a segmented sum: the positions are sorted by token, those of one token lie
// side by side then, and their rows are added in order, without atomics.
//
//   sort       radix sort from the least significant digit (LSD), which is stable: (token, position), 8 bits at a time;
//              a block counts the digits of its part, then puts its part's elements in their places
//   segments   for every place of the sorted list where its token's begin and end, by binary search
//   pieces     of at most 64 places from a token's beginning on: the first adds its rows to the table, each further one
//              sums them in a row of scratch
//   join       those sums are added to the table, in order
//
// So a token that is most of the batch is summed in parallel, and one that occurs up to 64 times as if by a loop over
// the positions.
#pragma once

#include <utility>

#include <zamba/context.cuh>
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

struct TokenSortTraits {
  static constexpr int threads = 256, warps = threads / warp_size;
  static constexpr int rounds = 4, tile = threads * rounds;  // elements of a thread at a time, and of the block
  static constexpr int bits = 8, digits = 1 << bits;
  static constexpr int most_parts = 128;  // a block adds up the counts of all of them
};
static_assert(TokenSortTraits::digits == TokenSortTraits::threads, "zamba: a digit is for the thread of its number");

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

/// A stable pass over the digit at `shift`: a part of the elements for every block. `from` is nothing in the first
/// pass, where the positions are in order still.
template <class Traits>
struct TokenSortPass {
  /// Of every warp; what lies beyond the end has a digit of its own, the last.
  using Counts = int[Traits::warps][Traits::digits + 1];
  const Token* tokens;
  const TokenAt* from;
  int count, shift;
  int of_part;  // elements, whole tiles
  int* counts;  // (parts, digits)

  __device__ int begin() const { return static_cast<int>(blockIdx.x) * of_part; }
  __device__ int end() const { return ::min(begin() + of_part, count); }
  __device__ TokenAt element(int i) const {
    if (i >= count) return TokenAt{-1, 0};
    return from ? from[i] : TokenAt{tokens[i], i};
  }
  __device__ int digit_of(TokenAt at) const {
    return at.token < 0 ? Traits::digits : at.token >> shift & (Traits::digits - 1);
  }
  /// The calling warp's.
  __device__ static void clear(int (&of_warp)[Traits::digits + 1]) {
    for (int digit = threadIdx.x % warp_size; digit <= Traits::digits; digit += warp_size) of_warp[digit] = 0;
    __syncwarp();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads) count_digits_kernel(TokenSortPass<Traits> pass) {
  launch_dependents();
  grid_dependency_wait();
  __shared__ typename TokenSortPass<Traits>::Counts counts;
  const int warp = threadIdx.x / warp_size;
  pass.clear(counts[warp]);
#pragma unroll 4
  for (int tile = pass.begin(); tile < pass.end(); tile += Traits::threads)
    count_digit(counts[warp], pass.digit_of(pass.element(tile + static_cast<int>(threadIdx.x))));
  __syncthreads();
  int all = 0;
#pragma unroll
  for (int w = 0; w < Traits::warps; ++w) all += counts[w][threadIdx.x];
  pass.counts[blockIdx.x * Traits::digits + threadIdx.x] = all;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::threads) place_tokens_kernel(TokenSortPass<Traits> pass, TokenAt* to) {
  constexpr int rounds = Traits::rounds, digits = Traits::digits;
  launch_dependents();
  grid_dependency_wait();
  __shared__ typename TokenSortPass<Traits>::Counts counts;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;

  // Where this part's first element of the thread's digit goes: behind all of lower digits, and those of earlier parts.
  int all = 0, of_earlier = 0, total;
#pragma unroll 8
  for (unsigned part = 0; part < gridDim.x; ++part) {
    const int of_part = pass.counts[part * digits + threadIdx.x];
    all += of_part;
    if (part < blockIdx.x) of_earlier += of_part;
  }
  int next = of_earlier + block_exclusive_sum<Traits::threads>(all, total);

  for (int tile = pass.begin(); tile < pass.end(); tile += Traits::tile) {
    TokenAt mine[rounds];
    int rank[rounds];
#pragma unroll
    for (int r = 0; r < rounds; ++r) mine[r] = pass.element(tile + (warp * rounds + r) * warp_size + lane);
    pass.clear(counts[warp]);
#pragma unroll
    for (int r = 0; r < rounds; ++r) rank[r] = count_digit(counts[warp], pass.digit_of(mine[r]));
    __syncthreads();
#pragma unroll
    for (int w = 0; w < Traits::warps; ++w) {  // counts become places: those of the warps before come first
      const int of_warp = counts[w][threadIdx.x];
      counts[w][threadIdx.x] = next;
      next += of_warp;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < rounds; ++r)
      if (mine[r].token >= 0) to[counts[warp][pass.digit_of(mine[r])] + rank[r]] = mine[r];
    __syncwarp();  // the warp's counts have been read
  }
}

/// The positions of `count` tokens below `vocabulary`, by token, those of one token in order: scratch of the arena.
inline Vector<const TokenAt> sort_by_token(Context<cuda>& ctx, const Token* tokens, int count, Index vocabulary) {
  using Traits = TokenSortTraits;
  const int tiles = ceil_div(count, Traits::tile), of_part = ceil_div(tiles, Traits::most_parts) * Traits::tile;
  const auto parts = static_cast<unsigned>(ceil_div(count, of_part));
  Vector<TokenAt> sorted = ctx.arena().tensor<TokenAt>(count), other = ctx.arena().tensor<TokenAt>(count);
  const auto counts = ctx.arena().tensor<int>(Index{parts}, Index{Traits::digits});
  const TokenAt* from = nullptr;
  for (int shift = 0; shift == 0 || (vocabulary - 1) >> shift > 0; shift += Traits::bits) {
    if (from) std::swap(sorted, other);
    const TokenSortPass<Traits> pass{tokens, from, count, shift, of_part, counts.data};
    launch(ctx, "embedding_backward: count", count_digits_kernel<Traits>, parts, Traits::threads, 0, pass);
    launch(ctx, "embedding_backward: sort", place_tokens_kernel<Traits>, parts, Traits::threads, 0, pass, sorted.data);
    from = sorted.data;
  }
  return sorted;
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
