// SPDX-License-Identifier: MIT
// rms_norm on CUDA; equations and shapes in rms_norm.hpp.
//
// Forward: a block takes positions in turn, and its threads hold their parts of the weight and of v in registers; the
// next positions are on their way to shared memory while this one's sum meets. Where a position is too wide for that,
// or not in pieces of 16 bytes, it is read twice. Backward: a block a position for d_x and d_t; d_weight in two more
// kernels, a thread a column, over fixed groups of positions and then over the groups in order.
//
// Numeric contract: sums in compute_t, in an order fixed by the width; backwards also by the number of positions.
// Agrees with the CPU version to rounding, a rerun is bit-equal. Activations stored as bf16 are rounded once, when
// written.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/rms_norm.hpp>

namespace zamba {

namespace kernel {

/// v = x + t, or x where t is absent; its gradient goes to d_x and, where wanted, d_t.
template <class A_>
struct SummedInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> x, t;
  Matrix<A> d_x, d_t;

  __device__ Index width() const { return x.cols(); }
  __device__ F value(Index i, Index c) const { return F(x(i, c)) + (t ? F(t(i, c)) : F(0)); }
  /// For neighbouring values from column c on: bring(k, where the k-th piece of 16 bytes is), and what values() makes
  /// of piece(k).
  static constexpr int pieces = 2;
  template <class Bring>
  __device__ void bring(Index i, Index c, Bring&& bring) const {
    bring(0, &x(i, c));
    if (t) bring(1, &t(i, c));
  }
  template <class Brought>
  __device__ void values(Brought&& piece, F (&to)[vector_width<A>]) const {
    piece(0).unpack(to);
    if (!t) return;
    F more[vector_width<A>];
    piece(1).unpack(more);
#pragma unroll
    for (int k = 0; k < vector_width<A>; ++k) to[k] += more[k];
  }
  bool in_vectors() const { return kernel::in_vectors(x) && (!t || kernel::in_vectors(t)); }
  __device__ void add_gradient(Index i, Index c, F d_v) const {
    d_x(i, c) = A(F(d_x(i, c)) + d_v);
    if (d_t) d_t(i, c) = A(d_v);
  }
};

/// v = concat[a, b]
template <class A_>
struct ConcatenatedInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> a, b;
  Matrix<A> d_a, d_b;

  __device__ Index width() const { return a.cols() + b.cols(); }
  __device__ F value(Index i, Index c) const { return c < a.cols() ? F(a(i, c)) : F(b(i, c - a.cols())); }
  static constexpr int pieces = 1;
  template <class Bring>
  __device__ void bring(Index i, Index c, Bring&& bring) const {
    bring(0, c < a.cols() ? &a(i, c) : &b(i, c - a.cols()));
  }
  template <class Brought>
  __device__ void values(Brought&& piece, F (&to)[vector_width<A>]) const {
    piece(0).unpack(to);
  }
  bool in_vectors() const { return kernel::in_vectors(a) && kernel::in_vectors(b); }
  __device__ void add_gradient(Index i, Index c, F d_v) const {
    A& d = c < a.cols() ? d_a(i, c) : d_b(i, c - a.cols());
    d = A(F(d) + d_v);
  }
};

/// What the kernels of the backward pass have in common.
template <class Input_>
struct RmsNormTraits {
  using Input = Input_;
  using A = typename Input::A;
  using F = typename Input::F;
  static constexpr int threads = 512;
  static constexpr int columns = 128;  // of d_weight in one block
};

/// The forward pass, by a block of few threads or of twice as many. In bf16 and float those hold up to 4096 and 8192
/// elements in registers, in double half of that.
template <class Input_, bool Few>
struct NormTraits {
  using Input = Input_;
  using A = typename Input::A;
  using F = typename Input::F;
  static constexpr int threads = Few ? 256 : 512, blocks = (sizeof(A) == 2 ? 1024 : 512) / threads;
  static constexpr int width = vector_width<A>;          // elements of a vector
  static constexpr int pieces = sizeof(A) == 2 ? 2 : 4;  // vectors of a thread
  static constexpr int ahead = sizeof(A) == 2 ? 2 : 1;   // positions that are on their way
  static constexpr int most = threads * width * pieces;  // elements of a position
  static constexpr std::size_t shared = 16 * threads * pieces * Input::pieces * ahead;
};

