// SPDX-License-Identifier: MIT
// The backward pass of ssd on CUDA: for any type and shape, and what that has in common with the tensor cores' one
// (chunk_backward.cuh), the sums of partial gradients. The equations are in ssd.hpp and backward.hpp.
//
// A block takes some heads of one row, head by head, each from the row's last chunk to its first; products are plain
// loops. With g the gradient of the state after a chunk, s the state before it, the logarithm of a decay touches what
// passes over its token, and nothing else is summed, so that little is not the difference of much:
//
//   d(dt A)_j = sum_{t >= j} e_t C_t . (s dy_t)             from the state before to tokens from j on
//             + sum_{t < j} f_t B_t . (g v_t)               from tokens before j to the state after
//             + sum_{t >= j > i} M_ti (dy_t . v_i)          from tokens before j to tokens from j on
//             + e_last s . g                                from the state before to that after
//
// dB and dC are summed over the heads of a block in order, then over the blocks of a group in order; gradients of
// parameters within a block, then over the pieces of all tokens, rows here and chunks there.
#pragma once

#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/ops/ssd.hpp>

namespace zamba::kernel {

/// Partial gradients.
template <class F>
struct SsdGradientParts {
  Tensor<F, 3> BC;          // (blocks of heads, tokens, 2 N): dB, dC
  Tensor<F, 3> parameters;  // (3, H, pieces of all tokens): of A_log, D, dt_bias
};

template <class A_>
struct SsdBackwardTraits {
  using A = A_;
  using F = compute_t<A>;
  static constexpr int threads = 256, add_threads = 128;
};

/// One head in a chunk. Matrices with t and j in them count tokens from the chunk's first.
template <class Traits>
struct SsdHeadGradient {
  using A = typename Traits::A;
  using F = typename Traits::F;
  static constexpr int vectors = 5;

  const SsdInputs<A, F>& in;
  const SsdGradients<A, F>& out;
  const Matrix<const A>& d_y;
  Index head, group, channel, N, P;
  F a;
  Index first, count;                   // tokens of the chunk
  Matrix<F> g, g_before;                // (N, P)
  Matrix<F> K, CB, d_CB;                // (count, count), for j <= t
  Matrix<F> through_g, d_v, through_s;  // (count, P), the same, (count, N): f B g; all of dv; e dy s^T
  Vector<F> dt, decay, d_dtA;           // (count)
  Matrix<F> through;                    // (2, count): through the states before and after, of each token
  F d_a = 0, d_skip = 0, d_bias = 0;    // this thread's share

  static Index memory(Index chunk, Index N, Index P) {
    return 2 * N * P + 3 * chunk * chunk + chunk * (2 * P + N) + vectors * chunk;
  }

  __device__ SsdHeadGradient(const SsdInputs<A, F>& inputs, const SsdGradients<A, F>& gradients,
                             const Matrix<const A>& of_y, const SsdBlock& block, Index number)
      : in(inputs),
        out(gradients),
        d_y(of_y),
        head(block.head + number),
        group(block.group),
        channel(head * block.P),
        N(in.B.shape[2]),
        P(block.P),
        a(-::exp(in.A_log[head])) {}

  /// Takes a chunk, and its memory; g remains where it is.
  __device__ void begin(Index at, Index tokens, F* memory) {
    first = at;
    count = tokens;
    const auto take = [&](Index rows, Index cols) {
      const Matrix<F> taken(memory, rows, cols);
      memory += rows * cols;
      return taken;
    };
    g = take(N, P), g_before = take(N, P);
    K = take(count, count), CB = take(count, count), d_CB = take(count, count);
    through_g = take(count, P), d_v = take(count, P), through_s = take(count, N);
    const Matrix<F> rows = take(vectors, count);
    dt = rows[0], decay = rows[1], d_dtA = rows[2], through = rows.slice(3, 2);
  }

  __device__ F u(Index t, Index p) const { return F(in.u(first + t, channel + p)); }
  __device__ F dy(Index t, Index p) const { return F(d_y(first + t, channel + p)); }
  __device__ F B(Index t, Index n) const { return F(in.B(first + t, group, n)); }
  __device__ F C(Index t, Index n) const { return F(in.C(first + t, group, n)); }
  __device__ F delta(Index t) const { return F(in.delta(first + t, head)) + in.dt_bias[head]; }
  __device__ F e(Index t) const { return K(t, 0) * decay[0]; }
  __device__ F f(Index t) const { return K(count - 1, t); }

