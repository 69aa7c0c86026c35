// SPDX-License-Identifier: MIT
// The backward pass of rms_norm on CUDA, and of what has such a norm of another input.
//
// One pass over memory: a persistent block takes every so-manieth position, its part of the weight in registers and
// beside it the sum of d_out * u over its positions. cp.async brings the next positions to shared memory, d_out and
// the gradients that are added to with them, while the block reduces this one's mean(g * u). The blocks' sums go to
// `partial`, which add_parts() adds to d_weight. Two passes, and the sum in `partial` from the first position on, where
// a position is too wide for that or not in vectors of 16 bytes.
//
// Order of sums, the same in both kernels: mean(g * u) as the forward pass has its squares; d_weight over the positions
// of a block in order, then over blocks, of which there are as many as the extents say.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/add_parts.cuh>
#include <zamba/kernel/async_copy.cuh>
#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// A thread has `vectors` pieces of 16 bytes of a position.
template <class Input_, int Threads, int Vectors>
struct NormGradientTraits {
  using Input = Input_;
  using A = typename Input::A;
  using F = typename Input::F;
  static constexpr int threads = Threads, vectors = Vectors;
  static constexpr int blocks = 1024 / (threads * vectors);  // of a multiprocessor
  static constexpr int width = vector_width<A>;              // elements of a vector
  static constexpr int most = threads * width * vectors;     // elements of a position
  static constexpr int ahead = 3;                            // positions that are there or on their way
  static constexpr int inputs = Input::vectors, added = Input::added, fetched = inputs + 1 + added;
  static constexpr std::size_t shared = 16 * threads * vectors * fetched * ahead;
  /// Blocks for a whole GPU of 132 multiprocessors; fixed, because they make the order of sums.
  static constexpr Index parts_at_most = 132 * blocks;
};

/// For groups of at most Traits::most elements, in vectors of 16 bytes; blockIdx.y counts the groups of a position.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads, Traits::blocks)
    rms_norm_gradient_kernel(typename Traits::Input in, Matrix<const typename Traits::A> d_out,
                             Vector<const typename Traits::F> weight, Matrix<const typename Traits::F> rstd,
                             Matrix<typename Traits::F> partial) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  constexpr int width = Traits::width, vectors = Traits::vectors, inputs = Traits::inputs, ahead = Traits::ahead;
  launch_dependents();
  const int all = static_cast<int>(in.width()), mine = static_cast<int>(threadIdx.x) * width;
  const Index group = blockIdx.y, first = group * all + mine, rows = d_out.rows(), next = gridDim.x;
  constexpr int step = Traits::threads * width;
  F weights[vectors][width], d_weights[vectors][width] = {};
#pragma unroll
  for (int p = 0; p < vectors; ++p)
    if (mine + p * step < all) load_vector_readonly<width>(&weight[first + p * step]).unpack(weights[p]);
  grid_dependency_wait();

  // A thread reads what it fetches itself, so only the sums meet at a barrier.
  using Vector = AlignedVector<A, width>;
  extern __shared__ uint4 norm_gradient_memory[];  // vectors (ahead, vectors of a thread, fetched, threads)
  const auto place = [&](int slot, int p, int k) -> Vector& {
    const int at = ((slot * vectors + p) * Traits::fetched + k) * Traits::threads + static_cast<int>(threadIdx.x);
    return reinterpret_cast<Vector*>(norm_gradient_memory)[at];
  };
  const auto fetch = [&](Index i, int slot) {
    if (i < rows) {
#pragma unroll
      for (int p = 0; p < vectors; ++p) {
        const Index c = first + p * step;
        if (mine + p * step >= all) continue;
        const auto copy = [&](int k, const A* from) { copy_async(&place(slot, p, k), from, true); };
        in.fetch(i, c, copy);
        copy(inputs, &d_out(i, c));
        in.fetch_added(i, c, [&](int k, const A* from) { copy(inputs + 1 + k, from); });
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int slot = 0; slot < ahead; ++slot) fetch(blockIdx.x + next * slot, slot);
  const F share = F(1) / F(all);
  int turn = 0, slot = 0;
  F scale = blockIdx.x < rows ? rstd(blockIdx.x, group) : F(0);
  for (Index i = blockIdx.x; i < rows; i += next, turn ^= 1) {
    const F next_scale = i + next < rows ? rstd(i + next, group) : F(0);
    copy_async_wait<ahead - 1>();
    F u[vectors][width], g[vectors][width], product = 0;
#pragma unroll
    for (int p = 0; p < vectors; ++p)
      if (mine + p * step < all) {
        in.values([&](int k) { return place(slot, p, k); }, u[p]);
        place(slot, p, inputs).unpack(g[p]);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          u[p][k] *= scale;
          d_weights[p][k] = ::fma(g[p][k], u[p][k], d_weights[p][k]);
          g[p][k] *= weights[p][k];
          product = ::fma(g[p][k], u[p][k], product);
        }
      }
    const F mean = block_sum_in_turn<Traits::threads>(product, turn) * share;
#pragma unroll
    for (int p = 0; p < vectors; ++p)
      if (mine + p * step < all) {
#pragma unroll
        for (int k = 0; k < width; ++k) g[p][k] = scale * ::fma(-mean, u[p][k], g[p][k]);
        in.store_gradients(
            i, first + p * step, g[p], [&](int k) { return place(slot, p, k); },
            [&](int k) { return place(slot, p, inputs + 1 + k); });
      }
    fetch(i + next * ahead, slot);
    slot = slot + 1 < ahead ? slot + 1 : 0;
    scale = next_scale;
  }
#pragma unroll
  for (int p = 0; p < vectors; ++p)
    if (mine + p * step < all) store_vector(&partial(blockIdx.x, first + p * step), d_weights[p]);
}