template <class F>
__device__ F square(F x) {
  return x * x;
}

/// For groups of at most Traits::most elements, in pieces of 16 bytes; blockIdx.y counts the groups of a position. More
/// than by the bytes under way, the time is bound by the waits of a block for its sum: so a thread has few elements,
/// and a multiprocessor many threads.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    rms_norm_kernel(typename Traits::Input in, Vector<const typename Traits::F> weight, typename Traits::F eps,
                    Matrix<typename Traits::A> out, Matrix<typename Traits::F> rstd) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int width = Traits::width, pieces = Traits::pieces;
  launch_dependents();
  const int all = static_cast<int>(in.width()), mine = static_cast<int>(threadIdx.x) * width;
  const Index group = blockIdx.y, first = group * all + mine;
  constexpr int step = Traits::threads * width;
  F weights[pieces][width];
#pragma unroll
  for (int p = 0; p < pieces; ++p)
    if (mine + p * step < all) load_vector_readonly<width>(&weight[first + p * step]).unpack(weights[p]);
  grid_dependency_wait();

  // A thread reads what it has brought itself, so only the sums meet at a barrier.
  extern __shared__ uint4 norm_memory[];
  constexpr int inputs = Traits::Input::pieces;
  const auto place = [&](int slot, int p, int k) -> uint4& {
    return norm_memory[((slot * pieces + p) * inputs + k) * Traits::threads + threadIdx.x];
  };
  const auto bring = [&](Index i, int slot) {
    if (i < out.rows()) {
#pragma unroll
      for (int p = 0; p < pieces; ++p)
        if (mine + p * step < all)
          in.bring(i, first + p * step, [&](int k, const auto* from) { copy_async(&place(slot, p, k), from, true); });
    }
    copy_async_commit();
  };
#pragma unroll
  for (int slot = 0; slot < Traits::ahead; ++slot) bring(blockIdx.x + Index{gridDim.x} * slot, slot);
  const F share = F(1) / F(all);
  int turn = 0, slot = 0;
  for (Index i = blockIdx.x; i < out.rows(); i += gridDim.x, turn ^= 1) {
    copy_async_wait<Traits::ahead - 1>();
    F v[pieces][width], squares = 0;
#pragma unroll
    for (int p = 0; p < pieces; ++p)
      if (mine + p * step < all) {
        in.values([&](int k) { return AlignedVector<A, width>{place(slot, p, k)}; }, v[p]);
#pragma unroll
        for (int k = 0; k < width; ++k) squares += v[p][k] * v[p][k];
      }
    F sum = block_sum_in_turn<Traits::threads>(squares, turn);
    bring(i + Index{gridDim.x} * Traits::ahead, slot);
    slot = slot + 1 < Traits::ahead ? slot + 1 : 0;
    F scale = ::rsqrt(::fma(sum, share, eps));
    if (!is_finite(sum)) [[unlikely]] {  // squares overflowed, of all threads alike
      squares = 0;
#pragma unroll
      for (int p = 0; p < pieces; ++p)
        if (mine + p * step < all)
#pragma unroll
          for (int k = 0; k < width; ++k) squares += square(v[p][k] * small_scale<F>);
      __syncthreads();  // the sum has been read, whose place this one takes
      sum = block_sum_in_turn<Traits::threads>(squares, turn);
      scale = small_scale<F> * ::rsqrt(sum * share);
    }
    if (threadIdx.x == 0) rstd(i, group) = scale;
#pragma unroll
    for (int p = 0; p < pieces; ++p)
      if (mine + p * step < all) {
#pragma unroll
        for (int k = 0; k < width; ++k) v[p][k] = weights[p][k] * (v[p][k] * scale);
        store_vector(&out(i, first + p * step), v[p]);
      }
  }
}

