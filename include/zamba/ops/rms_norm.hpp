// SPDX-License-Identifier: MIT
// rms_norm: root-mean-square normalisation, of a sum of two inputs or of two inputs side by side.
//
//   rms_norm          v = x + t            (t optional)       out = weight * v * rstd
//   rms_norm_concat   v = concat[a, b]                        rstd = 1 / sqrt(mean(v^2) + eps)
//
// Source: Zhang and Sennrich (arXiv 1910.07467). The sum is what enters a Mamba mixer after a shared block, the
// concatenation what enters a shared block (Zamba, arXiv 2405.16712); neither is written to memory.
//
// Shapes: n positions of width d; weight (d), or (2d) for concat; rstd (n).
// Kept for the backward pass: rstd.
//   u = v * rstd,   g = weight * d_out,   d_v = rstd * (g - u * mean(g * u)),   d_weight = sum over positions of
//   d_out * u
//
// Numeric contract: sums in compute_t (float, or double for double), one partial sum per lane of a register, so errors
// grow with width / lanes; where squares overflow (in float above 1.8e19) they are summed once more of v scaled down,
// so that every finite v has its norm. d_weight is summed over fixed groups of positions, then over the groups in
// order: results do not depend on the number of threads, and a rerun is bit-equal.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

ZAMBA_DECLARE_OPERATOR(RmsNorm, "rms_norm.cuh");

/// out (n, d) = weight (d) * (x + t) * rstd; t (n, d) is optional; rstd (n) is written.
template <class Device, class A>
void rms_norm(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> x, std::type_identity_t<Matrix<const A>> t,
              Vector<const compute_t<A>> weight, double eps, Matrix<A> out, Vector<compute_t<A>> rstd) {
  if constexpr (checked) {
    const kernel::Door door{"rms_norm"};
    door.shape("x", x, out.rows(), out.cols());
    door.optional("t", t, out.rows(), out.cols());
    door.shape("weight", weight, out.cols());
    door.shape("rstd", rstd, out.rows());
  }
  RmsNorm<Device>::template forward<A>(ctx, x, t, weight, eps, out, rstd);
}

/// Adds to d_x (n, d) and d_weight (d); d_t (n, d), optional, is assigned the increment of d_x.
template <class Device, class A>
void rms_norm_backward(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> d_out,
                       std::type_identity_t<Matrix<const A>> x, std::type_identity_t<Matrix<const A>> t,
                       Vector<const compute_t<A>> weight, Vector<const compute_t<A>> rstd, Matrix<A> d_x,
                       std::type_identity_t<Matrix<A>> d_t, Vector<compute_t<A>> d_weight) {
  if constexpr (checked) {
    const kernel::Door door{"rms_norm_backward"};
    const Index n = d_out.rows(), d = d_out.cols();
    door.shape("x", x, n, d);
    door.optional("t", t, n, d);
    door.shape("weight", weight, d);
    door.shape("rstd", rstd, n);
    door.shape("d_x", d_x, n, d);
    door.optional("d_t", d_t, n, d);
    door.shape("d_weight", d_weight, d);
  }
  RmsNorm<Device>::template backward<A>(ctx, d_out, x, t, weight, rstd, d_x, d_t, d_weight);
}

/// out (n, 2d) = weight (2d) * concat[a, b] * rstd; a and b (n, d); rstd (n) is written.
template <class Device, class A>
void rms_norm_concat(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> a,
                     std::type_identity_t<Matrix<const A>> b, Vector<const compute_t<A>> weight, double eps,
                     Matrix<A> out, Vector<compute_t<A>> rstd) {
  if constexpr (checked) {
    const kernel::Door door{"rms_norm_concat"};
    const Index n = a.rows(), d = a.cols();
    door.shape("b", b, n, d);
    door.shape("weight", weight, 2 * d);
    door.shape("out", out, n, 2 * d);
    door.shape("rstd", rstd, n);
  }
  RmsNorm<Device>::template concat_forward<A>(ctx, a, b, weight, eps, out, rstd);
}

/// Adds to d_a (n, d), d_b (n, d) and d_weight (2d), from d_out (n, 2d).
template <class Device, class A>
void rms_norm_concat_backward(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> d_out,
                              std::type_identity_t<Matrix<const A>> a, std::type_identity_t<Matrix<const A>> b,
                              Vector<const compute_t<A>> weight, Vector<const compute_t<A>> rstd, Matrix<A> d_a,
                              std::type_identity_t<Matrix<A>> d_b, Vector<compute_t<A>> d_weight) {
  if constexpr (checked) {
    const kernel::Door door{"rms_norm_concat_backward"};
    const Index n = a.rows(), d = a.cols();
    door.shape("d_out", d_out, n, 2 * d);
    door.shape("b", b, n, d);
    door.shape("weight", weight, 2 * d);
    door.shape("rstd", rstd, n);
    door.shape("d_a", d_a, n, d);
    door.shape("d_b", d_b, n, d);
    door.shape("d_weight", d_weight, 2 * d);
  }
  RmsNorm<Device>::template concat_backward<A>(ctx, d_out, a, b, weight, rstd, d_a, d_b, d_weight);
}

