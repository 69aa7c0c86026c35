// SPDX-License-Identifier: MIT
// cross_entropy: the next-token loss, with the head that makes the logits, which exist for a tile of positions only.
//
//   z_t = head h_t                                   h (n, d) after the final norm, head (V, d), z (n, V)
//   sum = sum over t with target_t >= 0 of lse_t - z_t[target_t] + c lse_t^2,  lse_t = log(sum_v exp(z_tv))
//   d_z_tv = scale ((1 + 2 c lse_t) exp(z_tv - lse_t) - [v = target_t]),  d_h = d_z head,  d_head += d_z^T h
//
// c is z_loss, 0 where nobody asks for it: the z-loss of PaLM (1e-4 there), which keeps the normalisers' logarithms
// near 0; without it a number added to all logits of a position costs nothing.
//
// Kept for the backward pass: nothing; loss and gradients come from one pass, each tile's logits turning into their
// gradients in place. Scratch: a tile of at most 2^22 logits (one row at least).
//
// Numeric contract: logits and softmax in the activation type, the largest logit subtracted first; sums of exponentials
// and the loss in double. Rows are added in order, so results are bit-equal for any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/kernel/door.hpp>
#include <zamba/kernel/softmax.hpp>
#include <zamba/number.hpp>
#include <zamba/op.hpp>
#include <zamba/ops/linear.hpp>
#include <zamba/tensor.hpp>
#include <zamba/weight.hpp>

namespace zamba {

/// The loss of the positions that have a target, in nats.
struct LossSum {
  double sum = 0;
  Index count = 0;

  LossSum& operator+=(const LossSum& more) {
    sum += more.sum;
    count += more.count;
    return *this;
  }
  double mean() const { return count ? sum / static_cast<double>(count) : 0; }
};

ZAMBA_DECLARE_OPERATOR(CrossEntropy, "cross_entropy.cuh");

template <>
struct CrossEntropy<cpu> {
  template <class A, class Weights>
  static void forward(Context<cpu>& ctx, Matrix<const A> h, Weights head, const Token* targets, double z_loss,
                      LossSum* total) {
    *total += over_tiles(ctx, h, head, targets, [&](Index first, Matrix<A> logits, Vector<double> losses) {
      ctx.parallel_for(logits.rows(), [&](Index t, int) {
        const Token target = targets[first + t];
        losses[t] = target < 0 ? 0 : softmax(logits[t], target, z_loss).loss;
      });
    });
  }

  template <class A, class Weights>
  static void backward(Context<cpu>& ctx, Matrix<const A> h, Weights head, const Token* targets, double scale,
                       Matrix<A> d_h, Matrix<A> d_head, double z_loss, LossSum* total) {
    *total += over_tiles(ctx, h, head, targets, [&](Index first, Matrix<A> logits, Vector<double> losses) {
      ctx.parallel_for(logits.rows(), [&](Index t, int) {
        const Token target = targets[first + t];
        const Vector<A> row = logits[t];
        if (target < 0) {
          losses[t] = 0;
          std::fill_n(row.data, row.cols(), A(0));
          return;
        }
        const Softmax result = softmax(row, target, z_loss);
        losses[t] = result.loss;
        kernel::scale(row.data, static_cast<A>(scale * result.weight / result.sum), row.cols(), row.data);
        row[target] -= static_cast<A>(scale);
      });
      const Index rows = logits.rows();
      Linear<cpu>::backward(ctx, Matrix<const A>(logits), h.slice(first, rows), head, d_h.slice(first, rows),
                            Accumulate::no, d_head, Vector<A>{});
    });
  }

  template <class Ctx, class A, class Weights>
  static void backward_scratch(Ctx& ctx, Matrix<const A> h, const Weights& head, const Token*, double, Matrix<A> d_h,
                               Matrix<A> d_head, const auto&...) {
    const auto logits = tile_room<A>(ctx, h.rows(), head.rows()).logits;
    const auto of_tile = [rows = logits.rows()](const auto& m) { return m.slice(0, rows); };
    {
      ArenaScope scope(ctx.arena());
      Linear<cpu>::scratch(ctx, of_tile(h), head, logits, Matrix<const A>{}, Vector<const A>{});
    }
    Linear<cpu>::backward_scratch(ctx, Matrix<const A>(logits), of_tile(h), head, of_tile(d_h), Accumulate::no, d_head,
                                  Vector<A>{});
  }

 private:
  /// Logits that exist at a time: 16 MiB of float.
  static constexpr Index tile_size = Index{1} << 22;

  struct Softmax {
    double loss, weight, sum;  // weight: 1 + 2 c lse
  };

