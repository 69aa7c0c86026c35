// SPDX-License-Identifier: MIT
// linear: y = x W^T, the product behind every projection, with an optional bias and residual.
//
//   forward    y = x W^T + bias + residual          x (n, in), weight (out, in), y (n, out)
//   backward   d_x = d_y W, or d_x += d_y W;  d_weight += d_y^T x;  d_bias += column sums of d_y
//   heads      the same for every head by itself: y_h = x_h W_h^T
//
// Kept for the backward pass: x.
//
// The weight is any Weight (weight.hpp): a Matrix, or the view of a type of its own.
//
// Two ways on the CPU:
//   few tokens (decode)    every weight is read once, in storage order, by the thread that owns its row; the
//                          dot products stay in registers. Bound by memory bandwidth; needs no scratch.
//   many tokens            Eigen products of tiles of y, spread over the threads. Weights stored in another type than
//                          the activations (bf16, or one of its own) are converted tile by tile.
//
// Numeric contract: products and sums in the activation type (float; double for double), bf16 weights converted
// exactly. The relative error of a dot product of length k is at most about k epsilon, and near sqrt(k) epsilon as met.
// Tiles depend on the extents only, so results are bit-equal for any number of threads; with few tokens a row of y is
// also the same whichever rows it is computed with.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/eigen.hpp>
#include <zamba/kernel/load_weights.hpp>
#include <zamba/kernel/simd.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/tensor.hpp>
#include <zamba/weight.hpp>

namespace zamba {

/// Whether a gradient replaces what its memory holds or is added to it.
enum class Accumulate { no, yes };

ZAMBA_DECLARE_OPERATOR(Linear, "linear.cuh");

template <>
struct Linear<cpu> {
  template <class A, class Weights>
  static void forward(Context<cpu>& ctx, Matrix<const A> x, Weights weight, Matrix<A> y, Matrix<const A> residual,
                      Vector<const A> bias) {
    if (y.rows() == 0 || y.cols() == 0) return;
    if (y.rows() <= few_tokens)
      forward_few(ctx, x, weight, y, residual, bias);
    else
      forward_many(ctx, x, weight, y, residual, bias);
  }

  /// What each worker has for itself, (threads, ...).
  template <class A>
  struct Room {
    Matrix<A> products;   // scratch of Eigen's products
    Matrix<A> converted;  // a piece of weights; nothing where they need no converting
  };
  template <class Ctx, class A, class Weights>
  static Room<A> scratch(Ctx& ctx, Matrix<const A> x, const Weights&, Matrix<A> y, Matrix<const A>, Vector<const A>) {
    if (y.rows() <= few_tokens) return {};
    return room<A, Weights>(ctx, x.cols(), piece_size(y.cols(), tile_cols));
  }
  template <class Ctx, class A, class Weights>
  static void scratch(Ctx& ctx, Tensor<const A, 3> x, const Weights& weight, Tensor<A, 3> y) {
    scratch(ctx, head_of(x, 0), weight[0], head_of(y, 0), Matrix<const A>{}, Vector<const A>{});
  }

  template <class A, class Weights>
  static void backward(Context<cpu>& ctx, Matrix<const A> d_y, Matrix<const A> x, Weights weight, Matrix<A> d_x,
                       Accumulate accumulate, Matrix<A> d_weight, Vector<A> d_bias) {
    if (d_x) backward_input(ctx, d_y, weight, d_x, accumulate);
    if (d_weight && d_y.rows() > 0) {
      ArenaScope scope(ctx.arena());
      const Matrix<A> products = weight_gradient_room(ctx, d_y, d_weight);
      for_tiles(ctx, d_weight.rows(), d_weight.cols(), [&](Range out, Range in, int worker) {
        kernel::add_product(block(d_weight, out, in), kernel::transposed(d_y.columns(out.first, out.count)),
                            x.columns(in.first, in.count), products[worker].data);
      });
    }
    if (d_bias) {
      for_pieces(ctx, d_bias.cols(), 256, [&](Range out, int) {
        for (Index t = 0; t < d_y.rows(); ++t)
          for (Index o = out.first; o < out.first + out.count; ++o) d_bias[o] += d_y(t, o);
      });
    }
  }

