// SPDX-License-Identifier: MIT
// causal_conv1d: depthwise convolution over time, of width K, followed by silu.
//
//   p_t   = bias + sum_j weight[:, j] * x_{t - (K-1) + j}       j = 0 .. K-1; per channel
//   out_t = p_t * sigmoid(p_t)
//
// Source: Mamba (arXiv 2312.00752) section 3.4. Inputs before a row's first token come from its state, the last K-1
// inputs of its past, or are zero where the row has no past.
//
// Shapes: x, out (tokens, D); weight (D, K), as in checkpoints; bias (D); state (rows, K-1, D), oldest input first.
// Kept for the backward pass: nothing but the inputs and the initial state; p is computed again.
//   d_p = d_out * silu'(p),   d_x_i = sum_j weight[:, j] * d_p_{i + (K-1) - j},   d_weight[:, j] = sum_t d_p_t
//   x_{t-(K-1)+j}
//
// Numeric contract: everything in compute_t (float, or double for double); each output is one sum over j in order,
// whatever the batch, the split of a sequence and the number of threads, so all of these give equal bits. d_weight and
// d_bias are summed over fixed groups of tokens, then over the groups in order: a rerun is bit-equal.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

ZAMBA_DECLARE_OPERATOR(CausalConv1d, "causal_conv1d.cuh");

/// bias (D) is optional. state (rows, K-1, D), optional: read where the row has a past, rewritten with the row's last
/// K-1 inputs; a row without tokens leaves its state as it is. out must not overlap x.
template <class Device, class A>
void causal_conv1d(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> x, Matrix<const compute_t<A>> weight,
                   Vector<const compute_t<A>> bias, const Sequences& sequences, Tensor<compute_t<A>, 3> state,
                   Matrix<A> out) {
  if constexpr (checked) {
    const kernel::Door door{"causal_conv1d"};
    const Index D = weight.rows(), K = weight.cols();
    door.shape("x", x, sequences.tokens, D);
    door.optional("bias", bias, D);
    door.optional("state", state, sequences.rows, K - 1, D);
    door.shape("out", out, sequences.tokens, D);
  }
  CausalConv1d<Device>::template forward<A>(ctx, x, weight, bias, sequences, state, out);
}

/// initial_state (rows, K-1, D), optional: the state before the forward pass. d_x (tokens, D) is assigned, d_weight
/// (D, K) and d_bias (D, optional) are added to. d_state (rows, K-1, D), optional; in: the gradient of the final state,
/// out: that of the initial state, zero where the row has tokens but no past.
template <class Device, class A>
void causal_conv1d_backward(Context<Device>& ctx, std::type_identity_t<Matrix<const A>> d_out,
                            std::type_identity_t<Matrix<const A>> x, Matrix<const compute_t<A>> weight,
                            Vector<const compute_t<A>> bias, const Sequences& sequences,
                            Tensor<const compute_t<A>, 3> initial_state, Matrix<A> d_x, Matrix<compute_t<A>> d_weight,
                            Vector<compute_t<A>> d_bias, Tensor<compute_t<A>, 3> d_state) {
  if constexpr (checked) {
    const kernel::Door door{"causal_conv1d_backward"};
    const Index D = weight.rows(), K = weight.cols();
    door.shape("d_out", d_out, sequences.tokens, D);
    door.shape("x", x, sequences.tokens, D);
    door.optional("bias", bias, D);
    door.optional("initial_state", initial_state, sequences.rows, K - 1, D);
    door.shape("d_x", d_x, sequences.tokens, D);
    door.shape("d_weight", d_weight, D, K);
    door.optional("d_bias", d_bias, D);
    door.optional("d_state", d_state, sequences.rows, K - 1, D);
  }
  CausalConv1d<Device>::template backward<A>(ctx, d_out, x, weight, bias, sequences, initial_state, d_x, d_weight,
                                             d_bias, d_state);
}

/// Vectorised over channels. A task is a group of tokens by a tile of channels: rows of a tile stay in the L1 cache
/// while the window moves over them.
template <>
struct CausalConv1d<cpu> {
  template <class A, class F>
  static void forward(Context<cpu>& ctx, Matrix<const A> x, Matrix<const F> weight, Vector<const F> bias,
                      const Sequences& sequences, Tensor<F, 3> state, Matrix<A> out) {
    ArenaScope scope(ctx.arena());
    const Inputs<A> in(ctx, x, weight, bias, sequences, state);
    const Index tiles = in.tiles(), groups = ceil_div(sequences.tokens, chunk);
    ctx.parallel_for(groups * tiles, [&](Index task, int worker) {
      const Tile tile = in.tile(task % tiles);
      const Index first = task / tiles * chunk;
      for_chunks(sequences, first, std::min(first + chunk, sequences.tokens), [&](Index row, Index begin, Index count) {
        for (Index t = begin; t < begin + count; ++t) {
          A* to = &out(sequences.begin(row) + t, tile.channel);
          in.for_preactivations(row, t, tile, worker, [&](Index c, auto n, const Pack<A>& p) {
            kernel::store(to + c, Pack<A>(p * kernel::sigmoid<A>(p)), n);
          });
        }
      });
    });
    if (state && in.K > 1)
      ctx.parallel_for(sequences.rows, [&](Index row, int) {
        const Index length = sequences.length(row);
        if (length == 0) return;
        // Oldest first, so that what is left of a longer past moves before it is overwritten.
        for (Index slot = 0; slot < in.K - 1; ++slot)
          std::copy_n(in.at(row, length - (in.K - 1) + slot), out.cols(), &state(row, slot, 0));
      });
  }

