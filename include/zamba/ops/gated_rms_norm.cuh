// SPDX-License-Identifier: MIT
// gated_rms_norm on CUDA; equations and shapes in gated_rms_norm.hpp. The kernels are those of rms_norm, with a gated
// input; two passes gate it twice.
//
// Numeric contract: as rms_norm on CUDA; in float silu(z) is within (3 + |z|) 1e-7 of its value.
#pragma once

#include <zamba/context.cuh>
#include <zamba/kernel/math.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/gated_rms_norm.hpp>
#include <zamba/ops/rms_norm.cuh>

namespace zamba {

namespace kernel {

/// v = x silu(z), of groups of so many channels.
template <class A_>
struct GatedInput {
  using A = A_;
  using F = compute_t<A>;
  Matrix<const A> x, z;
  Index group;
  Matrix<A> d_x, d_z;

  __device__ Index width() const { return group; }
  __device__ F value(Index i, Index c) const { return F(x(i, c)) * silu(F(z(i, c))); }
  static constexpr int vectors = 2;
  template <class Fetch>
  __device__ void fetch(Index i, Index c, Fetch&& fetch) const {
    fetch(0, &x(i, c));
    fetch(1, &z(i, c));
  }
  template <class Fetched>
  __device__ void values(Fetched&& fetched, F (&to)[vector_width<A>]) const {
    F gate[vector_width<A>];
    fetched(0).unpack(to);
    fetched(1).unpack(gate);
#pragma unroll
    for (int k = 0; k < vector_width<A>; ++k) to[k] *= silu(gate[k]);
  }
  bool in_vectors() const { return kernel::in_vectors(x) && kernel::in_vectors(z); }

  static constexpr int added = 0;  // both gradients are assigned
  template <class Fetch>
  __device__ void fetch_added(Index, Index, Fetch&&) const {}
  /// d_v becomes d_x, and x becomes d_z.
  static __device__ void differentiate(F z, F& x_d_z, F& d_v_d_x) {
    const F gate = sigmoid(z);
    x_d_z *= d_v_d_x * silu_slope(z, gate);
    d_v_d_x *= z * gate;
  }
  template <class Fetched, class Added>
  __device__ void store_gradients(Index i, Index c, F (&d_v)[vector_width<A>], Fetched&& fetched, Added&&) const {
    F value[vector_width<A>], gate[vector_width<A>];
    fetched(0).unpack(value);
    fetched(1).unpack(gate);
#pragma unroll
    for (int k = 0; k < vector_width<A>; ++k) differentiate(gate[k], value[k], d_v[k]);
    store_vector(&d_x(i, c), d_v);
    store_vector(&d_z(i, c), value);
  }
  __device__ void give_gradient(Index i, Index c, F d_v) const {
    F value = F(x(i, c));
    differentiate(F(z(i, c)), value, d_v);
    d_x(i, c) = A(d_v);
    d_z(i, c) = A(value);
  }
  bool gradients_in_vectors() const { return kernel::in_vectors(d_x) && kernel::in_vectors(d_z); }
};

}  // namespace kernel

template <>
struct GatedRmsNorm<cuda> {
  template <class A, class F>
  static void forward(Context<cuda>& ctx, Matrix<const A> x, Matrix<const A> z, Vector<const F> weight, double eps,
                      Matrix<A> out, Matrix<F> rstd) {
    kernel::launch_norm(ctx, kernel::GatedInput<A>{x, z, out.cols() / rstd.cols(), {}, {}}, weight, eps, out, rstd,
                        "gated_rms_norm");
  }

  template <class A, class F>
  static void backward(Context<cuda>& ctx, Matrix<const A> d_out, Matrix<const A> x, Matrix<const A> z,
                       Vector<const F> weight, Matrix<const F> rstd, Matrix<A> d_x, Matrix<A> d_z, Vector<F> d_weight) {
    kernel::launch_norm_gradient(ctx, kernel::GatedInput<A>{x, z, d_out.cols() / rstd.cols(), d_x, d_z}, d_out, weight,
                                 rstd, d_weight, "gated_rms_norm_backward");
  }
  template <class Ctx, class A, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const A> d_out, Matrix<const A>, Matrix<const A>, Vector<const F>,
                               Matrix<const F> rstd, Matrix<A>, Matrix<A>, Vector<F> d_weight) {
    kernel::norm_gradient_scratch<kernel::GatedInput<A>>(ctx, d_out.rows(), rstd.cols(), d_weight);
  }
};

}  // namespace zamba