  template <class Ctx, class A, class Weights>
  static void backward_scratch(Ctx& ctx, Matrix<const A> d_y, Matrix<const A>, const Weights&, Matrix<A> d_x,
                               Accumulate, Matrix<A> d_weight, Vector<A>) {
    if (d_x) {
      ArenaScope scope(ctx.arena());
      input_gradient_room<A, Weights>(ctx, d_y, d_x);
    }
    if (d_weight) weight_gradient_room(ctx, d_y, d_weight);
  }
  template <class Ctx, class A, class Weights>
  static void backward_scratch(Ctx& ctx, Tensor<const A, 3> d_y, Tensor<const A, 3> x, const Weights& weight,
                               Tensor<A, 3> d_x, Accumulate accumulate, Tensor<A, 3> d_weight) {
    backward_scratch(ctx, head_of(d_y, 0), head_of(x, 0), weight[0], head_of(d_x, 0), accumulate, d_weight[0],
                     Vector<A>{});
  }

  template <class A, class Weights>
  static void forward_heads(Context<cpu>& ctx, Tensor<const A, 3> x, Weights weight, Tensor<A, 3> y) {
    for (Index h = 0; h < weight.rows(); ++h)
      forward(ctx, head_of(x, h), weight[h], head_of(y, h), Matrix<const A>{}, Vector<const A>{});
  }

  template <class A, class Weights>
  static void backward_heads(Context<cpu>& ctx, Tensor<const A, 3> d_y, Tensor<const A, 3> x, Weights weight,
                             Tensor<A, 3> d_x, Accumulate accumulate, Tensor<A, 3> d_weight) {
    for (Index h = 0; h < weight.rows(); ++h)
      backward(ctx, head_of(d_y, h), head_of(x, h), weight[h], head_of(d_x, h), accumulate, d_weight[h], Vector<A>{});
  }

 private:
  struct Range {
    Index first, count;
  };

  /// Up to so many tokens, reading the weights once is what takes the time.
  static constexpr Index few_tokens = 32;
  /// Extents of an output tile: large enough for Eigen's full rate, small enough to share out among threads.
  static constexpr Index tile_rows = 256, tile_cols = 384;
  /// What piece_size makes of tile_rows at most.
  static constexpr Index most_tile_rows = tile_rows * 3 / 2;
  /// Extent of a product's sum taken at a time: it bounds the scratch for converted weights.
  static constexpr Index depth = 1024;

  template <class View>
  static View block(const View& m, Range rows, Range cols) {
    return m.slice(rows.first, rows.count).columns(cols.first, cols.count);
  }

  /// Calls f(range, worker) for equal parts of [0, extent), each a multiple of 16 (but the last) and about `size` long.
  template <class F>
  static void for_pieces(Context<cpu>& ctx, Index extent, Index size, F&& f) {
    const Index piece = piece_size(extent, size);
    ctx.parallel_for(ceil_div(extent, piece), [&](Index i, int worker) {
      f(Range{i * piece, std::min(piece, extent - i * piece)}, worker);
    });
  }

  /// Calls f(row range, column range, worker) for every tile of a (rows, cols) result.
  template <class F>
  static void for_tiles(Context<cpu>& ctx, Index rows, Index cols, F&& f) {
    const Index height = piece_size(rows, tile_rows), width = piece_size(cols, tile_cols);
    const Index down = ceil_div(rows, height), across = ceil_div(cols, width);
    ctx.parallel_for(down * across, [&](Index i, int worker) {
      const Index row = i % down * height, col = i / down * width;
      f(Range{row, std::min(height, rows - row)}, Range{col, std::min(width, cols - col)}, worker);
    });
  }