  template <class Ctx, class A, class F>
  static auto scratch(Ctx& ctx, Matrix<const A> x, Matrix<const F> weight, Vector<const F>, const Sequences&,
                      Tensor<F, 3>, Matrix<A>) {
    return Room<A>(ctx, weight.cols(), x.cols());
  }

  template <class A, class F>
  static void backward(Context<cpu>& ctx, Matrix<const A> d_out, Matrix<const A> x, Matrix<const F> weight,
                       Vector<const F> bias, const Sequences& sequences, Tensor<const F, 3> initial_state,
                       Matrix<A> d_x, Matrix<F> d_weight, Vector<F> d_bias, Tensor<F, 3> d_state) {
    if (sequences.tokens == 0) return;
    ArenaScope scope(ctx.arena());
    const Inputs<A> in(ctx, x, weight, bias, sequences, initial_state);
    const Index tiles = in.tiles(), K = in.K, past = K - 1, D = x.cols(), group_size = tokens_of_group(sequences);
    const auto [partial, scratch] = gradient_room<A>(ctx, sequences, K, D);
    const Index groups = partial.shape[0];
    ctx.parallel_for(groups * tiles, [&, partial = partial, scratch = scratch](Index task, int worker) {
      const Tile tile = in.tile(task % tiles);
      const Index group = task / tiles, first = group * group_size;
      const Matrix<A> sums = partial[group].columns(tile.channel, tile.width), d_p = scratch[worker];
      for (Index j = 0; j <= K; ++j) std::fill_n(&sums(j, 0), tile.width, A(0));
      const Index end = std::min(first + group_size, sequences.tokens);
      for_chunks(sequences, first, end, [&](Index row, Index begin, Index count) {
        differentiate(in, d_out, row, begin, count + past, tile, worker, d_p);
        for (Index t = 0; t < count; ++t) {
          add_products(in, row, begin + t, tile, worker, &d_p(t, 0), sums);
          const Index slot = begin + t - sequences.length(row) + past;  // where the final state holds this input
          convolve_back(in, tile, worker, d_p, t, d_state && slot >= 0 ? &d_state(row, slot, tile.channel) : nullptr,
                        &d_x(sequences.begin(row) + begin + t, tile.channel));
        }
      });
    });
    const Matrix<A> total = partial[0];
    for (Index group = 1; group < groups; ++group)
      kernel::for_packs<A>(total.size(), [total, from = &partial(group, 0, 0)](Index i, auto n) {
        kernel::store(total.data + i, Pack<A>(kernel::load(total.data + i, n) + kernel::load(from + i, n)), n);
      });
    for (Index j = 0; j < K; ++j)
      for (Index c = 0; c < D; ++c) d_weight(c, j) += total(j, c);
    for (Index c = 0; d_bias && c < D; ++c) d_bias[c] += total(K, c);
    if (d_state && past > 0)
      ctx.parallel_for(sequences.rows * tiles, [&, scratch = scratch](Index task, int worker) {
        differentiate_state(in, d_out, task / tiles, in.tile(task % tiles), worker, scratch[worker], d_state);
      });
  }

  template <class Ctx, class A, class F>
  static void backward_scratch(Ctx& ctx, Matrix<const A>, Matrix<const A> x, Matrix<const F> weight, Vector<const F>,
                               const Sequences& sequences, Tensor<const F, 3>, Matrix<A>, Matrix<F>, Vector<F>,
                               Tensor<F, 3>) {
    Room<A>(ctx, weight.cols(), x.cols());
    gradient_room<A>(ctx, sequences, weight.cols(), x.cols());
  }

 private:
  template <class A>
  using Pack = kernel::Pack<A>;

  /// Tokens that are worked through together.
  static constexpr Index chunk = 64;
  /// Channels of a tile at most.
  static constexpr Index tile_width = 512;
  /// At most this many partial sums of d_weight.
  static constexpr Index backward_groups = 32;

