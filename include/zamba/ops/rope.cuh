// SPDX-License-Identifier: MIT
// rope on CUDA; equations and shapes in rope.hpp.
//
// A block takes a token: it computes the angles once, in shared memory, then turns the pairs of all heads, 16 bytes of
// each half a lane where the views allow it.
//
// Numeric contract: angles, cosines and sines in double, as on the CPU; the turn in compute_t, rounded once when
// written.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/rope.hpp>

namespace zamba {

namespace kernel {

/// Width_: neighbouring pairs that a thread turns at once.
template <class A_, int Width_>
struct RopeTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int threads = 128, width = Width_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    rope_kernel(RopeShape shape, Sequences sequences, Matrix<typename Traits::A> x, int direction) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int width = Traits::width;
  extern __shared__ __align__(16) unsigned char rope_memory[];
  launch_dependents();
  grid_dependency_wait();
  const int half = static_cast<int>(shape.head_dim / 2), pieces = half / width;
  const int tasks = static_cast<int>(shape.heads) * pieces;
  F *const cosines = reinterpret_cast<F*>(rope_memory), *const sines = cosines + half;
  for (Index t = blockIdx.x; t < sequences.tokens; t += gridDim.x) {
    const Index row = row_of(sequences, t);
    const double position = static_cast<double>(sequences.start(row) + t - sequences.begin(row));
    for (int i = threadIdx.x; i < half; i += Traits::threads) {
      const double angle = direction * position *
                           ::pow(shape.theta, -2.0 * static_cast<double>(i) / static_cast<double>(shape.head_dim));
      double sine, cosine;
      ::sincos(angle, &sine, &cosine);
      cosines[i] = static_cast<F>(cosine);
      sines[i] = static_cast<F>(sine);
    }
    __syncthreads();
    for (int task = threadIdx.x; task < tasks; task += Traits::threads) {
      const int head = task / pieces, i = task % pieces * width;
      A *const first = &x(t, head * shape.head_dim + i), *const second = first + half;
      F a[width], b[width];
      load_vector<width>(first).unpack(a);
      load_vector<width>(second).unpack(b);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const F a_k = a[k], b_k = b[k], cosine = cosines[i + k], sine = sines[i + k];
        a[k] = a_k * cosine - b_k * sine;
        b[k] = b_k * cosine + a_k * sine;
      }
      store_vector(first, a);
      store_vector(second, b);
    }
    __syncthreads();  // the angles have been read
  }
}

}  // namespace kernel

template <>
struct Rope<cuda> {
  template <class A>
  static void turn(Context<cuda>& ctx, const RopeShape& shape, const Sequences& sequences, Matrix<A> x, int direction) {
    if (sequences.tokens == 0) return;
    constexpr int wide = kernel::vector_width<A>;
    if (shape.head_dim / 2 % wide == 0 && kernel::aligned(x, wide))
      launch<wide>(ctx, shape, sequences, x, direction);
    else
      launch<1>(ctx, shape, sequences, x, direction);
  }

 private:
  template <int Width, class A>
  static void launch(Context<cuda>& ctx, const RopeShape& shape, const Sequences& sequences, Matrix<A> x,
                     int direction) {
    using Traits = kernel::RopeTraits<A, Width>;
    kernel::launch(ctx, "rope", kernel::rope_kernel<Traits>, kernel::blocks_for(sequences.tokens, 1), Traits::threads,
                   static_cast<std::size_t>(shape.head_dim) * sizeof(typename Traits::F), shape, sequences, x,
                   direction);
  }
};

}  // namespace zamba