/// For groups of any width and alignment.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    rms_norm_gradient_two_pass_kernel(typename Traits::Input in, Matrix<const typename Traits::A> d_out,
                                      Vector<const typename Traits::F> weight, Matrix<const typename Traits::F> rstd,
                                      Matrix<typename Traits::F> partial) {
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
  for_mine([&](Index c) { partial(blockIdx.x, c) = 0; });
  const F share = F(1) / F(all);
  for (Index i = blockIdx.x; i < d_out.rows(); i += gridDim.x) {
    const F scale = rstd(i, group);
    F product = 0;
    for_mine([&](Index c) {
      const F d = F(d_out(i, c)), u = in.value(i, c) * scale;
      partial(blockIdx.x, c) = ::fma(d, u, partial(blockIdx.x, c));
      product = ::fma(d * weight[c], u, product);
    });
    const F mean = block_sum<Traits::threads>(product) * share;
    for_mine([&](Index c) {
      in.give_gradient(i, c, scale * ::fma(-mean, in.value(i, c) * scale, F(d_out(i, c)) * weight[c]));
    });
  }
}

/// f(the traits for groups of `width` elements).
template <class Input, class F>
auto with_norm_gradient_traits(Index width, F&& f) {
  using Narrow = NormGradientTraits<Input, 128, 1>;
  using Middle = NormGradientTraits<Input, 512, 1>;
  using Wide = NormGradientTraits<Input, 512, 2>;
  return width <= Narrow::most ? f(Narrow{}) : width <= Middle::most ? f(Middle{}) : f(Wide{});
}

/// Partial sums of the weight's gradient over positions (rows) of so many groups.
template <class Input, class Ctx, class F>
Matrix<F> norm_gradient_scratch(Ctx& ctx, Index rows, Index groups, Vector<F> d_weight) {
  constexpr Index least = 4;  // positions of a block, so that the parts are few beside them
  const auto most = [](auto traits) { return Index{decltype(traits)::parts_at_most}; };
  const Index width = d_weight.size() / groups, at_most = with_norm_gradient_traits<Input>(width, most);
  return ctx.arena().template tensor<F>(std::clamp<Index>(at_most / groups, 1, ceil_div(rows, least)), d_weight.size());
}

/// The gradients of any input, over the groups that rstd (positions, groups) has, and of the weight, which are added.
template <class Input, class A, class F>
void launch_norm_gradient(Context<cuda>& ctx, const Input& in, Matrix<const A> d_out, Vector<const F> weight,
                          Matrix<const F> rstd, Vector<F> d_weight, const char* name) {
  const Index rows = d_out.rows(), groups = rstd.cols(), width = d_out.cols() / groups;
  if (rows == 0 || width == 0) return;
  const bool whole = in.in_vectors() && in.gradients_in_vectors() && width % vector_width<A> == 0 &&
                     in_vectors(d_out) && aligned(weight, vector_width<F>);
  ArenaScope scope(ctx.arena());
  const Matrix<F> partial = norm_gradient_scratch<Input>(ctx, rows, groups, d_weight);
  const Index parts = partial.rows();
  const auto by = [&]<class Traits>(Traits) {
    const auto queue = [&](auto kernel, std::size_t shared) {
      launch(ctx, overlap_for(rows), name, kernel, dim3(static_cast<unsigned>(parts), static_cast<unsigned>(groups)),
             Traits::threads, shared, in, d_out, weight, rstd, partial);
    };
    if (whole && width <= Traits::most)
      queue(rms_norm_gradient_kernel<Traits>, Traits::shared);
    else
      queue(rms_norm_gradient_two_pass_kernel<Traits>, 0);
    add_parts(ctx, Matrix<const F>(partial), AddToVector<F>{d_weight}, name);
  };
  with_norm_gradient_traits<Input>(width, by);
}

}  // namespace zamba::kernel