  struct Tile {
    Index channel, width;
  };

  /// sum + sum_j w_j * x_j over K rows of weights, `next` apart, and of inputs.
  template <class A, class N>
  [[gnu::always_inline]] static Pack<A> add_taps(Pack<A> sum, Index K, const A* w, Index next, const A* const* x,
                                                 Index c, N n) {
    if (K == 4) {  // the usual width, without a loop
      sum += kernel::load(w + c, n) * kernel::load(x[0] + c, n);
      sum += kernel::load(w + next + c, n) * kernel::load(x[1] + c, n);
      sum += kernel::load(w + 2 * next + c, n) * kernel::load(x[2] + c, n);
      return sum + kernel::load(w + 3 * next + c, n) * kernel::load(x[3] + c, n);
    }
    for (Index j = 0; j < K; ++j) sum += kernel::load(w + j * next + c, n) * kernel::load(x[j] + c, n);
    return sum;
  }

  /// f(row, begin, count) for the tokens [first, end) of the batch, at most `chunk` of one row at a time; begin is
  /// counted within the row.
  template <class F>
  static void for_chunks(const Sequences& sequences, Index first, Index end, F&& f) {
    const Index* offsets = sequences.offsets;
    Index row = std::upper_bound(offsets, offsets + sequences.rows, first) - offsets - 1;
    while (first < end) {
      const Index count = std::min({chunk, end - first, offsets[row + 1] - first});
      if (count > 0) f(row, first - offsets[row], count);
      first += count;
      if (first == offsets[row + 1]) ++row;
    }
  }

  /// Tokens whose share of the gradients of weight and bias is one partial sum.
  static Index tokens_of_group(const Sequences& sequences) {
    return std::max(chunk, ceil_div(sequences.tokens, backward_groups));
  }
  template <class A>
  struct GradientRoom {
    Tensor<A, 3> partial;  // (groups, K + 1, D): of d_weight, transposed, and d_bias
    Tensor<A, 3> scratch;  // (threads, chunk + K - 1, tile_width)
  };
  template <class A, class Ctx>
  static GradientRoom<A> gradient_room(Ctx& ctx, const Sequences& sequences, Index K, Index D) {
    const Index groups = ceil_div(sequences.tokens, tokens_of_group(sequences));
    return {ctx.arena().template tensor<A>(groups, K + 1, D),
            ctx.arena().template tensor<A>(Index{ctx.threads()}, chunk + K - 1, tile_width)};
  }

  /// Scratch of all tasks.
  template <class A>
  struct Room {
    Matrix<A> weight;          // (K + 1, D): transposed; the last row is the bias, or zero
    Vector<A> zeros;           // (D): an input before the start
    Matrix<const A*> windows;  // (threads, K): where a worker's window finds its inputs

    template <class Ctx>
    Room(Ctx& ctx, Index K, Index D)
        : weight(ctx.arena().template tensor<A>(K + 1, D)),
          zeros(ctx.arena().template tensor<A>(D)),
          windows(ctx.arena().template tensor<const A*>(Index{ctx.threads()}, K)) {}
  };

  /// What a window moves over, and the weights with their channels side by side.
  template <class A>
  struct Inputs : Room<A> {
    static_assert(std::is_same_v<A, compute_t<A>>, "zamba: on the CPU activations are of the compute type");
    const Index K;
    const Matrix<const A> x;
    const Tensor<const A, 3> state;
    const Sequences& sequences;
    using Room<A>::weight, Room<A>::zeros, Room<A>::windows;

    Inputs(Context<cpu>& ctx, Matrix<const A> input, Matrix<const A> w, Vector<const A> bias, const Sequences& rows,
           Tensor<const A, 3> past)
        : Room<A>(ctx, w.cols(), input.cols()), K(w.cols()), x(input), state(past), sequences(rows) {
      const Index D = x.cols(), next = w.stride[0];
      for (Index j = 0; j < K; ++j) {
        const A* from = w.data + j;
        A* to = &weight(j, 0);
        for (Index c = 0; c < D; ++c) to[c] = from[c * next];
      }
      std::fill_n(zeros.data, D, A(0));
      std::copy_n(bias ? bias.data : zeros.data, D, &weight(K, 0));
    }

    Index tiles() const { return ceil_div(x.cols(), tile_width); }
    Tile tile(Index i) const { return {i * tile_width, std::min(tile_width, x.cols() - i * tile_width)}; }

    /// The input at a position of a row, -(K-1) <= position.
    const A* at(Index row, Index position) const {
      if (position >= 0) return &x(sequences.begin(row) + position, 0);
      return state && sequences.start(row) > 0 ? &state(row, K - 1 + position, 0) : zeros.data;
    }