  static Index piece_size(Index extent, Index size) {
    const Index pieces = std::max<Index>(1, (extent + size / 2) / size);
    return std::max<Index>(16, ceil_div(ceil_div(extent, pieces), 16) * 16);
  }

  template <class A, class Weights>
  static void forward_many(Context<cpu>& ctx, Matrix<const A> x, Weights weight, Matrix<A> y, Matrix<const A> residual,
                           Vector<const A> bias) {
    ArenaScope scope(ctx.arena());
    const Room<A> room = scratch(ctx, x, weight, y, residual, bias);
    for_tiles(ctx, y.rows(), y.cols(), [&](Range tokens, Range out, int worker) {
      auto tile = kernel::map(block(y, tokens, out));
      if (!residual)
        tile.setZero();
      else if (residual.data != y.data)
        tile = kernel::map(block(residual, tokens, out));
      if (bias) tile.rowwise() += kernel::map(Matrix<const A>(bias.data + out.first, 1, out.count)).row(0);
      for_depth(x.cols(), [&](Range in) {
        const Matrix<const A> w = converted<A>(block(weight, out, in), room.converted, worker);
        kernel::add_product(block(y, tokens, out), block(x, tokens, in), kernel::transposed(w),
                            room.products[worker].data);
      });
    });
  }

  template <class A, class Weights>
  static void backward_input(Context<cpu>& ctx, Matrix<const A> d_y, Weights weight, Matrix<A> d_x,
                             Accumulate accumulate) {
    ArenaScope scope(ctx.arena());
    const Room<A> room = input_gradient_room<A, Weights>(ctx, d_y, d_x);
    for_tiles(ctx, d_x.rows(), d_x.cols(), [&](Range tokens, Range in, int worker) {
      const Matrix<A> tile = block(d_x, tokens, in);
      if (accumulate == Accumulate::no) kernel::map(tile).setZero();
      for_depth(d_y.cols(), [&](Range out) {
        kernel::add_product(tile, block(d_y, tokens, out), converted<A>(block(weight, out, in), room.converted, worker),
                            room.products[worker].data);
      });
    });
  }

  /// f(range) for parts of the extent that a product sums over, in order.
  template <class F>
  static void for_depth(Index extent, F&& f) {
    for (Index k = 0; k < extent; k += depth) f(Range{k, std::min(depth, extent - k)});
  }

  /// For sums over `extent`, in tiles of up to `width` columns.
  template <class A, class Weights, class Ctx>
  static Room<A> room(Ctx& ctx, Index extent, Index width) {
    const Index threads = ctx.threads(), most = std::min(extent, depth);
    Room<A> room;
    room.products = ctx.arena().template tensor<A>(threads, kernel::product_scratch<A>(most_tile_rows, most, width));
    if constexpr (!std::is_same_v<Matrix<const A>, Weights>)
      room.converted = ctx.arena().template tensor<A>(threads, most * width);
    return room;
  }

  template <class A, class Weights, class Ctx>
  static Room<A> input_gradient_room(Ctx& ctx, Matrix<const A> d_y, Matrix<A> d_x) {
    return room<A, Weights>(ctx, d_y.cols(), piece_size(d_x.cols(), tile_cols));
  }
  template <class Ctx, class A>
  static Matrix<A> weight_gradient_room(Ctx& ctx, Matrix<const A> d_y, Matrix<A> d_weight) {
    const Index width = piece_size(d_weight.cols(), tile_cols);
    return ctx.arena().template tensor<A>(Index{ctx.threads()},
                                          kernel::product_scratch<A>(most_tile_rows, d_y.rows(), width));
  }

