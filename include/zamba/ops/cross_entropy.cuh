// SPDX-License-Identifier: MIT
// cross_entropy on CUDA; equations and shapes in cross_entropy.hpp.
//
// In tiles of positions, of at most 2^27 logits: cuBLAS makes a tile's logits, a kernel (ops/cross_entropy/softmax.cuh)
// turns them into losses and, in place, into their gradients, and cuBLAS makes of those d_h and what is added to d_head
// in float32. A tile is as large as that because each reads and writes all of d_head: on an H200, with a width of 3712
// and 32,000 logits, 1024 positions a tile make the whole take 13 % longer than 8192.
//
// The losses are summed on the device, in double and in a fixed order.
//
// Numeric contract: logits are stored as A, rounded once; so bf16 logits are within 2^-9 of their values, as those of
// other bf16 training are. Softmax in compute_t of what is stored, of bf16 with approximate exponentials; the sum of
// exponentials in compute_t by threads, then in double. The gradients of logits are rounded to A where they are
// written. A rerun is bit-equal.
#pragma once

#include <algorithm>

#include <zamba/context.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/cross_entropy.hpp>
#include <zamba/ops/cross_entropy/softmax.cuh>
#include <zamba/ops/linear.cuh>

namespace zamba {

template <>
struct CrossEntropy<cuda> {
  template <class A, class Weights>
  static void forward(Context<cuda>& ctx, Matrix<const A> h, const Weights& head, const Token* targets, double z_loss,
                      LossSum* total) {
    over_tiles<false>(ctx, h, head, targets, {0, z_loss}, total, [](Index, Matrix<A>) {});
  }
  template <class A, class Weights, class F>
  static void backward(Context<cuda>& ctx, Matrix<const A> h, const Weights& head, const Token* targets, double scale,
                       Matrix<A> d_h, Matrix<F> d_head, double z_loss, LossSum* total) {
    over_tiles<true>(ctx, h, head, targets, {scale, z_loss}, total, [&](Index first, Matrix<A> d_logits) {
      const Index rows = d_logits.rows();
      Linear<cuda>::backward(ctx, Matrix<const A>(d_logits), h.slice(first, rows), head, d_h.slice(first, rows),
                             Accumulate::no, d_head, Vector<F>{});
    });
  }

  template <class Ctx, class A, class Weights, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const A> h, const Weights& head, const Token*, double, Matrix<A>,
                               Matrix<F>, const auto&...) {
    const Matrix<A> logits = tile_room<A>(ctx, h.rows(), head.rows()).logits;
    Linear<cuda>::scratch(ctx, h.slice(0, logits.rows()), head, logits, Matrix<const A>{}, Vector<const F>{});
  }

 private:
  /// Logits that exist at a time.
  static constexpr Index tile_size = Index{1} << 27;

  template <class A>
  struct Tile {
    Matrix<A> logits;       // of a tile; rows begin at multiples of 16 bytes, whatever the vocabulary
    Vector<double> losses;  // of all positions
  };
  template <class A, class Ctx>
  static Tile<A> tile_room(Ctx& ctx, Index n, Index vocabulary) {
    constexpr Index width = kernel::vector_width<A>;
    const Index stride = ceil_div(vocabulary, width) * width, most = std::max<Index>(1, tile_size / stride);
    const Index rows = ceil_div(n, std::max<Index>(1, ceil_div(n, most)));
    return {ctx.arena().template tensor<A>(rows, stride).columns(0, vocabulary),
            ctx.arena().template tensor<double>(n)};
  }

  /// Queues the losses, and calls f(first position, logits or their gradients) for every tile.
  template <bool Gradient, class A, class Weights, class F>
  static void over_tiles(Context<cuda>& ctx, Matrix<const A> h, const Weights& head, const Token* targets,
                         kernel::LossFactors factors, LossSum* total, F&& f) {
    using Traits = kernel::SoftmaxLossTraits<A, Gradient>;
    const Index n = h.rows();
    ArenaScope scope(ctx.arena());
    const auto [logits, losses] = tile_room<A>(ctx, n, head.rows());
    const Index rows = logits.rows();
    for (Index first = 0; first < n; first += rows) {
      const Index count = std::min(rows, n - first);
      const auto tile = logits.slice(0, count);
      Linear<cuda>::forward(ctx, h.slice(first, count), head, tile, Matrix<const A>{}, Vector<const compute_t<A>>{});
      kernel::launch(ctx, kernel::overlap_for(count), "cross_entropy: softmax", kernel::softmax_loss_kernel<Traits>,
                     kernel::blocks_for(count, 1), Traits::threads, 0, tile, targets + first, factors,
                     losses.data + first);
      f(first, tile);
    }
    constexpr int threads = 1024;
    kernel::launch(ctx, kernel::overlap_for(n), "cross_entropy: sum", kernel::sum_losses_kernel<threads>, 1, threads, 0,
                   losses, targets, total);
  }
};

}  // namespace zamba