  template <class A>
  struct Tile {
    Matrix<A> logits;       // (positions, vocabulary)
    Vector<double> losses;  // (positions)
  };
  /// Of n positions in tiles of about one size.
  template <class A, class Ctx>
  static Tile<A> tile_room(Ctx& ctx, Index n, Index vocabulary) {
    const Index most = std::max<Index>(1, tile_size / vocabulary), rows = ceil_div(n, ceil_div(n, most));
    return {ctx.arena().template tensor<A>(rows, vocabulary), ctx.arena().template tensor<double>(rows)};
  }

  /// Calls f(first position, logits, losses to fill) tile by tile.
  template <class A, class Weights, class F>
  static LossSum over_tiles(Context<cpu>& ctx, Matrix<const A> h, Weights head, const Token* targets, F&& f) {
    LossSum total;
    const Index n = h.rows();
    if (n == 0) return total;
    ArenaScope scope(ctx.arena());
    const auto [logits, losses] = tile_room<A>(ctx, n, head.rows());
    const Index rows = losses.size();
    for (Index first = 0; first < n; first += rows) {
      const Index count = std::min(rows, n - first);
      const auto tile = logits.slice(0, count);
      Linear<cpu>::forward(ctx, h.slice(first, count), head, tile, Matrix<const A>{}, Vector<const A>{});
      f(first, tile, losses);
      for (Index t = 0; t < count; ++t) {
        total.sum += losses[t];
        total.count += targets[first + t] >= 0;
      }
    }
    return total;
  }

  /// The loss of one row of logits, and the sum of e^(z - max z); these exponentials replace the logits.
  template <class A>
  static Softmax softmax(Vector<A> row, Token target, double z_loss) {
    const A at_target = row[target], largest = kernel::largest(row.data, row.cols());
    double sum = 0;
    constexpr Index chunk = 1024;  // summed in the activation type
    for (Index first = 0; first < row.cols(); first += chunk)
      sum += static_cast<double>(kernel::exponentials(row.data + first, largest, std::min(chunk, row.cols() - first)));
    const double log_sum = std::log(sum), lse = log_sum + static_cast<double>(largest);
    return {log_sum + (static_cast<double>(largest) - static_cast<double>(at_target)) + z_loss * lse * lse,
            1 + 2 * z_loss * lse, sum};
  }
};

namespace detail {

/// What add(total) adds to nothing. Waits for the device.
template <class D, class Add>
LossSum read_loss(Context<D>& ctx, Add&& add) {
  ArenaScope scope(ctx.arena());
  const auto total = ctx.arena().template tensor<LossSum>(1);
  ctx.zero(total);
  add(total.data);
  ctx.post(Vector<const LossSum>(total));
  return *ctx.template posted<LossSum>();
}

}  // namespace detail

/// The loss only, added to *total, which is of the device: nothing is waited for. A negative target means no loss at
/// this position; z_loss times the square of the logarithm of the normaliser is a part of it.
template <class D, class A, class Weights>
void cross_entropy(Context<D>& ctx, Tensor<A, 2> h, const Weights& head, const Token* targets, double z_loss,
                   LossSum* total) {
  if constexpr (checked) {
    const kernel::Door door{"cross_entropy"};
    door.shape("h", h, h.rows(), head.cols());
  }
  CrossEntropy<D>::forward(ctx, Matrix<const std::remove_const_t<A>>(h), detail::read_only(head), targets, z_loss,
                           total);
}
template <class D, class A, class Weights>
LossSum cross_entropy(Context<D>& ctx, Tensor<A, 2> h, const Weights& head, const Token* targets, double z_loss = 0) {
  return detail::read_loss(ctx, [&](LossSum* total) { cross_entropy(ctx, h, head, targets, z_loss, total); });
}

/// The same, with d_h = d(scale * sum) / dh, and d_head += d(scale * sum) / dhead.
template <class D, class A, class Weights>
void cross_entropy_backward(Context<D>& ctx, std::type_identity_t<Matrix<const A>> h, const Weights& head,
                            const Token* targets, double scale, Matrix<A> d_h,
                            std::type_identity_t<Matrix<compute_t<A>>> d_head, double z_loss, LossSum* total) {
  if constexpr (checked) {
    const kernel::Door door{"cross_entropy_backward"};
    door.shape("h", h, h.rows(), head.cols());
    door.shape("d_h", d_h, h.rows(), head.cols());
    door.shape("d_head", d_head, head.rows(), head.cols());
  }
  CrossEntropy<D>::backward(ctx, h, detail::read_only(head), targets, scale, d_h, d_head, z_loss, total);
}
template <class D, class A, class Weights>
LossSum cross_entropy_backward(Context<D>& ctx, std::type_identity_t<Matrix<const A>> h, const Weights& head,
                               const Token* targets, double scale, Matrix<A> d_h,
                               std::type_identity_t<Matrix<compute_t<A>>> d_head, double z_loss = 0) {
  return detail::read_loss(
      ctx, [&](LossSum* total) { cross_entropy_backward(ctx, h, head, targets, scale, d_h, d_head, z_loss, total); });
}

}  // namespace zamba