  template <class A, class Weights>
  static Matrix<const A> converted(Weights weight, Matrix<A> scratch, int worker) {
    if constexpr (std::is_same_v<Matrix<const A>, Weights>) {
      return weight;
    } else {
      const Matrix<A> to(&scratch(worker, 0), weight.rows(), weight.cols());
      for (Index o = 0; o < weight.rows(); ++o)
        kernel::for_packs<A>(weight.cols(), [&](Index k, auto count) {
          kernel::store<A>(&to(o, k), kernel::load_weights<A>(weight, o, k, count), count);
        });
      return to;
    }
  }

  /// Rows of weights and tokens whose dot products are summed together: as many accumulators as registers allow.
  static constexpr Index rows_at_once = 4, tokens_at_once = kernel::register_bytes == 64 ? 4 : 2;

  template <class A, class Weights>
  static void forward_few(Context<cpu>& ctx, Matrix<const A> x, Weights weight, Matrix<A> y, Matrix<const A> residual,
                          Vector<const A> bias) {
    constexpr Index least_work = 1 << 15;  // weights of a piece: below, starting a thread costs more than it saves
    const Index pieces = std::clamp<Index>(weight.size() / least_work, 1, 8 * ctx.threads());
    const Index groups = ceil_div(weight.rows(), rows_at_once);
    const Index piece = ceil_div(groups, pieces) * rows_at_once;
    ctx.parallel_for(ceil_div(weight.rows(), piece), [&](Index i, int) {
      const Index end = std::min((i + 1) * piece, weight.rows());
      Index o = i * piece;
      for (; o + rows_at_once <= end; o += rows_at_once) all_tokens<rows_at_once>(x, weight, y, residual, bias, o);
      for (; o < end; ++o) all_tokens<1>(x, weight, y, residual, bias, o);
    });
  }

  /// Columns [o, o + Rows) of y.
  template <Index Rows, class A, class Weights>
  static void all_tokens(Matrix<const A> x, Weights weight, Matrix<A> y, Matrix<const A> residual, Vector<const A> bias,
                         Index o) {
    Index t = 0;
    for (; t + tokens_at_once <= y.rows(); t += tokens_at_once)
      dot_products<Rows, tokens_at_once>(x, weight, y, residual, bias, o, t);
    switch (y.rows() - t) {
      case 3:
        return dot_products<Rows, 3>(x, weight, y, residual, bias, o, t);
      case 2:
        return dot_products<Rows, 2>(x, weight, y, residual, bias, o, t);
      case 1:
        return dot_products<Rows, 1>(x, weight, y, residual, bias, o, t);
    }
  }

  /// Elements [t, t + Tokens) x [o, o + Rows) of y. Each is summed over k in one register, whatever Rows and Tokens
  /// are.
  template <Index Rows, Index Tokens, class A, class Weights>
  static void dot_products(Matrix<const A> x, Weights weight, Matrix<A> y, Matrix<const A> residual,
                           Vector<const A> bias, Index o, Index t) {
    constexpr Index step = kernel::lanes<A>;
    kernel::Pack<A> sums[std::size_t{Rows}][std::size_t{Tokens}] = {};
    const auto add = [&](Index k, Index count) __attribute__((always_inline)) {
      kernel::Pack<A> weights[std::size_t{Rows}];
      kernel::unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
        weights[r] = kernel::load_weights<A, Rows>(weight, o + r, k, count);
      });
      kernel::unrolled<Tokens>([&](auto s) __attribute__((always_inline)) {
        const A* from = x.data + (t + s) * x.stride[0] + k;
        const kernel::Pack<A> inputs = count >= step ? kernel::load<A>(from) : kernel::load<A>(from, count);
        kernel::unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
          sums[r][s] = kernel::multiply_add<A>(weights[r], inputs, sums[r][s]);
        });
      });
    };
    const Index whole = x.cols() / step * step;
    for (Index k = 0; k < whole; k += step) add(k, step);
    if (whole < x.cols()) add(whole, x.cols() - whole);
    kernel::unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
      kernel::unrolled<Tokens>([&](auto s) __attribute__((always_inline)) {
        A value = kernel::sum<A>(sums[r][s]);
        if (bias) value += bias[o + r];
        if (residual) value += residual(t + s, o + r);
        y(t + s, o + r) = value;
      });
    });
  }
};

