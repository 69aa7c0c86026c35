// SPDX-License-Identifier: MIT
// adamw_step on CUDA; equations and shapes in adamw_step.hpp. Bound by memory bandwidth: 28 bytes an element in
// float, and in bf16 with the lower half of a master. A thread steps 16 bytes of floats, whatever the weight is stored
// as: with more, neighbouring threads would leave gaps between their vectors, and a warp would ask for every sector of
// memory twice. Every thread reads norm and loss and decides alike whether there is a step, so the host need not know
// them.
//
// sum_of_squares is a sum over pieces, a block for each, then over their sums by one block.
//
// Numeric contract: the arithmetic of the CPU version, with multiply-adds, the same however weights are stored and
// aligned. The squares are summed in double in an order that the size alone fixes.
#pragma once

#include <cstring>
#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/elementwise.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/adamw_step.hpp>

namespace zamba {

namespace kernel {

/// What is stepped: load() and store() of N neighbouring values.
template <class F>
struct PlainWeights {
  Vector<F> weight;

  template <int N>
  __device__ void load(Index i, F (&p)[N]) const {
    load_vector<N>(&weight[i]).unpack(p);
  }
  template <int N>
  __device__ void store(Index i, const F (&p)[N]) const {
    store_vector(&weight[i], p);
  }
};

/// Masters in two halves.
struct SplitWeights {
  Vector<bf16> weight;
  Vector<std::uint16_t> low;

  template <int N>
  __device__ void load(Index i, float (&p)[N]) const {
    const auto uppers = load_vector<N>(&weight[i]);
    const auto lowers = load_vector<N>(&low[i]);
    SplitFloat halves[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      memcpy(&halves[k].nearest, reinterpret_cast<const unsigned char*>(uppers.words) + 2 * k, 2);
      memcpy(&halves[k].low, reinterpret_cast<const unsigned char*>(lowers.words) + 2 * k, 2);
      p[k] = static_cast<float>(halves[k]);
    }
  }
  template <int N>
  __device__ void store(Index i, const float (&p)[N]) const {
    AlignedVector<bf16, N> uppers;
    AlignedVector<std::uint16_t, N> lowers;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const SplitFloat halves(p[k]);
      memcpy(reinterpret_cast<unsigned char*>(uppers.words) + 2 * k, &halves.nearest, 2);
      memcpy(reinterpret_cast<unsigned char*>(lowers.words) + 2 * k, &halves.low, 2);
    }
    store_vector(&weight[i], uppers);
    store_vector(&low[i], lowers);
  }
};

template <class F, class Weights>
struct AdamWElements {
  Weights weights;
  Vector<const F> gradient;
  Vector<F> m, v;
  AdamWFactors<F> factors;
  const double *norm_squared, *loss;
  Index first;  // of the elements that the kernel counts from

  template <int N>
  __device__ void vector(Index, Index i) const {
    i += first;
    F p[N], g[N], m_[N], v_[N];
    load_vector_streaming<N>(&gradient[i]).unpack(g);
    load_vector<N>(&m[i]).unpack(m_);
    load_vector<N>(&v[i]).unpack(v_);
    weights.load(i, p);
    AdamWFactors<F> by = factors;  // after the loads, which are on their way meanwhile
    if (!by.clip(*norm_squared) || (loss && !is_finite(*loss))) return;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const F scaled = g[k] * by.coarse, root = by.root2 * scaled;
      m_[k] = ::fma(by.beta1, m_[k], by.gain1 * scaled);
      v_[k] = ::fma(by.beta2, v_[k], root * root);
      p[k] = ::fma(by.keep, p[k], -(by.rate * m_[k] / ::fma(::sqrt(v_[k]), by.root, by.eps)));
    }
    store_vector(&m[i], m_);
    store_vector(&v[i], v_);
    weights.store(i, p);
  }
};

template <class F_>
struct SquaresTraits {
  using F = F_;
  static constexpr Index piece = 1 << 14;
  static constexpr int threads = 256, width = vector_width<F>;
  static constexpr int threads_of_total = 1024;
};

