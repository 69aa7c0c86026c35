// SPDX-License-Identifier: MIT
// attention in bf16 on CUDA: prefill of one row over its own tokens (the heads of Zamba-7B, of Zamba2 and of
// Llama-2-7B) and of a chunk over a cache; decode of one token, and of 64 rows, over caches; the backward pass of rows
// over their own tokens.
#include <zamba/ops/attention.cuh>

#include <cmath>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include "../support/device.cuh"

namespace {

using namespace zamba;

/// `rows` rows of `tokens` after `past` cached positions each; without caches where past is 0. Several sets, used in
/// turn.
struct Data {
  AttentionShape shape;
  Index rows, tokens, past, width, kv_width, positions, sets;
  bench::DeviceArray<bf16> q, k, v, cache_k, cache_v, out;
  bench::DeviceArray<float> lse;
  Sequences sequences;

  Data(Context<cuda>& ctx, Index heads, Index kv_heads, Index head_dim, Index rows, Index tokens, Index past)
      : shape{heads, kv_heads, head_dim, 1 / std::sqrt(static_cast<double>(head_dim))},
        rows(rows),
        tokens(tokens),
        past(past),
        width(heads * head_dim),
        kv_width(kv_heads * head_dim),
        positions(past > 0 ? past + tokens : 0),
        sets(bench::sets_beyond_cache(bytes())),
        q(ctx, sets * rows * tokens * width, 1, 4),
        k(ctx, sets * rows * tokens * kv_width, 2, 4),
        v(ctx, sets * rows * tokens * kv_width, 3),
        cache_k(ctx, sets * rows * positions * kv_width, 4, 4),
        cache_v(ctx, sets * rows * positions * kv_width, 5),
        out(ctx, sets * rows * tokens * width, 6),
        lse(ctx, rows * tokens * heads, 7),
        sequences(bench::equal_rows(ctx, rows, tokens, past)) {}

  /// Read and written, but for lse.
  double bytes() const {
    const Index own = 2 * rows * tokens * (width + kv_width);
    return static_cast<double>(own + 2 * rows * positions * kv_width) * sizeof(bf16);
  }
  double flops() const {
    const double t = static_cast<double>(tokens);
    return 4 * static_cast<double>(rows * width) * t * (static_cast<double>(past) + 0.5 * (t + 1));
  }

  template <class T>
  Matrix<T> of_set(const bench::DeviceArray<T>& array, Index set, Index cols) const {
    return array.view(sets * rows * tokens, cols).slice(set * rows * tokens, rows * tokens);
  }
  Tensor<bf16, 3> cache(const bench::DeviceArray<bf16>& array, Index set) const {
    if (past == 0) return {};
    return array.view(sets * rows, positions, kv_width).slice(set * rows, rows);
  }
  void forward(Context<cuda>& ctx, Index set) const {
    attention<cuda, bf16, bf16>(ctx, shape, of_set(q, set, width), of_set(k, set, kv_width), of_set(v, set, kv_width),
                                sequences, cache(cache_k, set), cache(cache_v, set), of_set(out, set, width),
                                lse.view(rows * tokens, shape.heads));
  }

  static std::vector<bf16> host(const bf16* from, Index count) {
    std::vector<bf16> values(static_cast<std::size_t>(count));
    Memory<cuda>::copy_to_host(values.data(), from, values.size() * sizeof(bf16));
    return values;
  }

