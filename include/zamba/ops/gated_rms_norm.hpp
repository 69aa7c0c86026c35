// SPDX-License-Identifier: MIT
// gated_rms_norm: the norm that ends a Mamba-2 mixer, of a gated input, over groups of channels.
//
//   v = x * silu(z),   out = weight * v * rstd_g,   rstd_g = 1 / sqrt(mean of v^2 over group g + eps)
//
// Source: Mamba-2 (arXiv 2405.21060), section 7.2; groups: Zamba2 (arXiv 2411.15242).
//
// Shapes: x, z, out (n, D); weight (D); rstd (n, G) of G groups of D / G neighbouring channels.
// Kept for the backward pass: rstd.
//   u = v * rstd,   g = weight * d_out,   d_v = rstd * (g - u * mean(g * u)),   d_x = d_v * silu(z),   d_z = d_v * x *
//   silu'(z)
//
// Numeric contract: as rms_norm.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

ZAMBA_DECLARE_OPERATOR(GatedRmsNorm, "gated_rms_norm.cuh");

/// out (n, D) = weight (D) * x silu(z) * rstd; rstd (n, G) is written.
template <class Device, class A>
void gated_rms_norm(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> x,
                    std::type_identity_t<Matrix<const A>> z, Vector<const compute_t<A>> weight, double eps,
                    Matrix<A> out, Matrix<compute_t<A>> rstd) {
  if constexpr (checked) {
    const kernel::Door door{"gated_rms_norm"};
    door.shape("x", x, out.rows(), out.cols());
    door.shape("z", z, out.rows(), out.cols());
    door.shape("weight", weight, out.cols());
    door.shape("rstd", rstd, out.rows(), rstd.cols());
    require(rstd.cols() > 0 && out.cols() % rstd.cols() == 0, "gated_rms_norm: ", out.cols(), " channels in ",
            rstd.cols(), " groups");
  }
  GatedRmsNorm<Device>::template forward<A>(ctx, x, z, weight, eps, out, rstd);
}

/// Assigns d_x and d_z (n, D); adds to d_weight (D).
template <class Device, class A>
void gated_rms_norm_backward(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> d_out,
                             std::type_identity_t<Matrix<const A>> x, std::type_identity_t<Matrix<const A>> z,
                             Vector<const compute_t<A>> weight, Matrix<const compute_t<A>> rstd, Matrix<A> d_x,
                             std::type_identity_t<Matrix<A>> d_z, Vector<compute_t<A>> d_weight) {
  if constexpr (checked) {
    const kernel::Door door{"gated_rms_norm_backward"};
    const Index n = d_out.rows(), D = d_out.cols();
    door.shape("x", x, n, D);
    door.shape("z", z, n, D);
    door.shape("weight", weight, D);
    door.shape("rstd", rstd, n, rstd.cols());
    require(rstd.cols() > 0 && D % rstd.cols() == 0, "gated_rms_norm_backward: ", D, " channels in ", rstd.cols(),
            " groups");
    door.shape("d_x", d_x, n, D);
    door.shape("d_z", d_z, n, D);
    door.shape("d_weight", d_weight, D);
  }
  GatedRmsNorm<Device>::template backward<A>(ctx, d_out, x, z, weight, rstd, d_x, d_z, d_weight);
}

template <>
struct GatedRmsNorm<cpu> {
  template <class A, class F>
  static void forward(Context<cpu>& ctx, Matrix<const A> x, Matrix<const A> z, Vector<const F> weight, double eps,
                      Matrix<A> out, Matrix<F> rstd) {
    static_assert(std::is_same_v<A, F>, "zamba: on the CPU activations are of the compute type");
    const Index groups = rstd.cols(), width = out.cols() / groups;
    ctx.parallel_for(ceil_div(out.rows(), forward_rows), [&](Index task, int) {
      const Index end = std::min(out.rows(), (task + 1) * forward_rows);
      for (Index i = task * forward_rows; i < end; ++i)
        for (Index g = 0; g < groups; ++g) {
          const Index first = g * width;
          Pack<A> squares = kernel::zeros<A>();
          for_gated(x, z, i, first, width, [&](Index c, auto count, const Pack<A>& v) {
            squares += v * v;
            kernel::store(&out(i, c), v, count);
          });
          rstd(i, g) = kernel::reciprocal_root(kernel::sum<A>(squares), width, eps, [=](A scale) {
            Pack<A> sum = kernel::zeros<A>();
            kernel::for_packs<A>(width, [&](Index k, auto count) {
              const Pack<A> scaled = ZAMBA_AS_WRITTEN(kernel::load<A>(&out(i, first + k), count) * scale);
              sum += scaled * scaled;
            });
            return kernel::sum<A>(sum);
          });
          kernel::for_packs<A>(width, [&](Index k, auto count) {
            A* at = &out(i, first + k);
            const Pack<A> scaled = ZAMBA_AS_WRITTEN(kernel::load<A>(at, count) * rstd(i, g));
            kernel::store(at, Pack<A>(scaled * kernel::load(weight.data + first + k, count)), count);
          });
        }
    });
  }