  /// body(row, column), over the threads of the block.
  template <class Body>
  __device__ static void for_all(Index rows, Index cols, Body&& body) {
    for (Index i = threadIdx.x; i < rows * cols; i += Traits::threads) body(i / cols, i % cols);
  }
  template <class Body>
  __device__ void for_tokens(Body&& body) const {
    for (Index t = threadIdx.x; t < count; t += Traits::threads) body(t);
  }
  template <class Term>
  __device__ static F sum(Index begin, Index end, Term&& term) {
    F total = 0;
    for (Index i = begin; i < end; ++i) total += term(i);
    return total;
  }

  /// dt, and K, the products of the decays between two tokens.
  __device__ void steps() {
    for_tokens([&](Index t) {
      const F x = delta(t);
      dt[t] = ::max(F(in.dt_min), x > F(20) ? x : ::log1p(::exp(x)));
      decay[t] = ::exp(dt[t] * a);
    });
    __syncthreads();
    for_tokens([&](Index j) {
      F left = 1;
      for (Index t = j; t < count; ++t) K(t, j) = left = t > j ? left * decay[t] : F(1);
    });
    __syncthreads();
  }

  /// C B^T, its gradient, and what reaches tokens through the states at both ends of the chunk.
  __device__ void products(const Matrix<const F>& s) {
    for_all(count, count, [&](Index t, Index j) {
      if (j > t) return;
      CB(t, j) = sum(0, N, [&](Index n) { return C(t, n) * B(j, n); });
      d_CB(t, j) = K(t, j) * dt[j] * sum(0, P, [&](Index p) { return dy(t, p) * u(j, p); });
    });
    for_all(count, P,
            [&](Index j, Index p) { through_g(j, p) = f(j) * sum(0, N, [&](Index n) { return B(j, n) * g(n, p); }); });
    for_all(count, N, [&](Index t, Index n) {
      through_s(t, n) = e(t) * sum(0, P, [&](Index p) { return dy(t, p) * s(n, channel + p); });
    });
    __syncthreads();
  }

  /// Gradients of B and C, to be added to what they are already or not, of u, and of the state before the chunk.
  __device__ void gradients(const Matrix<F>& d_BC, bool add) {
    for_all(count, N, [&](Index t, Index n) {
      const F d_C = through_s(t, n) + sum(0, t + 1, [&](Index j) { return d_CB(t, j) * B(j, n); });
      const F d_B = f(t) * dt[t] * sum(0, P, [&](Index p) { return u(t, p) * g(n, p); }) +
                    sum(t, count, [&](Index i) { return d_CB(i, t) * C(i, n); });
      d_BC(first + t, n) = add ? d_BC(first + t, n) + d_B : d_B;
      d_BC(first + t, N + n) = add ? d_BC(first + t, N + n) + d_C : d_C;
    });
    for_all(count, P, [&](Index j, Index p) {
      d_v(j, p) = through_g(j, p) + sum(j, count, [&](Index t) { return K(t, j) * CB(t, j) * dy(t, p); });
      out.u(first + j, channel + p) = A(dt[j] * d_v(j, p) + in.D[head] * dy(j, p));
    });
    for_all(N, P, [&](Index n, Index p) {
      g_before(n, p) = e(count - 1) * g(n, p) + sum(0, count, [&](Index t) { return C(t, n) * e(t) * dy(t, p); });
    });
  }

  /// d(dt A), by sums over what passes over each token.
  __device__ void decays(const Matrix<const F>& s) {
    F product = 0;
    for_all(N, P, [&](Index n, Index p) { product += s(n, channel + p) * g(n, p); });
    const F passing = e(count - 1) * block_sum<Traits::threads>(product);
    for_tokens([&](Index t) {
      through[0][t] = sum(0, N, [&](Index n) { return through_s(t, n) * C(t, n); });
      through[1][t] = dt[t] * sum(0, P, [&](Index p) { return through_g(t, p) * u(t, p); });
      F before = 0;  // what comes from tokens before j to t takes the place of CB
      for (Index j = 0; j <= t; ++j) {
        const F from = d_CB(t, j) * CB(t, j);
        CB(t, j) = before;
        before += from;
      }
    });
    __syncthreads();
    for_tokens([&](Index j) { d_dtA[j] = sum(j, count, [&](Index t) { return CB(t, j); }); });
    __syncthreads();
    if (threadIdx.x == 0) {
      F later = passing, before = 0;
      for (Index t = count - 1; t >= 0; --t) d_dtA[t] += later += through[0][t];
      for (Index t = 0; t < count; before += through[1][t++]) d_dtA[t] += before;
    }
    __syncthreads();
  }

