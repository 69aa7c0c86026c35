// SPDX-License-Identifier: MIT
// linear of a few tokens on CUDA as products of a matrix and vectors (gemv, batched over the tokens): the weight is
// read once, at the pace of memory, 16 bytes a lane where rows allow it, and the products are of ordinary arithmetic.
//
// A team of warps takes four rows of the weight, whose columns its threads share: of short rows a team is one warp, of
// long ones the whole block. The first loads of the weight are on their way before the kernel waits for what was queued
// before it (programmatic dependent launch).
//
// The order of a sum depends on the extents of the weight only: a thread's columns in order, then the lanes of a warp
// by halving distances, then the warps of the team.
#pragma once

#include <type_traits>

#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Weights of A_ for up to Tokens_ tokens: Team_ warps together take four rows, whose columns they share.
template <class A_, int Tokens_, int Team_>
struct LinearGemvTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int rows = 4, tokens = Tokens_, team = Team_;
  static constexpr int threads = 256, warps = threads / 32, teams = warps / team;
  static constexpr int width = vector_width<A>;  // elements of one load
  // Loads of each row on their way before the first is used; the order of a sum does not depend on it.
  static constexpr int ahead = tokens <= 4 ? 2 : 1;
  // Blocks of a multiprocessor, at least, as far as registers allow it without spills.
  static constexpr int blocks = std::is_same_v<A, double> ? 1 : tokens == 1 ? 4 : tokens == 2 ? 3 : 2;
};

/// Blocks across: rows of the weight; down: heads. Wide: rows begin at multiples of 16 bytes and are whole numbers of
/// them.
template <class Traits, bool Wide>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    linear_gemv_kernel(Tensor<const typename Traits::A, 3> x_heads, Tensor<const typename Traits::A, 3> weight_heads,
                       Tensor<typename Traits::A, 3> y_heads, Matrix<const typename Traits::A> residual,
                       Vector<const typename Traits::F> bias) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  launch_dependents();
  const Index head = blockIdx.y;
  const auto x = head_of(x_heads, head), weight = weight_heads[head];
  const auto y = head_of(y_heads, head);
  constexpr int rows = Traits::rows, tokens = Traits::tokens, width = Wide ? Traits::width : 1;
  constexpr int team_threads = 32 * Traits::team, values = rows * tokens;  // a team's sums
  __shared__ F of_warps[Traits::teams][Traits::team][values];
  const int warp = threadIdx.x / 32, team = warp / Traits::team;
  const Index first = Index{blockIdx.x} * Traits::teams * rows, first_of_team = first + team * rows;

  // Where rows and tokens begin; those beyond the last have its place, and what is made of them is not written.
  const A* const w = weight.data + first_of_team * weight.stride[0];
  int at[rows];
  const A* in[tokens];
#pragma unroll
  for (int r = 0; r < rows; ++r)
    at[r] = static_cast<int>((::min(first_of_team + r, weight.rows() - 1) - first_of_team) * weight.stride[0]);
#pragma unroll
  for (int s = 0; s < tokens; ++s) in[s] = x.data + ::min(Index{s}, x.rows() - 1) * x.stride[0];

  // A thread takes pieces of `width` columns, `step` apart, `ahead` of each row at a time.
  constexpr int step = team_threads * width, ahead = Traits::ahead;
  const int cols = static_cast<int>(x.cols());
  int first_k = static_cast<int>(threadIdx.x) % team_threads * width;
  AlignedVector<A, width> pieces[ahead][rows];
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < ahead; ++i)
#pragma unroll
      for (int r = 0; r < rows; ++r)
        if (first_k + i * step < cols) pieces[i][r] = load_vector_streaming<width>(w + (at[r] + first_k + i * step));
  };
  load();
  grid_dependency_wait();

  F sum[rows][tokens] = {};  // this lane's share
  while (first_k < cols) {
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int k = first_k + i * step;
      if (k >= cols) break;
      F weights[rows][width];
#pragma unroll
      for (int r = 0; r < rows; ++r) pieces[i][r].unpack(weights[r]);
#pragma unroll
      for (int s = 0; s < tokens; ++s) {
        F inputs[width];
        load_vector<width>(in[s] + k).unpack(inputs);
#pragma unroll
        for (int r = 0; r < rows; ++r)
#pragma unroll
          for (int j = 0; j < width; ++j) sum[r][s] += weights[r][j] * inputs[j];
      }
    }
    first_k += ahead * step;
    load();
  }

  // The lanes of a warp join, then the warps of a team; then a thread writes one element of y.
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int s = 0; s < tokens; ++s) {
      for (int distance = 16; distance > 0; distance /= 2)
        sum[r][s] += __shfl_xor_sync(0xffffffffu, sum[r][s], distance);
      if (threadIdx.x % 32 == 0) of_warps[team][warp % Traits::team][r * tokens + s] = sum[r][s];
    }
  __syncthreads();
  const Index out = first + threadIdx.x / tokens, token = threadIdx.x % tokens;
  if (threadIdx.x >= Traits::teams * values || out >= weight.rows() || token >= y.rows()) return;
  F total = bias ? bias[out] : F(0);
#pragma unroll
  for (int part = 0; part < Traits::team; ++part) total += of_warps[threadIdx.x / values][part][threadIdx.x % values];
  y(token, out) = A(residual ? total + F(residual(token, out)) : total);
}

}  // namespace zamba::kernel
