// SPDX-License-Identifier: MIT
// rms_norm on CUDA; equations and shapes in rms_norm.hpp.
//
// Forward, single pass: a persistent block takes positions in turn, its parts of the weight and of v in registers, and
// cp.async brings the next positions to shared memory while the block reduces this one's sum of squares. Two passes
// over memory where a position is too wide for that, or not in vectors of 16 bytes. Backward: rms_norm/backward.cuh.
//
// Numeric contract: sums in compute_t, in an order fixed by the width; backwards also by the number of positions.
// Agrees with the CPU version to rounding, a rerun is bit-equal. Activations stored as bf16 are rounded once, when
// written.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/async_copy.cuh>
#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/ops/rms_norm/backward.cuh>

namespace zamba {

namespace kernel {

/// Writes a vector and what is added to it.
template <class A, int N>
__device__ void store_sum(A* to, const AlignedVector<A, N>& vector, const compute_t<A> (&more)[N]) {
  compute_t<A> sum[N];
  vector.unpack(sum);
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k] += more[k];
  store_vector(to, sum);
}

/// v = x + t, or x where t is absent; its gradient goes to d_x and, where wanted, d_t.
template <class A_>
struct SummedInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> x, t;
  Matrix<A> d_x, d_t;

  __device__ Index width() const { return x.cols(); }
  __device__ F value(Index i, Index c) const { return F(x(i, c)) + (t ? F(t(i, c)) : F(0)); }
  /// For neighbouring values from column c on: fetch(k, address of the k-th vector), and what values() makes of
  /// fetched(k).
  static constexpr int vectors = 2;
  template <class Fetch>
  __device__ void fetch(Index i, Index c, Fetch&& fetch) const {
    fetch(0, &x(i, c));
    if (t) fetch(1, &t(i, c));
  }
  template <class Fetched>
  __device__ void values(Fetched&& fetched, F (&to)[vector_width<A>]) const {
    fetched(0).unpack(to);
    if (!t) return;
    F more[vector_width<A>];
    fetched(1).unpack(more);
#pragma unroll
    for (int k = 0; k < vector_width<A>; ++k) to[k] += more[k];
  }
  bool in_vectors() const { return kernel::in_vectors(x) && (!t || kernel::in_vectors(t)); }

  /// Backwards: where the gradient of v goes. `added` vectors of what it is added to are fetched, as above.
  static constexpr int added = 1;
  template <class Fetch>
  __device__ void fetch_added(Index i, Index c, Fetch&& fetch) const {
    fetch(0, &d_x(i, c));
  }
  template <class Fetched, class Added>
  __device__ void store_gradients(Index i, Index c, const F (&d_v)[vector_width<A>], Fetched&&, Added&& to) const {
    store_sum<A>(&d_x(i, c), to(0), d_v);
    if (d_t) store_vector(&d_t(i, c), d_v);
  }
  __device__ void give_gradient(Index i, Index c, F d_v) const {
    d_x(i, c) = A(F(d_x(i, c)) + d_v);
    if (d_t) d_t(i, c) = A(d_v);
  }
  bool gradients_in_vectors() const { return kernel::in_vectors(d_x) && (!d_t || kernel::in_vectors(d_t)); }
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
  static constexpr int vectors = 1;
  template <class Fetch>
  __device__ void fetch(Index i, Index c, Fetch&& fetch) const {
    fetch(0, c < a.cols() ? &a(i, c) : &b(i, c - a.cols()));
  }
  template <class Fetched>
  __device__ void values(Fetched&& fetched, F (&to)[vector_width<A>]) const {
    fetched(0).unpack(to);
  }
  bool in_vectors() const { return kernel::in_vectors(a) && kernel::in_vectors(b); }

  static constexpr int added = 1;
  __device__ A* gradient(Index i, Index c) const { return c < a.cols() ? &d_a(i, c) : &d_b(i, c - a.cols()); }
  template <class Fetch>
  __device__ void fetch_added(Index i, Index c, Fetch&& fetch) const {
    fetch(0, gradient(i, c));
  }
  template <class Fetched, class Added>
  __device__ void store_gradients(Index i, Index c, const F (&d_v)[vector_width<A>], Fetched&&, Added&& to) const {
    store_sum<A>(gradient(i, c), to(0), d_v);
  }
  __device__ void give_gradient(Index i, Index c, F d_v) const {
    A* const d = gradient(i, c);
    *d = A(F(*d) + d_v);
  }
  bool gradients_in_vectors() const { return kernel::in_vectors(d_a) && kernel::in_vectors(d_b); }
};

/// The forward pass, by a block of few threads or of twice as many. In bf16 and float those hold up to 4096 and 8192
/// elements in registers, in double half of that.
template <class Input_, bool Few>
struct NormTraits {
  using Input = Input_;
  using A = typename Input::A;
  using F = typename Input::F;
  static constexpr int threads = Few ? 256 : 512, blocks = (sizeof(A) == 2 ? 1024 : 512) / threads;
  static constexpr int width = vector_width<A>;           // elements of a vector
  static constexpr int vectors = sizeof(A) == 2 ? 2 : 4;  // of a thread
  static constexpr int ahead = sizeof(A) == 2 ? 2 : 1;    // positions that are on their way
  static constexpr int most = threads * width * vectors;  // elements of a position
  static constexpr std::size_t shared = 16 * threads * vectors * Input::vectors * ahead;
};

