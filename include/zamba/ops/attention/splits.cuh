// SPDX-License-Identifier: MIT
// The splits of split-KV decode: how the keys of a token are divided among blocks; and the combine kernel, which puts
// together what they found.
#pragma once

#include <zamba/kernel/launch.cuh>
#include <zamba/number.hpp>
#include <zamba/ops/attention.hpp>
#include <zamba/ops/attention/tile.cuh>

namespace zamba::kernel {

/// Which tokens the blocks of a launch are for: place i is token i % per_row of row i / per_row, or token i of the
/// batch where per_row is 0.
struct AttentionPlaces {
  int per_row;
  AttentionRows rows;
};

/// The token of a place, and the splits of its keys.
struct SplitToken {
  static constexpr int min_keys = 64;  // of a split, where there are several; their sizes are multiples of it
  static constexpr int max_splits = 32;

  Index row, begin, token;
  int start, visible;  // positions of the row before the batch; keys that the token sees
  int keys, splits;    // keys of a split, but for the last; splits: 0 where the place has no token

  __device__ SplitToken(const Sequences& sequences, const AttentionPlaces& places, int place, bool cached, bool split) {
    row = places.per_row ? place / places.per_row : row_of(sequences, place);
    begin = sequences.begin(row);
    token = places.per_row ? begin + place % places.per_row : place;
    start = cached ? static_cast<int>(sequences.start(row)) : 0;
    const Index length = sequences.length(row);
    visible = start + static_cast<int>(token - begin) + 1;
    keys = split ? ceil_div(visible, min_keys * max_splits) * min_keys : visible;
    splits = token - begin < length && places.rows.have(length) ? ceil_div(visible, keys) : 0;
  }
};

template <class A_>
struct AttentionCombineTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int threads = 256;
};

/// The greatest of a warp's numbers, in all its lanes.
template <class F>
__device__ F warp_max(F x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = ::max(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

/// Combines the splits of tokens that have several, in order: with M the greatest of their m,
///   out = sum_s exp(m_s - M) o_s / sum_s exp(m_s - M) sum_s
/// A lane holds the weight of a split. Blocks: places, and in them the heads. partial: as the decode kernel leaves it.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    attention_combine_kernel(AttentionShape shape, Sequences sequences, AttentionPlaces places,
                             Tensor<const typename Traits::F, 4> partial, Matrix<typename Traits::A> out,
                             Matrix<typename Traits::F> lse) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int max_splits = SplitToken::max_splits, at_once = 16;
  static_assert(max_splits == 32, "zamba: a lane holds the weight of a split");
  launch_dependents();
  grid_dependency_wait();
  const int heads = static_cast<int>(shape.heads), head_dim = static_cast<int>(shape.head_dim);
  const int place = static_cast<int>(blockIdx.x) / heads, head = static_cast<int>(blockIdx.x) % heads;
  const SplitToken token(sequences, places, place, true, true);
  if (token.splits < 2) return;
  const int lane = threadIdx.x % 32;
  const F* const from = &partial(0, place, head, 0);
  const Index stride = partial.stride[0];
  const bool is_split = lane < token.splits;
  const F max_of_split = is_split ? from[lane * stride + head_dim] : F(-INFINITY);
  const F sum_of_split = is_split ? from[lane * stride + head_dim + 1] : F(0);
  const F max = warp_max(max_of_split);
  const F weight = is_split ? ::exp(max_of_split - max) : F(0), weighed = weight * sum_of_split;
  F total = 0;
#pragma unroll
  for (int s = 0; s < max_splits; ++s) total += __shfl_sync(0xffffffffu, weighed, s);
  for (int first = threadIdx.x - lane; first < head_dim; first += Traits::threads) {
    const int d = ::min(first + lane, head_dim - 1);
    F sum = 0;
    for (int split = 0; split < token.splits; split += at_once) {
      F values[at_once];  // read together
#pragma unroll
      for (int s = 0; s < at_once; ++s) values[s] = split + s < token.splits ? from[(split + s) * stride + d] : F(0);
#pragma unroll
      for (int s = 0; s < at_once; ++s) sum += __shfl_sync(0xffffffffu, weight, split + s) * values[s];
    }
    if (first + lane < head_dim) out(token.token, head * head_dim + d) = A(sum / total);
  }
  if (threadIdx.x == 0) lse(token.token, head) = max + ::log(total);
}

}  // namespace zamba::kernel