namespace kernel {

/// v times this has a square for every finite v, and a square that counts for the largest of a row whose own overflow.
template <class F>
inline constexpr F small_scale = sizeof(F) == 8 ? F(0x1p-768) : F(0x1p-96f);

/// 1 / sqrt(sum / width + eps); where the sum of squares overflowed, from that of v * scale, which `squares` tells.
/// What that takes it holds by value, so that the rest of the row has its own in registers.
template <class F, class Squares>
[[gnu::always_inline]] inline F reciprocal_root(F sum, Index width, double eps, Squares&& squares) {
  if (is_finite(sum)) [[likely]]
    return F(1) / std::sqrt(sum / static_cast<F>(width) + static_cast<F>(eps));
  return small_scale<F> / std::sqrt(squares(small_scale<F>) / static_cast<F>(width));
}

}  // namespace kernel

/// A row is one or two segments: each has its own inputs, outputs and part of the weight, all share one rstd.
template <>
struct RmsNorm<cpu> {
  template <class A, class F>
  static void forward(Context<cpu>& ctx, Matrix<const A> x, Matrix<const A> t, Vector<const F> weight, double eps,
                      Matrix<A> out, Vector<F> rstd) {
    const Index d = out.cols();
    for_groups(ctx, out.rows(), forward_group, [&](Index i, Index) {
      const Segment<A> segment{row(x, i), row(t, i), d};
      rstd[i] = kernel::reciprocal_root(sum_of_squares(segment, A(1)), d, eps,
                                        [=](A scale) { return sum_of_squares(segment, scale); });
      normalise(segment, weight.data, rstd[i], row(out, i));
    });
  }

  template <class A, class F>
  static void backward(Context<cpu>& ctx, Matrix<const A> d_out, Matrix<const A> x, Matrix<const A> t,
                       Vector<const F> weight, Vector<const F> rstd, Matrix<A> d_x, Matrix<A> d_t, Vector<F> d_weight) {
    const Index d = d_out.cols();
    accumulate(ctx, d_out.rows(), d_weight, [&](Index i, F* d_w) {
      const Segment<A> segment{row(x, i), row(t, i), d};
      const A* dy = row(d_out, i);
      const F mean = product(segment, weight.data, dy, rstd[i]) / static_cast<A>(d);
      differentiate(segment, weight.data, dy, rstd[i], mean, row(d_x, i), row(d_t, i), d_w);
    });
  }

  template <class A, class F>
  static void concat_forward(Context<cpu>& ctx, Matrix<const A> a, Matrix<const A> b, Vector<const F> weight,
                             double eps, Matrix<A> out, Vector<F> rstd) {
    const Index d = a.cols();
    for_groups(ctx, out.rows(), forward_group, [&](Index i, Index) {
      const Segment<A> left{row(a, i), nullptr, d}, right{row(b, i), nullptr, d};
      rstd[i] =
          kernel::reciprocal_root(sum_of_squares(left, A(1)) + sum_of_squares(right, A(1)), 2 * d, eps,
                                  [=](A scale) { return sum_of_squares(left, scale) + sum_of_squares(right, scale); });
      normalise(left, weight.data, rstd[i], row(out, i));
      normalise(right, weight.data + d, rstd[i], row(out, i) + d);
    });
  }

  template <class A, class F>
  static void concat_backward(Context<cpu>& ctx, Matrix<const A> d_out, Matrix<const A> a, Matrix<const A> b,
                              Vector<const F> weight, Vector<const F> rstd, Matrix<A> d_a, Matrix<A> d_b,
                              Vector<F> d_weight) {
    const Index d = a.cols();
    accumulate(ctx, d_out.rows(), d_weight, [&](Index i, F* d_w) {
      const Segment<A> left{row(a, i), nullptr, d}, right{row(b, i), nullptr, d};
      const A* dy = row(d_out, i);
      const F dot = product(left, weight.data, dy, rstd[i]) + product(right, weight.data + d, dy + d, rstd[i]);
      const F mean = dot / static_cast<A>(2 * d);
      A* const no_d_t = nullptr;
      differentiate(left, weight.data, dy, rstd[i], mean, row(d_a, i), no_d_t, d_w);
      differentiate(right, weight.data + d, dy + d, rstd[i], mean, row(d_b, i), no_d_t, d_w + d);
    });
  }