  /// Gradients of delta and the parameters.
  __device__ void finish() {
    for_tokens([&](Index t) {
      const F x = delta(t), slope = x > F(20) ? F(1) : F(1) / (F(1) + ::exp(-x));
      const F d_dt = a * d_dtA[t] + sum(0, P, [&](Index p) { return d_v(t, p) * u(t, p); });
      const F d_delta = dt[t] > F(in.dt_min) ? d_dt * slope : F(0);
      out.delta(first + t, head) = A(d_delta);
      d_a += d_dtA[t] * dt[t];
      d_skip += sum(0, P, [&](Index p) { return dy(t, p) * u(t, p); });
      d_bias += d_delta;
    });
  }
};

/// Blocks: of heads, then rows. memory: SsdHeadGradient::memory of each.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_backward_kernel(Matrix<const typename Traits::A> d_y, SsdInputs<typename Traits::A, typename Traits::F> in,
                        Sequences sequences, Tensor<const typename Traits::F, 3> checkpoints,
                        SsdGradients<typename Traits::A, typename Traits::F> out, Tensor<typename Traits::F, 3> d_state,
                        Index chunk, SsdBlocks blocks, SsdGradientParts<typename Traits::F> parts,
                        Matrix<typename Traits::F> memory) {
  using F = typename Traits::F;
  launch_dependents();
  grid_dependency_wait();
  const Index of_heads = blockIdx.x % blocks.count(), row = blockIdx.x / blocks.count();
  const SsdBlock block = blocks[of_heads];
  const Index begin = sequences.begin(row), length = sequences.length(row), N = blocks.N, P = blocks.P;
  for (Index number = 0; number < block.heads; ++number) {
    SsdHeadGradient<Traits> of(in, out, d_y, block, number);
    F* const at = memory[blockIdx.x].data;
    of.begin(begin, 0, at);
    of.for_all(N, P, [&](Index n, Index p) { of.g(n, p) = d_state ? d_state(row, n, of.channel + p) : F(0); });
    for (Index k = ceil_div(length, chunk) - 1; k >= 0; --k) {
      __syncthreads();
      of.begin(begin + k * chunk, ::min(chunk, length - k * chunk), at);
      const Matrix<const F> s = checkpoints[begin / chunk + row + k];
      of.steps();
      of.products(s);
      of.gradients(parts.BC[of_heads], number > 0);
      of.decays(s);
      of.finish();
      of.for_all(N, P, [&](Index n, Index p) { of.g(n, p) = of.g_before(n, p); });
    }
    if (d_state && length > 0)  // a row that began from zero has no initial state to receive a gradient
      of.for_all(N, P, [&](Index n, Index p) {
        d_state(row, n, of.channel + p) = sequences.start(row) > 0 ? of.g(n, p) : F(0);
      });
    const F sums[3] = {of.a * of.d_a, of.d_skip, of.d_bias};
    for (int i = 0; i < 3; ++i) {
      const F total = block_sum<Traits::threads>(sums[i]);
      if (threadIdx.x == 0) parts.parameters(i, of.head, row) = total;
    }
  }
}

/// dB and dC (tokens, G, N): the sums of the parts of each group, in order. Blocks take tokens in turn.
template <class Traits>
__global__ void __launch_bounds__(Traits::add_threads)
    ssd_add_parts_kernel(Tensor<const typename Traits::F, 3> parts, int per_group, Tensor<typename Traits::A, 3> d_B,
                         Tensor<typename Traits::A, 3> d_C) {
  using A = typename Traits::A;
  using F = typename Traits::F;
  launch_dependents();
  grid_dependency_wait();
  const int N = static_cast<int>(d_B.shape[2]), all = static_cast<int>(d_B.shape[1]) * 2 * N;
  for (Index token = blockIdx.x; token < d_B.shape[0]; token += gridDim.x)
    for (int i = threadIdx.x; i < all; i += Traits::add_threads) {
      const int n = i % (2 * N), group = i / (2 * N);
      F sum = 0;
#pragma unroll 8
      for (int part = 0; part < per_group; ++part) sum += parts(group * per_group + part, token, n);
      (n < N ? d_B(token, group, n) : d_C(token, group, n - N)) = A(sum);
    }
}

/// Gradients of the parameters: a block for each of A_log, D, dt_bias and each head adds up the pieces.
template <class Traits>
__global__ void __launch_bounds__(Traits::threads)
    ssd_add_parameters_kernel(Tensor<const typename Traits::F, 3> parts,
                              SsdGradients<typename Traits::A, typename Traits::F> out) {
  using F = typename Traits::F;
  launch_dependents();
  grid_dependency_wait();
  const Index heads = parts.shape[1], parameter = blockIdx.x / heads, head = blockIdx.x % heads;
  F sum = 0;
  for (Index piece = threadIdx.x; piece < parts.shape[2]; piece += Traits::threads)
    sum += parts(parameter, head, piece);
  const F total = block_sum<Traits::threads>(sum);
  if (threadIdx.x == 0) (parameter == 0 ? out.A_log : parameter == 1 ? out.D : out.dt_bias)[head] += total;
}

}  // namespace zamba::kernel