/// sums[i] = the sum of the squares of the i-th piece: of neighbouring elements by thread, then over threads.
template <class Traits, bool Aligned>
__global__ void __launch_bounds__(Traits::threads)
    squares_of_pieces_kernel(Vector<const typename Traits::F> values, Vector<double> sums) {
  constexpr int width = Traits::width, step = Traits::threads * width;
  launch_dependents();
  grid_dependency_wait();
  for (Index i = blockIdx.x; i < sums.size(); i += gridDim.x) {
    const Index first = i * Traits::piece + threadIdx.x * width, end = values.size();
    double sum[width] = {};
    const auto add = [&](const auto& load) {
#pragma unroll 8
      for (int k = 0; k < Traits::piece / step; ++k) {
        const auto vector = load(first + k * step);
#pragma unroll
        for (int l = 0; l < width; ++l) {
          const auto value = static_cast<double>(vector[l]);
          sum[l] = ::fma(value, value, sum[l]);
        }
      }
    };
    if (Aligned && (i + 1) * Traits::piece <= end)
      add([&](Index at) { return load_vector_streaming<width>(&values[at]); });
    else  // what is beyond the end counts as 0
      add([&](Index at) {
        const auto left = static_cast<int>(::min(end - at, Index{width}));
        return load_vector_masked<width, false>(values.data + at, left);
      });
    double all = sum[0];
#pragma unroll
    for (int k = 1; k < width; ++k) all += sum[k];
    all = block_sum<Traits::threads>(all);
    if (threadIdx.x == 0) sums[i] = all;
  }
}

/// *out = the sum of all pieces: of every 1024th by thread, in order, then over threads.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads_of_total)
    sum_of_pieces_kernel(Vector<const double> sums, double* out) {
  launch_dependents();
  grid_dependency_wait();
  double sum = 0;
#pragma unroll 8
  for (Index i = threadIdx.x; i < sums.size(); i += Traits::threads_of_total) sum += sums[i];
  sum = block_sum<Traits::threads_of_total>(sum);
  if (threadIdx.x == 0) *out = sum;
}

}  // namespace kernel

template <>
struct AdamWStep<cuda> {
  template <class W, class F>
  static void forward(Context<cuda>& ctx, const AdamWTensors<W, F>& t, const AdamWScalars& scalars,
                      const double* norm_squared) {
    const auto launch = [&](const auto& weights) {
      using Weights = std::remove_cvref_t<decltype(weights)>;
      constexpr Index width = kernel::vector_width<F>;
      const auto aligned = [](const auto&... tensors) { return (kernel::aligned(tensors, width) && ...); };
      const bool vectors = aligned(t.weight, t.low, t.gradient, t.m, t.v);
      const Index n = t.weight.size(), whole = vectors ? n / width * width : 0;
      kernel::AdamWElements<F, Weights> elements{weights,      t.gradient,   t.m, t.v, AdamWFactors<F>(scalars),
                                                 norm_squared, scalars.loss, 0};
      kernel::for_vectors<F>(ctx, true, 1, whole, elements, "adamw_step");
      elements.first = whole;
      kernel::for_vectors<F>(ctx, false, 1, n - whole, elements, "adamw_step");
    };
    if constexpr (std::is_same_v<W, F>)
      launch(kernel::PlainWeights<F>{t.weight});
    else
      launch(kernel::SplitWeights{t.weight, t.low});
  }

  template <class F>
  static void sum_of_squares(Context<cuda>& ctx, Vector<const F> values, double* out) {
    using Traits = kernel::SquaresTraits<F>;
    ArenaScope scope(ctx.arena());
    const Vector<double> sums = scratch(ctx, values, out);
    const Index pieces = sums.size();
    if (pieces > 0)
      kernel::launch(ctx, "sum_of_squares",
                     kernel::aligned(values, Traits::width) ? kernel::squares_of_pieces_kernel<Traits, true>
                                                            : kernel::squares_of_pieces_kernel<Traits, false>,
                     kernel::blocks_for(pieces, 1), Traits::threads, 0, values, sums);
    kernel::launch(ctx, "sum_of_squares", kernel::sum_of_pieces_kernel<Traits>, 1, Traits::threads_of_total, 0, sums,
                   out);
  }
  /// Of sum_of_squares.
  template <class Ctx, class F>
  static Vector<double> scratch(Ctx& ctx, Vector<const F> values, double*) {
    return ctx.arena().template tensor<double>(ceil_div(values.size(), kernel::SquaresTraits<F>::piece));
  }
};

}  // namespace zamba