    /// The K inputs of position t, oldest first, from the tile's first channel.
    const A** window(Index row, Index t, const Tile& tile, int worker) const {
      const A** from = &windows(Index{worker}, 0);
      for (Index j = 0; j < K; ++j) from[j] = at(row, t - (K - 1) + j) + tile.channel;
      return from;
    }

    /// f(first, count, p) for each register of p at position t of a row.
    template <class F>
    void for_preactivations(Index row, Index t, const Tile& tile, int worker, F&& f) const {
      const A* const* from = window(row, t, tile, worker);
      const A* w = &weight(0, tile.channel);
      const Index next = weight.stride[0];
      kernel::for_packs<A>(tile.width, [&, K = K](Index c, auto n) {
        f(c, n, add_taps<A>(kernel::load(w + K * next + c, n), K, w, next, from, c, n));
      });
    }
  };

  /// d_p of positions [begin, begin + count) of a row; zero beyond its end.
  template <class A>
  static void differentiate(const Inputs<A>& in, Matrix<const A> d_out, Index row, Index begin, Index count,
                            const Tile& tile, int worker, Matrix<A> d_p) {
    const Index known = std::clamp(in.sequences.length(row) - begin, Index{0}, count);
    for (Index t = 0; t < known; ++t) {
      const A* dy = &d_out(in.sequences.begin(row) + begin + t, tile.channel);
      A* to = &d_p(t, 0);
      in.for_preactivations(row, begin + t, tile, worker, [&](Index c, auto n, const Pack<A>& p) {
        const Pack<A> gate = kernel::sigmoid<A>(p);
        kernel::store(to + c, Pack<A>(kernel::load(dy + c, n) * gate * (A(1) + p * (A(1) - gate))), n);
      });
    }
    for (Index t = known; t < count; ++t) std::fill_n(&d_p(t, 0), tile.width, A(0));
  }

  /// Adds the share of position t to d_weight, transposed, and d_bias.
  template <class A>
  static void add_products(const Inputs<A>& in, Index row, Index t, const Tile& tile, int worker, const A* d_p,
                           Matrix<A> sums) {
    const A* const* from = in.window(row, t, tile, worker);
    const Index next = sums.stride[0];
    kernel::for_packs<A>(tile.width, [&, K = in.K](Index c, auto n) {
      const Pack<A> d = kernel::load(d_p + c, n);
      A* to = sums.data + c;
      for (Index j = 0; j < K; ++j, to += next)
        kernel::store(to, Pack<A>(kernel::load(to, n) + d * kernel::load(from[j] + c, n)), n);
      kernel::store(to, Pack<A>(kernel::load(to, n) + d), n);
    });
  }

  /// d_x at row t of d_p: sum_j weight[:, j] * d_p_{t + (K-1) - j}, plus the gradient that came through the state.
  template <class A>
  static void convolve_back(const Inputs<A>& in, const Tile& tile, int worker, Matrix<A> d_p, Index t, const A* d_state,
                            A* d_x) {
    const A** from = &in.windows(Index{worker}, 0);
    for (Index j = 0; j < in.K; ++j) from[j] = &d_p(t + in.K - 1 - j, 0);
    const A* w = &in.weight(0, tile.channel);
    kernel::for_packs<A>(tile.width, [&, K = in.K, next = in.weight.stride[0]](Index c, auto n) {
      const Pack<A> past = d_state ? kernel::load(d_state + c, n) : kernel::zeros<A>();
      kernel::store(d_x + c, add_taps<A>(past, K, w, next, from, c, n), n);
    });
  }

  /// The gradient of the final state of a row becomes that of its initial state.
  template <class A>
  static void differentiate_state(const Inputs<A>& in, Matrix<const A> d_out, Index row, const Tile& tile, int worker,
                                  Matrix<A> d_p, Tensor<A, 3> d_state) {
    const Index length = in.sequences.length(row), past = in.K - 1;
    if (length == 0) return;
    differentiate(in, d_out, row, 0, past, tile, worker, d_p);
    // Newest first: slot s of the initial state is slot s - length of the final one, if that is still there.
    for (Index slot = past - 1; slot >= 0; --slot) {
      A* to = &d_state(row, slot, tile.channel);
      if (in.sequences.start(row) == 0) {
        std::fill_n(to, tile.width, A(0));
        continue;
      }
      const A* kept = slot >= length ? &d_state(row, slot - length, tile.channel) : nullptr;
      kernel::for_packs<A>(tile.width, [&](Index c, auto n) {
        Pack<A> sum = kept ? kernel::load(kept + c, n) : kernel::zeros<A>();
        for (Index j = 0; j <= slot; ++j)
          sum += kernel::load(&in.weight(j, tile.channel + c), n) * kernel::load(&d_p(slot - j, c), n);
        kernel::store(to + c, sum, n);
      });
    }
  }
};

}  // namespace zamba