  /// Of both backward passes.
  template <class Ctx, class A, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const A> d_out, Matrix<const A>, Matrix<const A>, Vector<const F>,
                               Vector<const F>, Matrix<A>, Matrix<A>, Vector<F> d_weight) {
    partial_sums(ctx, d_out.rows(), d_weight);
  }

 private:
  template <class A>
  using Pack = kernel::Pack<A>;

  /// Positions of one task in the forward pass: enough work to be worth handing to a thread.
  static constexpr Index forward_group = 16;
  /// At most this many partial sums of d_weight.
  static constexpr Index backward_groups = 32;

  /// v = x + t, or x where t is null.
  template <class A>
  struct Segment {
    static_assert(std::is_same_v<A, compute_t<A>>, "zamba: on the CPU activations are of the compute type");
    const A* x;
    const A* t;
    Index width;
  };

  template <class A>
  static A* row(Matrix<A> view, Index i) {
    return view ? view.data + i * view.stride[0] : nullptr;
  }

  /// f(i, group) for the positions of each group in order, groups spread over the threads.
  template <class F>
  static void for_groups(Context<cpu>& ctx, Index n, Index group_size, F&& f) {
    ctx.parallel_for(ceil_div(n, group_size), [&](Index group, int) {
      const Index end = std::min(n, (group + 1) * group_size);
      for (Index i = group * group_size; i < end; ++i) f(i, group);
    });
  }

  /// Positions whose share of d_weight is one partial sum.
  static Index group_size(Index n) { return std::max(Index{8}, ceil_div(n, backward_groups)); }
  template <class Ctx, class F>
  static Matrix<F> partial_sums(Ctx& ctx, Index n, Vector<F> d_weight) {
    return ctx.arena().template tensor<F>(ceil_div(n, group_size(n)), d_weight.size());
  }

  /// f(i, d_w) for every position, d_w being the partial sum of i's group; then the groups are added to d_weight.
  template <class F, class Body>
  static void accumulate(Context<cpu>& ctx, Index n, Vector<F> d_weight, Body&& f) {
    if (n == 0) return;
    ArenaScope scope(ctx.arena());
    const Matrix<F> partial = partial_sums(ctx, n, d_weight);
    const Index groups = partial.rows(), width = d_weight.size();
    std::fill_n(partial.data, partial.size(), F(0));
    for_groups(ctx, n, group_size(n), [&](Index i, Index group) { f(i, row(partial, group)); });
    for (Index group = 0; group < groups; ++group) {
      const F* from = row(partial, group);
      kernel::for_packs<F>(width, [&](Index c, auto count) {
        kernel::store(d_weight.data + c,
                      Pack<F>(kernel::load(d_weight.data + c, count) + kernel::load(from + c, count)), count);
      });
    }
  }

  /// f(first, count, v) for each register of v.
  template <class A, class F>
  [[gnu::always_inline]] static void for_values(const Segment<A>& segment, F&& f) {
    if (segment.t)
      kernel::for_packs<A>(segment.width, [&](Index i, auto count) {
        f(i, count, Pack<A>(kernel::load(segment.x + i, count) + kernel::load(segment.t + i, count)));
      });
    else
      kernel::for_packs<A>(segment.width,
                           [&](Index i, auto count) { f(i, count, kernel::load(segment.x + i, count)); });
  }

  template <class A>
  [[gnu::always_inline]] static A sum_of_squares(const Segment<A>& segment, A scale) {
    Pack<A> sum = kernel::zeros<A>();
    for_values(segment, [&](Index, auto, const Pack<A>& v) {
      const Pack<A> scaled = ZAMBA_AS_WRITTEN(v * scale);
      sum += scaled * scaled;
    });
    return kernel::sum<A>(sum);
  }

  template <class A>
  static void normalise(const Segment<A>& segment, const A* weight, A rstd, A* out) {
    for_values(segment, [&](Index i, auto count, const Pack<A>& v) {
      kernel::store(out + i, Pack<A>(kernel::load(weight + i, count) * ZAMBA_AS_WRITTEN(v * rstd)), count);
    });
  }

  /// sum of g * u
  template <class A>
  static A product(const Segment<A>& segment, const A* weight, const A* dy, A rstd) {
    Pack<A> sum = kernel::zeros<A>();
    for_values(segment, [&](Index i, auto count, const Pack<A>& v) {
      sum += kernel::load(weight + i, count) * kernel::load(dy + i, count) * ZAMBA_AS_WRITTEN(v * rstd);
    });
    return kernel::sum<A>(sum);
  }

  /// mean: of g * u
  template <class A>
  static void differentiate(const Segment<A>& segment, const A* weight, const A* dy, A rstd, A mean, A* d_x, A* d_t,
                            A* d_weight) {
    for_values(segment, [&](Index i, auto count, const Pack<A>& v) {
      const Pack<A> d_y = kernel::load(dy + i, count), u = ZAMBA_AS_WRITTEN(v * rstd);
      const Pack<A> d_v = rstd * (kernel::load(weight + i, count) * d_y - mean * u);
      kernel::store(d_x + i, Pack<A>(kernel::load(d_x + i, count) + d_v), count);
      if (d_t) kernel::store(d_t + i, d_v, count);
      kernel::store(d_weight + i, Pack<A>(kernel::load(d_weight + i, count) + d_y * u), count);
    });
  }
};

}  // namespace zamba