/// For groups of any width and alignment; the order of the sum is the same.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    rms_norm_twice_read_kernel(typename Traits::Input in, Vector<const typename Traits::F> weight,
                               typename Traits::F eps, Matrix<typename Traits::A> out,
                               Matrix<typename Traits::F> rstd) {
  using F = typename Traits::F;
  launch_dependents();
  grid_dependency_wait();
  const Index all = in.width(), group = blockIdx.y, first = group * all;
  // f(column) for this thread's elements of a position.
  const auto for_mine = [&](auto&& f) {
    for (Index c = Index{threadIdx.x} * Traits::width; c < all; c += Traits::threads * Traits::width)
#pragma unroll
      for (int k = 0; k < Traits::width; ++k)
        if (c + k < all) f(first + c + k);
  };
  const F share = F(1) / F(all);
  for (Index i = blockIdx.x; i < out.rows(); i += gridDim.x) {
    const auto sum_of_squares = [&](F factor) {
      F squares = 0;
      for_mine([&](Index c) { squares += square(in.value(i, c) * factor); });
      return block_sum<Traits::threads>(squares);
    };
    const F sum = sum_of_squares(F(1));
    F scale = ::rsqrt(::fma(sum, share, eps));
    if (!is_finite(sum)) [[unlikely]]
      scale = small_scale<F> * ::rsqrt(sum_of_squares(small_scale<F>) * share);
    if (threadIdx.x == 0) rstd(i, group) = scale;
    for_mine([&](Index c) { out(i, c) = typename Traits::A(weight[c] * (in.value(i, c) * scale)); });
  }
}

/// The forward pass of any input, over the groups that rstd (positions, groups) has.
template <class Input, class A, class F>
void launch_norm(Context<cuda>& ctx, const Input& in, Vector<const F> weight, double eps, Matrix<A> out, Matrix<F> rstd,
                 const char* name) {
  if (out.rows() == 0) return;
  const Index width = out.cols() / rstd.cols();
  const bool whole =
      in.in_vectors() && width % vector_width<A> == 0 && in_vectors(out) && aligned(weight, vector_width<F>);
  const auto queue = [&](auto kernel, Index blocks, int threads, std::size_t shared) {
    const Index each = ceil_div(out.rows(), blocks);  // about equally many positions a block
    const dim3 grid(static_cast<unsigned>(ceil_div(out.rows(), each)), static_cast<unsigned>(rstd.cols()));
    launch(ctx, overlap_for(out.rows()), name, kernel, grid, static_cast<unsigned>(threads), shared, in, weight,
           static_cast<F>(eps), out, rstd);
  };
  const auto by = [&]<class Traits>(Traits) {
    if (whole && width <= Traits::most)
      queue(rms_norm_kernel<Traits>, std::max(Index{1}, Traits::blocks * ctx.multiprocessors() / rstd.cols()),
            Traits::threads, Traits::shared);
    else
      queue(rms_norm_twice_read_kernel<Traits>, Index{1} << 20, Traits::threads, 0);
  };
  using Few = NormTraits<Input, true>;
  width <= Few::most ? by(Few{}) : by(NormTraits<Input, false>{});
}

/// d_v = rstd * (g - u * mean(g * u))
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    rms_norm_input_gradient_kernel(typename Traits::Input in, Matrix<const typename Traits::A> d_out,
                                   Vector<const typename Traits::F> weight, Vector<const typename Traits::F> rstd) {
  using F = typename Traits::F;
  const Index width = in.width();
  for (Index i = blockIdx.x; i < d_out.rows(); i += gridDim.x) {
    const F scale = rstd[i];
    F product = 0;
    for (Index c = threadIdx.x; c < width; c += Traits::threads)
      product += weight[c] * F(d_out(i, c)) * (in.value(i, c) * scale);
    const F mean = block_sum<Traits::threads>(product) / F(width);
    for (Index c = threadIdx.x; c < width; c += Traits::threads)
      in.add_gradient(i, c, scale * (weight[c] * F(d_out(i, c)) - mean * (in.value(i, c) * scale)));
  }
}

/// partial (groups, width): each group's sum of d_out * v * rstd, positions in order.
template <class Traits>
__global__ void __launch_bounds__(Traits::columns)
    rms_norm_weight_gradient_kernel(typename Traits::Input in, Matrix<const typename Traits::A> d_out,
                                    Vector<const typename Traits::F> rstd, Index group_size,
                                    Matrix<typename Traits::F> partial) {
  using F = typename Traits::F;
  const Index c = Index{blockIdx.x} * Traits::columns + threadIdx.x, group = blockIdx.y;
  if (c >= in.width()) return;
  const Index end = ::min(d_out.rows(), (group + 1) * group_size);
  F sum = 0;
  for (Index i = group * group_size; i < end; ++i) sum += F(d_out(i, c)) * (in.value(i, c) * rstd[i]);
  partial(group, c) = sum;
}

