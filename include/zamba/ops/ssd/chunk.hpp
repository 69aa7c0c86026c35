// SPDX-License-Identifier: MIT
// Parts of ssd: how heads are shared out among tasks, and what a chunk of positions is computed from. The equations are
// in ops/ssd.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <zamba/kernel/eigen.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Neighbouring heads of one group.
struct SsdBlock {
  Index group, head, heads, P;
  Index channel() const { return head * P; }
  Index channels() const { return heads * P; }
};

/// The heads of all groups in blocks of about equally many, of about 256 channels if it is not said how many at most.
struct SsdBlocks {
  static constexpr Index task_channels = 256;
  Index G, N, H, P, per_group, heads;

  template <class Inputs>
  explicit SsdBlocks(const Inputs& in) : SsdBlocks(in, task_channels * in.delta.cols() / in.u.cols()) {}
  template <class Inputs>
  SsdBlocks(const Inputs& in, Index most_heads)
      : G(in.B.shape[1]), N(in.B.shape[2]), H(in.delta.cols()), P(in.u.cols() / H) {
    const Index of_group = H / G, most = std::clamp<Index>(most_heads, 1, of_group);
    per_group = ceil_div(of_group, most);
    heads = ceil_div(of_group, per_group);
    per_group = ceil_div(of_group, heads);
  }
  ZAMBA_HOST_DEVICE Index count() const { return G * per_group; }
  Index most_channels() const { return heads * P; }
  ZAMBA_HOST_DEVICE SsdBlock operator[](Index i) const {
    const Index group = i / per_group, first = i % per_group * heads, of_group = H / G;
    return {group, group * of_group + first, first + heads < of_group ? heads : of_group - first, P};
  }
};

template <class T>
T* take_line(T*& memory, Index count) {
  T* const taken = memory;
  memory += padded_to_line(count);
  return taken;
}

template <class From, class To>
void copy_rows(Matrix<From> from, Matrix<To> to) {
  for (Index i = 0; i < from.rows(); ++i) std::copy_n(&from(i, 0), from.cols(), &to(i, 0));
}

/// 0 in place of what is too small to matter beside 1, before products with it are subnormal and slow.
template <class T>
[[gnu::always_inline]] inline Pack<T> vanishing(const Pack<T>& x) {
  constexpr T least = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
  return x < least ? zeros<T>() : x;
}

/// The heads of a block in a chunk of positions: steps and decays, and for the backward pass the products of them.
template <class T>
struct SsdChunk {
  Index first, count;
  SsdBlock block;
  Vector<T> A;                // (heads)
  Matrix<T> dt, decay, e, f;  // (count, heads); decay: a in the equations
  Matrix<T> B, C;             // (count, N): copies, row by row
  Matrix<T> CB;               // (count, count): C_t . B_j
  Matrix<T> M;                // (count, count): of one head at a time

  static Index size(Index chunk, const SsdBlocks& blocks) {
    return padded_to_line(blocks.heads) + 4 * padded_to_line(chunk * blocks.heads) +
           2 * padded_to_line(chunk * blocks.N) + 2 * chunk * padded_to_line(chunk);
  }

  template <class Inputs>
  SsdChunk(const Inputs& in, const SsdBlock& of, Index at, Index tokens, T* memory)
      : first(at),
        count(tokens),
        block(of),
        A(take_line(memory, block.heads), block.heads),
        dt(take_line(memory, count * block.heads), count, block.heads),
        decay(take_line(memory, count * block.heads), count, block.heads),
        e(take_line(memory, count * block.heads), count, block.heads),
        f(take_line(memory, count * block.heads), count, block.heads),
        B(take_line(memory, count * in.B.shape[2]), count, in.B.shape[2]),
        C(take_line(memory, count * in.B.shape[2]), count, in.B.shape[2]),
        CB(take_line(memory, count * padded_to_line(count)), count, padded_to_line(count)),
        M(take_line(memory, count * padded_to_line(count)), count, padded_to_line(count)) {
    for (Index h = 0; h < block.heads; ++h) A[h] = -std::exp(in.A_log[block.head + h]);
    for_packs<T>(block.heads, [&](Index h, auto n) {
      const Pack<T> A_h = load(&A[h], n), bias = load(&in.dt_bias[block.head + h], n);
      for (Index t = 0; t < count; ++t) {
        const Pack<T> x = load(&in.delta(first + t, block.head + h), n) + bias;
        const Pack<T> step = max<T>(broadcast(static_cast<T>(in.dt_min)), softplus<T>(x));
        store(&dt(t, h), step, n);
        store(&decay(t, h), exp<T>(step * A_h), n);
      }
    });
  }

  /// The rest, for the backward pass. products: scratch of add_product.
  template <class Inputs>
  void prepare_products(const Inputs& in, T* products) const {
    for_packs<T>(block.heads, [&](Index h, auto n) {
      Pack<T> product = broadcast<T>(1);
      for (Index t = 0; t < count; ++t) {
        product = vanishing<T>(product * load(&decay(t, h), n));
        store(&e(t, h), product, n);
      }
      product = broadcast<T>(1);
      for (Index t = count - 1; t >= 0; --t) {
        store(&f(t, h), product, n);
        product = vanishing<T>(product * load(&decay(t, h), n));
      }
    });
    for (Index t = 0; t < count; ++t) {
      std::copy_n(&in.B(first + t, block.group, 0), B.cols(), &B(t, 0));
      std::copy_n(&in.C(first + t, block.group, 0), C.cols(), &C(t, 0));
    }
    set_product(CB.columns(0, count), C, transposed(B), products);
  }

  /// K of head h, rows of whole registers; 0 for j > t.
  void decays(Index h, Matrix<T> K) const {
    for (Index t = 0; t < count; ++t) {
      T* const row = &K(t, 0);
      Index j = 0;
      for (; t > 0 && j < t; j += lanes<T>) store(row + j, vanishing<T>(decay(t, h) * load<T>(&K(t - 1, j))));
      std::fill(row + j, row + K.cols(), T(0));
      row[t] = 1;
    }
  }
};

}  // namespace zamba::kernel