  /// Whether the output of the last row's last token, in set 0, is what a plain loop gives.
  bool right() const {
    const Index last = rows * tokens - 1, keys = past + tokens;
    const auto x = host(&of_set(q, 0, width)(last, 0), width), y = host(&of_set(out, 0, width)(last, 0), width);
    const bf16* first_k = past > 0 ? &cache(cache_k, 0)(rows - 1, 0, 0) : k.view(k.size()).data;
    const bf16* first_v = past > 0 ? &cache(cache_v, 0)(rows - 1, 0, 0) : v.view(v.size()).data;
    if (past == 0 && rows > 1) first_k += (rows - 1) * tokens * kv_width, first_v += (rows - 1) * tokens * kv_width;
    const auto all_k = host(first_k, keys * kv_width), all_v = host(first_v, keys * kv_width);
    double difference = 0, norm = 0;
    for (Index head = 0; head < shape.heads; ++head) {
      const Index column = head / (shape.heads / shape.kv_heads) * shape.head_dim, own = head * shape.head_dim;
      std::vector<double> sums(static_cast<std::size_t>(shape.head_dim));
      double total = 0;
      for (Index j = 0; j < keys; ++j) {
        const bf16 *key = all_k.data() + j * kv_width + column, *value = all_v.data() + j * kv_width + column;
        double score = 0;
        for (Index c = 0; c < shape.head_dim; ++c) score += double(x[static_cast<std::size_t>(own + c)]) * key[c];
        const double p = std::exp(shape.scale * score);
        total += p;
        for (Index c = 0; c < shape.head_dim; ++c) sums[static_cast<std::size_t>(c)] += p * value[c];
      }
      for (Index c = 0; c < shape.head_dim; ++c) {
        const double wanted = sums[static_cast<std::size_t>(c)] / total;
        const double error = y[static_cast<std::size_t>(own + c)] - wanted;
        difference += error * error;
        norm += wanted * wanted;
      }
    }
    return difference < 1e-5 * norm;  // probabilities and output rounded to bf16: 1.6e-3 by norm
  }
};

void forward(benchmark::State& state) {
  Context<cuda> ctx;
  const Data data(ctx, state.range(0), state.range(1), state.range(2), state.range(3), state.range(4), state.range(5));
  data.forward(ctx, 0);
  if (!data.right()) return state.SkipWithError("differs from a plain loop");
  bench::time_on_device(state, ctx, data.sets, [&](Index set) { data.forward(ctx, set); });
  bench::report_on_device(state, data.flops(), data.bytes());
}

/// The backward pass of `data`, which has no caches.
struct Gradients {
  const Data& data;
  bench::DeviceArray<bf16> d_out, d_q, d_k, d_v;

  Gradients(Context<cuda>& ctx, const Data& data)
      : data(data),
        d_out(ctx, data.q.size(), 8),
        d_q(ctx, data.q.size(), 9),
        d_k(ctx, data.k.size(), 10),
        d_v(ctx, data.v.size(), 11) {}

  double bytes() const {
    return static_cast<double>(4 * data.rows * data.tokens * (data.width + data.kv_width)) * sizeof(bf16);
  }
  void backward(Context<cuda>& ctx, Index set) const {
    const Index width = data.width, kv_width = data.kv_width;
    attention_backward(ctx, data.shape, data.of_set(d_out, set, width), data.of_set(data.q, set, width),
                       data.of_set(data.k, set, kv_width), data.of_set(data.v, set, kv_width), data.sequences,
                       Tensor<bf16, 3>{}, {}, data.of_set(data.out, set, width),
                       data.lse.view(data.rows * data.tokens, data.shape.heads), data.of_set(d_q, set, width),
                       data.of_set(d_k, set, kv_width), data.of_set(d_v, set, kv_width), {}, {});
  }

  /// Sums of squares of errors, and of what is right.
  struct Difference {
    double error = 0, norm = 0;
    void add(double got, double wanted) {
      error += (got - wanted) * (got - wanted);
      norm += wanted * wanted;
    }
    /// P or dS and the gradient rounded to bf16, 1.6e-3 each by norm, and out in d_out . out.
    bool small() const { return error < 2e-5 * norm; }
  };