/// d_weight += the sum of partial (groups, width) over the groups, in order.
template <class F>
__global__ void add_groups_kernel(Matrix<const F> partial, Vector<F> d_weight) {
  const Index c = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= partial.cols()) return;
  F sum = d_weight[c];
  for (Index group = 0; group < partial.rows(); ++group) sum += partial(group, c);
  d_weight[c] = sum;
}

}  // namespace kernel

template <>
struct RmsNorm<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> t, Vector<const F> weight, double eps,
                      Matrix<A> out, Vector<F> rstd) {
    launch_forward(ctx, kernel::SummedInput<A>{x, t, {}, {}}, weight, eps, out, rstd);
  }

  template <class A, class F>
  static void backward(Context<cuda>& ctx, Matrix<const A> d_out, Matrix<const A> x, Matrix<const A> t,
                       Vector<const F> weight, Vector<const F> rstd, Matrix<A> d_x, Matrix<A> d_t, Vector<F> d_weight) {
    launch_backward(ctx, kernel::SummedInput<A>{x, t, d_x, d_t}, d_out, weight, rstd, d_weight);
  }

  template <class A, class F>
  static void concat_forward(Context<cuda>& ctx, Matrix<const A> a, Matrix<const A> b, Vector<const F> weight,
                             double eps, Matrix<A> out, Vector<F> rstd) {
    launch_forward(ctx, kernel::ConcatenatedInput<A>{a, b, {}, {}}, weight, eps, out, rstd);
  }

  template <class A, class F>
  static void concat_backward(Context<cuda>& ctx, Matrix<const A> d_out, Matrix<const A> a, Matrix<const A> b,
                              Vector<const F> weight, Vector<const F> rstd, Matrix<A> d_a, Matrix<A> d_b,
                              Vector<F> d_weight) {
    launch_backward(ctx, kernel::ConcatenatedInput<A>{a, b, d_a, d_b}, d_out, weight, rstd, d_weight);
  }

 private:
  /// At most this many partial sums of d_weight.
  static constexpr Index groups_at_most = 64;

  template <class Input, class A, class F>
  static void launch_forward(Context<cuda>& ctx, const Input& in, Vector<const F> weight, double eps, Matrix<A> out,
                             Vector<F> rstd) {
    kernel::launch_norm(ctx, in, weight, eps, out, Matrix<F>(rstd.data, out.rows(), 1), "rms_norm");
  }

  template <class Input, class A, class F>
  static void launch_backward(Context<cuda>& ctx, const Input& in, Matrix<const A> d_out, Vector<const F> weight,
                              Vector<const F> rstd, Vector<F> d_weight) {
    using Traits = kernel::RmsNormTraits<Input>;
    const Index n = d_out.rows(), width = d_weight.size();
    if (n == 0) return;
    kernel::rms_norm_input_gradient_kernel<Traits>
        <<<kernel::blocks_for(n, 1), Traits::threads, 0, ctx.stream()>>>(in, d_out, weight, rstd);
    kernel::check_launch("rms_norm_backward: input");

    const Index group_size = std::max(Index{8}, ceil_div(n, groups_at_most));
    const Index groups = ceil_div(n, group_size);
    const unsigned across = kernel::blocks_for(width, Traits::columns);
    ArenaScope scope(ctx.arena());
    const auto partial = ctx.arena().template tensor<F>(groups, width);
    kernel::rms_norm_weight_gradient_kernel<Traits>
        <<<dim3(across, static_cast<unsigned>(groups)), Traits::columns, 0, ctx.stream()>>>(in, d_out, rstd, group_size,
                                                                                            partial);
    kernel::add_groups_kernel<F><<<across, Traits::columns, 0, ctx.stream()>>>(partial, d_weight);
    kernel::check_launch("rms_norm_backward: weight");
  }
};

}  // namespace zamba
