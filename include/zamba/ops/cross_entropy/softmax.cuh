// SPDX-License-Identifier: MIT
// Softmax and loss of rows of logits on CUDA, and their gradient in place: a block a row, an online softmax in the
// first pass over it, the gradient in the second, which finds the row in registers (32,768 logits in bf16), what is
// beyond in the caches.
#pragma once

#include <type_traits>

#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/math.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/ops/cross_entropy.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Gradient: whether the logits are replaced by their gradients.
template <class A_, bool Gradient_>
struct SoftmaxLossTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr bool gradient = Gradient_;
  static constexpr int threads = 512, width = vector_width<A>;
  static constexpr int held = sizeof(A) == 8 ? 1 : 8;  // vectors of a thread in registers
  static constexpr int blocks = 2;                     // of a multiprocessor, at least
  /// e^x of a logit below the largest; approximate where the logits are rounded to 8 bits.
  __device__ static F exponential(F x) {
    if constexpr (std::is_same_v<A, bf16>)
      return exp2_approximate(x * log2_e);
    else
      return ::exp(x);
  }
};

/// Of the gradient, and of the squares of the normalisers' logarithms in the loss.
struct LossFactors {
  double scale, z_loss;
};

/// The largest of the logits so far, and the sum of e^(z - largest).
template <class Traits>
struct RunningSoftmax {
  using F = typename Traits::F;
  static constexpr F lowest = std::is_same_v<F, double> ? F(-0x1.fffffffffffffp1023) : F(-0x1.fffffep127);
  F largest = lowest, sum = 0;

  template <int N>
  __device__ void add(const F (&z)[N]) {
    F top = largest;
#pragma unroll
    for (int i = 0; i < N; ++i) top = ::max(top, z[i]);
    sum *= Traits::exponential(largest - top);
    largest = top;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += Traits::exponential(z[i] - top);
  }
};

/// This thread's vectors of a row, which begins at a multiple of 16 bytes; single logits at its end.
template <class Traits>
class LogitsOfThread {
 public:
  using A = typename Traits::A;
  __device__ explicit LogitsOfThread(Vector<A> row)
      : row_(row.data), cols_(static_cast<int>(row.cols())), whole_(cols_ / width * width) {
#pragma unroll
    for (int p = 0; p < Traits::held; ++p)
      if (column(p) < whole_) held_[p] = load_vector<width>(&row_[column(p)]);
  }

  /// f(column, logits), in order.
  template <class F>
  __device__ void for_each(F&& f) const {
#pragma unroll
    for (int p = 0; p < Traits::held; ++p)
      if (column(p) < whole_) f(column(p), held_[p]);
#pragma unroll 2
    for (int c = column(Traits::held); c < whole_; c += Traits::threads * width) f(c, load_vector<width>(&row_[c]));
    if (const int c = whole_ + static_cast<int>(threadIdx.x); c < cols_) f(c, load_vector<1>(&row_[c]));
  }

 private:
  static constexpr int width = Traits::width;
  __device__ static int column(int p) { return (p * Traits::threads + static_cast<int>(threadIdx.x)) * width; }

  A* row_;
  int cols_, whole_;
  AlignedVector<A, width> held_[Traits::held];
};

/// losses (n) of rows of logits, 0 where there is no target; with the gradient, the logits become scale *
/// ((1 + 2 z_loss lse) softmax - [v = target]).
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    softmax_loss_kernel(Matrix<typename Traits::A> logits, const Token* targets, LossFactors factors, double* losses) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  launch_dependents();
  grid_dependency_wait();
  for (Index t = blockIdx.x; t < logits.rows(); t += gridDim.x) {
    const Vector<A> row = logits[t];
    const Token target = targets[t];
    const LogitsOfThread<Traits> mine(row);
    if (target < 0) {
      if (threadIdx.x == 0) losses[t] = 0;
      if constexpr (Traits::gradient)
        mine.for_each([&]<int N>(int c, const AlignedVector<A, N>&) {
          const F zeros[N] = {};
          store_vector(&row[c], zeros);
        });
      continue;
    }
    const F at_target = row[target];  // before another thread replaces it
    RunningSoftmax<Traits> softmax;
    mine.for_each([&]<int N>(int, const AlignedVector<A, N>& vector) {
      F z[N];
      vector.unpack(z);
      softmax.add(z);
    });
    // Two reductions in turn, so the barrier of either says that the other's results have been read.
    const F largest = block_reduce_in_turn<Traits::threads>(softmax.largest, Maximum{}, 0);
    const F of_thread = softmax.sum * Traits::exponential(softmax.largest - largest);
    const double sum = block_sum_in_turn<Traits::threads>(static_cast<double>(of_thread), 0);
    const double log_sum = ::log(sum), lse = log_sum + static_cast<double>(largest);
    if (threadIdx.x == 0)
      losses[t] =
          log_sum + (static_cast<double>(largest) - static_cast<double>(at_target)) + factors.z_loss * lse * lse;
    if constexpr (Traits::gradient) {
      const double weight = 1 + 2 * factors.z_loss * lse;
      const F factor = static_cast<F>(factors.scale * weight / sum), of_target = static_cast<F>(factors.scale);
      mine.for_each([&]<int N>(int c, const AlignedVector<A, N>& vector) {
        F z[N];
        vector.unpack(z);
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] = factor * Traits::exponential(z[i] - largest);
        if (target >= c && target < c + N)
#pragma unroll
          for (int i = 0; i < N; ++i)
            if (target == c + i) z[i] -= of_target;
        store_vector(&row[c], z);
      });
    }
  }
}

/// *total += the sum of the losses and the number of targets: those of a thread in order, then those of the block.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    sum_losses_kernel(Vector<const double> losses, const Token* targets, LossSum* total) {
  launch_dependents();
  grid_dependency_wait();
  double sum = 0, count = 0;  // a count is exact
#pragma unroll 4
  for (Index t = threadIdx.x; t < losses.size(); t += Threads) {
    sum += losses[t];
    count += targets[t] >= 0;
  }
  sum = block_sum<Threads>(sum);
  count = block_sum<Threads>(count);
  if (threadIdx.x == 0) {
    total->sum += sum;
    total->count += static_cast<Index>(count);
  }
}

}  // namespace zamba::kernel