/// y = x W^T + bias + residual; `residual` may be the same memory as y.
template <class D, class A, class Weights>
void linear(Context<D>& ctx, std::type_identity_t<Matrix<const A>> x, const Weights& weight, Matrix<A> y,
            std::type_identity_t<Matrix<const A>> residual = {},
            std::type_identity_t<Vector<const compute_t<A>>> bias = {}) {
  if constexpr (checked) {
    const kernel::Door door{"linear"};
    door.shape("x", x, y.rows(), weight.cols());
    door.shape("y", y, y.rows(), weight.rows());
    door.optional("residual", residual, y.rows(), weight.rows());
    door.optional("bias", bias, weight.rows());
  }
  Linear<D>::forward(ctx, x, detail::read_only(weight), y, residual, bias);
}

/// d_x = or += d_y W, d_weight += d_y^T x, d_bias += column sums of d_y; empty views of these are not wanted.
template <class D, class A, class Weights>
void linear_backward(Context<D>& ctx, std::type_identity_t<Matrix<const A>> d_y,
                     std::type_identity_t<Matrix<const A>> x, const Weights& weight, Matrix<A> d_x,
                     Accumulate accumulate, std::type_identity_t<Matrix<compute_t<A>>> d_weight,
                     std::type_identity_t<Vector<compute_t<A>>> d_bias = {}) {
  if constexpr (checked) {
    const kernel::Door door{"linear_backward"};
    door.shape("d_y", d_y, d_y.rows(), weight.rows());
    if (d_weight) door.shape("x", x, d_y.rows(), weight.cols());
    door.optional("d_x", d_x, d_y.rows(), weight.cols());
    door.optional("d_weight", d_weight, weight.rows(), weight.cols());
    door.optional("d_bias", d_bias, weight.rows());
  }
  Linear<D>::backward(ctx, d_y, x, detail::read_only(weight), d_x, accumulate, d_weight, d_bias);
}

/// y_h = x_h W_h^T for every head: x (n, heads, in), weight (heads, out, in), y (n, heads, out).
template <class D, class A, class Weights>
void linear_heads(Context<D>& ctx, std::type_identity_t<Tensor<const A, 3>> x, const Weights& weight, Tensor<A, 3> y) {
  if constexpr (checked) {
    const kernel::Door door{"linear_heads"};
    door.shape("x", x, y.rows(), weight.rows(), weight.cols());
    door.shape("y", y, y.rows(), weight.rows(), weight[0].rows());
  }
  Linear<D>::forward_heads(ctx, x, detail::read_only(weight), y);
}

/// d_x_h = or += d_y_h W_h, d_weight_h += d_y_h^T x_h.
template <class D, class A, class Weights>
void linear_heads_backward(Context<D>& ctx, std::type_identity_t<Tensor<const A, 3>> d_y,
                           std::type_identity_t<Tensor<const A, 3>> x, const Weights& weight, Tensor<A, 3> d_x,
                           Accumulate accumulate, Tensor<compute_t<A>, 3> d_weight) {
  if constexpr (checked) {
    const kernel::Door door{"linear_heads_backward"};
    const Index heads = weight.rows(), out = weight[0].rows(), in = weight.cols();
    door.shape("d_y", d_y, d_y.rows(), heads, out);
    door.shape("x", x, d_y.rows(), heads, in);
    door.optional("d_x", d_x, d_y.rows(), heads, in);
    door.optional("d_weight", d_weight, heads, out, in);
  }
  Linear<D>::backward_heads(ctx, d_y, x, detail::read_only(weight), d_x, accumulate, d_weight);
}

}  // namespace zamba