  /// Whether plain loops give the same gradients of set 0 for the first and the last head of the first row: of the
  /// query of the last token; and of the keys and values of three tokens.
  bool right() const {
    using Row = std::vector<bf16>;
    const Index n = data.tokens, d = data.shape.head_dim, group = data.shape.heads / data.shape.kv_heads;
    const Row q = data.q.host(), k = data.k.host(), v = data.v.host(), y = data.out.host(), dy = d_out.host();
    const Row of_q = d_q.host(), of_k = d_k.host(), of_v = d_v.host();
    const std::vector<float> lse = data.lse.host();
    const auto dot = [&](const Row& a, Index a_at, const Row& b, Index b_at) {
      double sum = 0;
      for (Index c = 0; c < d; ++c)
        sum += double(a[static_cast<std::size_t>(a_at + c)]) * b[static_cast<std::size_t>(b_at + c)];
      return sum;
    };
    Difference query, key, value;
    std::vector<double> sums(static_cast<std::size_t>(d)), sums_v(sums);
    for (const Index kv_head : {Index{0}, data.shape.kv_heads - 1}) {
      const auto own = [&](Index i, Index head) { return i * data.width + head * d; };
      const auto other = [&](Index j) { return j * data.kv_width + kv_head * d; };
      const auto p = [&](Index i, Index j, Index head) {
        return std::exp(data.shape.scale * dot(q, own(i, head), k, other(j)) -
                        lse[static_cast<std::size_t>(i * data.shape.heads + head)]);
      };
      const auto add = [&](std::vector<double>& to, double factor, const Row& from, Index at) {
        for (Index c = 0; c < d; ++c)
          to[static_cast<std::size_t>(c)] += factor * from[static_cast<std::size_t>(at + c)];
      };
      const auto compare = [&](Difference& difference, const Row& got, Index at, const std::vector<double>& wanted) {
        for (Index c = 0; c < d; ++c)
          difference.add(got[static_cast<std::size_t>(at + c)], wanted[static_cast<std::size_t>(c)]);
      };
      const Index head = kv_head * group, last = own(n - 1, head);
      std::fill(sums.begin(), sums.end(), 0.0);
      for (Index j = 0; j < n; ++j)
        add(sums, data.shape.scale * p(n - 1, j, head) * (dot(dy, last, v, other(j)) - dot(dy, last, y, last)), k,
            other(j));
      compare(query, of_q, last, sums);
      for (const Index j : {Index{0}, n / 3, n - 2}) {
        std::fill(sums.begin(), sums.end(), 0.0);
        std::fill(sums_v.begin(), sums_v.end(), 0.0);
        for (Index h = head; h < head + group; ++h)
          for (Index i = j; i < n; ++i) {
            const Index at = own(i, h);
            const double e = p(i, j, h);
            add(sums_v, e, dy, at);
            add(sums, data.shape.scale * e * (dot(dy, at, v, other(j)) - dot(dy, at, y, at)), q, at);
          }
        compare(key, of_k, other(j), sums);
        compare(value, of_v, other(j), sums_v);
      }
    }
    return query.small() && key.small() && value.small();
  }
};

void backward(benchmark::State& state) {
  Context<cuda> ctx;
  const Data data(ctx, state.range(0), state.range(1), state.range(2), state.range(3), state.range(4), 0);
  const Gradients gradients(ctx, data);
  data.forward(ctx, 0);
  gradients.backward(ctx, 0);
  if (!gradients.right()) return state.SkipWithError("differs from plain loops");
  bench::time_on_device(
      state, ctx, data.sets, [&](Index set) { gradients.backward(ctx, set); }, 4);
  bench::report_on_device(state, 2.5 * data.flops(), gradients.bytes());
}

const std::vector<std::string> names = {"heads", "kv_heads", "head_dim", "rows", "tokens", "past"};
BENCHMARK(forward)
    ->Name("attention/prefill/cuda/bf16")
    ->ArgNames(names)
    ->Args({16, 16, 464, 1, 512, 0})
    ->Args({16, 16, 464, 1, 2048, 0})
    ->Args({16, 16, 464, 1, 4096, 0})
    ->Args({16, 16, 464, 1, 8192, 0})
    ->Args({16, 16, 464, 1, 512, 2048})
    ->Args({32, 32, 224, 1, 8192, 0})
    ->Args({32, 32, 160, 1, 8192, 0})
    ->Args({32, 32, 128, 1, 512, 0})
    ->Args({32, 32, 128, 1, 2048, 0})
    ->Args({32, 32, 128, 1, 4096, 0})
    ->Args({32, 32, 128, 1, 8192, 0})
    ->Args({32, 8, 128, 1, 8192, 0})
    ->Args({32, 32, 80, 1, 8192, 0})
    ->Args({32, 32, 64, 1, 8192, 0})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(backward)
    ->Name("attention/backward/cuda/bf16")
    ->ArgNames({"heads", "kv_heads", "head_dim", "rows", "tokens"})
    ->Args({16, 16, 464, 1, 4096})
    ->Args({16, 16, 464, 1, 8192})
    ->Args({32, 32, 224, 1, 8192})
    ->Args({32, 32, 160, 1, 8192})
    ->Args({32, 32, 128, 1, 8192})
    ->Args({16, 16, 128, 8, 2048})
    ->Args({32, 8, 128, 1, 8192})
    ->Args({32, 32, 64, 1, 8192})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(forward)
    ->Name("attention/decode/cuda/bf16")
    ->ArgNames(names)
    ->Args({16, 16, 464, 1, 1, 511})
    ->Args({16, 16, 464, 1, 1, 2047})
    ->Args({16, 16, 464, 1, 1, 8191})
    ->Args({16, 16, 464, 64, 1, 511})
    ->Args({32, 32, 128, 1, 1, 4095})
    ->Args({32, 8, 128, 1, 1, 8191})
    ->Args({32, 8, 128, 64, 1, 2047})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