template <class F>
__device__ F square(F x) {
  return x * x;
}

/// For groups of at most Traits::most elements, in vectors of 16 bytes; blockIdx.y counts the groups of a position.
/// More than by the bytes under way, the time is bound by the waits of a block for its sum: so a thread has few
/// elements, and a multiprocessor many threads.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    rms_norm_kernel(typename Traits::Input in, Vector<const typename Traits::F> weight, typename Traits::F eps,
                    Matrix<typename Traits::A> out, Matrix<typename Traits::F> rstd) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int width = Traits::width, vectors = Traits::vectors;
  launch_dependents();
  const int all = static_cast<int>(in.width()), mine = static_cast<int>(threadIdx.x) * width;
  const Index group = blockIdx.y, first = group * all + mine;
  constexpr int step = Traits::threads * width;
  F weights[vectors][width];
#pragma unroll
  for (int p = 0; p < vectors; ++p)
    if (mine + p * step < all) load_vector_readonly<width>(&weight[first + p * step]).unpack(weights[p]);
  grid_dependency_wait();

  // A thread reads what it fetches itself, so only the sums meet at a barrier.
  using Vector = AlignedVector<A, width>;
  extern __shared__ uint4 norm_memory[];  // vectors (ahead, vectors of a thread, inputs, threads)
  constexpr int inputs = Traits::Input::vectors;
  const auto place = [&](int slot, int p, int k) -> Vector& {
    const int at = ((slot * vectors + p) * inputs + k) * Traits::threads + static_cast<int>(threadIdx.x);
    return reinterpret_cast<Vector*>(norm_memory)[at];
  };
  const auto fetch = [&](Index i, int slot) {
    if (i < out.rows()) {
#pragma unroll
      for (int p = 0; p < vectors; ++p)
        if (mine + p * step < all)
          in.fetch(i, first + p * step, [&](int k, const auto* from) { copy_async(&place(slot, p, k), from, true); });
    }
    copy_async_commit();
  };
#pragma unroll
  for (int slot = 0; slot < Traits::ahead; ++slot) fetch(blockIdx.x + Index{gridDim.x} * slot, slot);
  const F share = F(1) / F(all);
  int turn = 0, slot = 0;
  for (Index i = blockIdx.x; i < out.rows(); i += gridDim.x, turn ^= 1) {
    copy_async_wait<Traits::ahead - 1>();
    F v[vectors][width], squares = 0;
#pragma unroll
    for (int p = 0; p < vectors; ++p)
      if (mine + p * step < all) {
        in.values([&](int k) { return place(slot, p, k); }, v[p]);
#pragma unroll
        for (int k = 0; k < width; ++k) squares += v[p][k] * v[p][k];
      }
    F sum = block_sum_in_turn<Traits::threads>(squares, turn);
    fetch(i + Index{gridDim.x} * Traits::ahead, slot);
    slot = slot + 1 < Traits::ahead ? slot + 1 : 0;
    F scale = ::rsqrt(::fma(sum, share, eps));
    if (!is_finite(sum)) [[unlikely]] {  // squares overflowed, of all threads alike
      squares = 0;
#pragma unroll
      for (int p = 0; p < vectors; ++p)
        if (mine + p * step < all)
#pragma unroll
          for (int k = 0; k < width; ++k) squares += square(v[p][k] * small_scale<F>);
      __syncthreads();  // the sum has been read, whose place this one takes
      sum = block_sum_in_turn<Traits::threads>(squares, turn);
      scale = small_scale<F> * ::rsqrt(sum * share);
    }
    if (threadIdx.x == 0) rstd(i, group) = scale;
#pragma unroll
    for (int p = 0; p < vectors; ++p)
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
    rms_norm_two_pass_kernel(typename Traits::Input in, Vector<const typename Traits::F> weight, typename Traits::F eps,
                             Matrix<typename Traits::A> out, Matrix<typename Traits::F> rstd) {
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
      queue(rms_norm_two_pass_kernel<Traits>, Index{1} << 20, Traits::threads, 0);
  };
  using Few = NormTraits<Input, true>;
  width <= Few::most ? by(Few{}) : by(NormTraits<Input, false>{});
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

  template <class Ctx, class A, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const A> d_out, Matrix<const A>, Matrix<const A>, Vector<const F>,
                               Vector<const F>, Matrix<A>, Matrix<A>, Vector<F> d_weight) {
    // Of concatenated inputs the same: their traits differ in what does not count here.
    kernel::norm_gradient_scratch<kernel::SummedInput<A>>(ctx, d_out.rows(), 1, d_weight);
  }

 private:
  template <class Input, class A, class F>
  static void launch_forward(Context<cuda>& ctx, const Input& in, Vector<const F> weight, double eps, Matrix<A> out,
                             Vector<F> rstd) {
    kernel::launch_norm(ctx, in, weight, eps, out, Matrix<F>(rstd.data, out.rows(), 1), "rms_norm");
  }

  template <class Input, class A, class F>
  static void launch_backward(Context<cuda>& ctx, const Input& in, Matrix<const A> d_out, Vector<const F> weight,
                              Vector<const F> rstd, Vector<F> d_weight) {
    kernel::launch_norm_gradient(ctx, in, d_out, weight, Matrix<const F>(rstd.data, d_out.rows(), 1), d_weight,
                                 "rms_norm_backward");
  }
};

}  // namespace zamba