  template <class A, class F>
  static void backward(Context<cpu>& ctx, Matrix<const A> d_out, Matrix<const A> x, Matrix<const A> z,
                       Vector<const F> weight, Matrix<const F> rstd, Matrix<A> d_x, Matrix<A> d_z, Vector<F> d_weight) {
    static_assert(std::is_same_v<A, F>, "zamba: on the CPU activations are of the compute type");
    const Index n = d_out.rows(), D = d_out.cols(), groups = rstd.cols(), width = D / groups;
    if (n == 0) return;
    const Index rows = rows_of_task(n);
    ArenaScope scope(ctx.arena());
    const Matrix<F> partial = backward_scratch(ctx, d_out, x, z, weight, rstd, d_x, d_z, d_weight);
    const Index tasks = partial.rows();
    ctx.parallel_for(tasks, [&](Index task, int) {
      F* const d_w = &partial(task, 0);
      std::fill_n(d_w, D, F(0));
      const Index end = std::min(n, (task + 1) * rows);
      for (Index i = task * rows; i < end; ++i)
        for (Index g = 0; g < groups; ++g) {
          const Index first = g * width;
          const F r = rstd(i, g);
          Pack<A> product = kernel::zeros<A>();
          for_gated(x, z, i, first, width, [&](Index c, auto count, const Pack<A>& v) {
            const Pack<A> d = kernel::load(&d_out(i, c), count), u = ZAMBA_AS_WRITTEN(v * r);
            product += kernel::load(weight.data + c, count) * d * u;
            kernel::store(d_w + c, Pack<A>(kernel::load(d_w + c, count) + d * u), count);
          });
          const F mean = kernel::sum<A>(product) / static_cast<F>(width);
          kernel::for_packs<A>(width, [&](Index k, auto count) {
            const Index c = first + k;
            const Pack<A> x_c = kernel::load(&x(i, c), count), z_c = kernel::load(&z(i, c), count);
            const Pack<A> gate = kernel::sigmoid<A>(z_c), silu = ZAMBA_AS_WRITTEN(z_c * gate);
            const Pack<A> d_out_c = kernel::load(&d_out(i, c), count),
                          u = ZAMBA_AS_WRITTEN(ZAMBA_AS_WRITTEN(x_c * silu) * r);
            const Pack<A> d_v = ZAMBA_AS_WRITTEN(r * (kernel::load(weight.data + c, count) * d_out_c - mean * u));
            kernel::store(&d_x(i, c), Pack<A>(d_v * silu), count);
            kernel::store(&d_z(i, c), Pack<A>(ZAMBA_AS_WRITTEN(d_v * x_c) * gate * (A(1) + z_c * (A(1) - gate))),
                          count);
          });
        }
    });
    for (Index task = 0; task < tasks; ++task)
      kernel::for_packs<F>(D, [&](Index c, auto count) {
        kernel::store(d_weight.data + c,
                      Pack<F>(kernel::load(d_weight.data + c, count) + kernel::load(&partial(task, c), count)), count);
      });
  }

  /// d_weight of each task's positions.
  template <class Ctx, class A, class F>
  static Matrix<F> backward_scratch(Ctx& ctx, Matrix<const A> d_out, Matrix<const A>, Matrix<const A>, Vector<const F>,
                                    Matrix<const F>, Matrix<A>, Matrix<A>, Vector<F> d_weight) {
    return ctx.arena().template tensor<F>(ceil_div(d_out.rows(), rows_of_task(d_out.rows())), d_weight.size());
  }

 private:
  template <class A>
  using Pack = kernel::Pack<A>;

  /// Positions of a task forwards; tasks, and so partial sums of d_weight, backwards.
  static constexpr Index forward_rows = 16, backward_tasks = 32;
  static Index rows_of_task(Index n) { return std::max(Index{8}, ceil_div(n, backward_tasks)); }

  /// f(channel, count, v) for the registers of [first, first + width) of row i.
  template <class A, class F>
  [[gnu::always_inline]] static void for_gated(Matrix<const A> x, Matrix<const A> z, Index i, Index first, Index width,
                                               F&& f) {
    kernel::for_packs<A>(width, [&](Index k, auto count) {
      const Pack<A> z_c = kernel::load(&z(i, first + k), count);
      f(first + k, count,
        Pack<A>(kernel::load(&x(i, first + k), count) * ZAMBA_AS_WRITTEN(z_c * kernel::sigmoid<A>(z_c))));
    });
  }
};

}  // namespace zamba
