// SPDX-License-Identifier: MIT
// The backward pass of attention of bf16 on tensor cores by mma.m16n8k16, for every GPU from compute capability 8.0 on;
// equations in ops/attention.hpp.
//
// One kernel for each of d_q, d_k and d_v, so that nothing is added atomically and a block has registers for the sums
// of wide heads. A block owns a tile of rows, X; all columns Y that they meet pass by:
//
//           rows      columns                           X1 Y1   X2 Y2      sums
//   d_q     queries   keys                              Q  K    d_out V    d_q = scale dS K
//   d_k     keys      queries, of one head after the    K  Q    V  d_out   d_k = scale dS^T Q
//   d_v     keys      other of those that share keys    K  Q               d_v = P^T d_out
//
//   S = X1 Y1^T,   P = exp2(scale log2(e) S - log2(e) lse),   dP = X2 Y2^T,   dS = P (dP - d_out . out)
//
// X1 and X2 stay in shared memory. As in prefill_sm80_wide.cuh, eight warps are groups of rows times groups of columns,
// these being columns Y in the first products and dimensions in the last; Y passes in slabs through a ring of stages,
// and P or dS meets the other groups in shared memory.
//
// Numeric contract: scores, probabilities and sums in float; P and dS are rounded to bf16 before the last product.
// Columns come in tiles counted from the first that a row of the tile meets, and in one order.
#pragma once

#include <algorithm>
#include <type_traits>

#include <zamba/context.cuh>
#include <zamba/kernel/fragment.cuh>
#include <zamba/kernel/launch.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/attention/backward_tile.cuh>
#include <zamba/ops/attention/prefill_sm80_wide.cuh>

namespace zamba::kernel {

enum class AttentionGradient { queries, keys, values };

/// Heads of at most 8 DimTiles_ dimensions times the groups of columns; slabs of SlabDims_ dimensions of a tile of
/// columns, or of all dimensions of SlabKeys_ columns. Some names are those of prefill_sm80_wide.cuh, whose products
/// serve here too: there the rows are queries, and keys pass.
template <AttentionGradient Of_, int RowGroups_, int DimTiles_, int SlabDims_, int SlabKeys_, int Stages_>
struct AttentionBackwardSm80Traits {
  static constexpr AttentionGradient of = Of_;
  static constexpr bool owns_queries = of == AttentionGradient::queries;
  static constexpr int products = of == AttentionGradient::values ? 1 : 2;  // X1 Y1, and X2 Y2
  static constexpr int row_tiles = 2, dim_tiles = DimTiles_, slab_dims = SlabDims_, slab_keys = SlabKeys_;
  static constexpr int warps = 8, threads = 32 * warps, row_groups = RowGroups_, column_groups = warps / row_groups;
  static constexpr int rows = row_groups * 16 * row_tiles, dims = column_groups * 8 * dim_tiles;
  static constexpr int key_tiles = 4, columns = column_groups * 8 * key_tiles;
  static_assert(slab_dims % 16 == 0 && slab_keys % 32 == 0 && columns % slab_keys == 0);
  static constexpr int stride = dims + 8, k_stride = slab_dims + 8, p_stride = columns + 8;
  static_assert(stride / 8 % 2 == 1 && k_stride / 8 % 2 == 1 && p_stride / 8 % 2 == 1);
  static constexpr int stages = Stages_, stage_size = std::max(columns * k_stride, slab_keys*stride);
  static constexpr std::size_t shared_bytes =
      (products * rows * stride + rows * p_stride + stages * stage_size) * sizeof(bf16);

  using Scores = Fragment<row_tiles, key_tiles>;  // S, dP: 32 columns of a warp
  using Sums = Fragment<row_tiles, dim_tiles>;    // a share of the dimensions
};

/// What a block owns and what passes by. Column c meets row r where c <= r + diagonal, if the rows are queries, or
/// c >= r + diagonal, if they are keys.
struct GradientTile {
  TileRows<bf16> x1, x2, y1, y2;  // y: from column 0 of the first head on
  int rows, first_column, columns, diagonal;
  int heads, head;    // how many pass by, and the first
  Index first_token;  // of row 0, if the rows are queries, or of column 0
};

struct OwnedQueries : GradientTile {
  template <class Traits>
  __device__ OwnedQueries(Traits, const AttentionShape& shape, const AttentionBackwardTensors<bf16>& at,
                          const AttentionKeys<bf16>& source, const Sequences& sequences)
      : GradientTile{} {
    const auto tile = QueryTile::of_block<Traits::rows>(shape, at.q, source, sequences, {1, sequences.longest});
    rows = tile.tokens;
    if (rows == 0) return;
    x1 = {tile.q, at.q.stride[0], rows};
    x2 = {&at.d_out(tile.token, tile.head * shape.head_dim), at.d_out.stride[0], rows};
    y1 = {tile.k, source.k.stride[1], tile.keys};
    y2 = {tile.v, source.v.stride[1], tile.keys};
    columns = tile.keys;
    diagonal = tile.position;
    heads = 1;
    head = tile.head;
    first_token = tile.token;
  }

  /// Writes sums whose first element is (row, column).
  template <class Traits>
  __device__ void store(Traits, const typename Traits::Sums& sums, int row, int column, const AttentionShape& shape,
                        const AttentionBackwardTensors<bf16>& at) const {
    const auto scale = RowValues<2 * Traits::row_tiles>::filled(static_cast<float>(shape.scale));
    const Index head_dim = shape.head_dim;
    sums.store(at.d_q.data + (first_token + row) * at.d_q.stride[0] + head * head_dim + column, at.d_q.stride[0],
               rows - row, static_cast<int>(head_dim) - column, scale);
  }
};

template <int Rows>
struct OwnedKeys : GradientTile {
  KeyTile<Rows> tile;

  template <class Traits>
  __device__ OwnedKeys(Traits, const AttentionShape& shape, const AttentionBackwardTensors<bf16>& at,
                       const AttentionKeys<bf16>& source, const Sequences& sequences)
      : GradientTile{}, tile(KeyTile<Rows>::of_block(shape, source, sequences, bool(at.d_k.cache))) {
    rows = tile.keys;
    if (rows == 0) return;
    heads = static_cast<int>(shape.heads / shape.kv_heads);
    head = tile.kv_head * heads;
    const Index column = tile.kv_head * shape.head_dim, k_stride = source.k.stride[1], v_stride = source.v.stride[1];
    x1 = {source.key(tile.of.row, tile.of.begin) + tile.first * k_stride + column, k_stride, rows};
    x2 = {source.value(tile.of.row, tile.of.begin) + tile.first * v_stride + column, v_stride, rows};
    first_token = tile.of.begin;
    columns = tile.of.tokens;
    y1 = {&at.q(first_token, head * shape.head_dim), at.q.stride[0], columns};
    y2 = {&at.d_out(first_token, head * shape.head_dim), at.d_out.stride[0], columns};
    first_column = tile.first_query();
    diagonal = tile.first - tile.of.past;
  }

  template <class Traits>
  __device__ void store(Traits, const typename Traits::Sums& sums, int row, int column, const AttentionShape& shape,
                        const AttentionBackwardTensors<bf16>& at) const {
    const bool values = Traits::of == AttentionGradient::values;
    const KeyGradients<bf16>& to = values ? at.d_v : at.d_k;
    const float scale = values ? 1 : static_cast<float>(shape.scale);
    tile.put(to, sums, row + Traits::Sums::first_row(), column, shape.head_dim, scale);
  }
};

/// Copies slabs into stages in the order in which they are read. For every head and tile of columns: slabs of
/// dimensions of Y1, and of Y2; then of columns of what the sums take.
template <class Traits>
struct GradientSlabLoader {
  const GradientTile& tile;
  int head_dim, dim_slabs;
  int head = 0, next = tile.first_column, slab = 0;  // what is copied next: of the tile from column `next` on

  __device__ __forceinline__ int column_slabs(int first) const {
    return ceil_div(::min(Traits::columns, tile.columns - first), Traits::slab_keys);
  }
  __device__ __forceinline__ void operator()(bf16* to) {
    if (head < tile.heads) {
      const int product = slab / dim_slabs;
      const bool second = product < Traits::products ? product == 1 : Traits::of == AttentionGradient::values;
      const TileRows<bf16> y = second ? tile.y2 : tile.y1;
      const bf16* from = y.first + head * head_dim;
      if (product < Traits::products) {
        const int d = (slab - product * dim_slabs) * Traits::slab_dims;
        copy_tile<Traits::threads, Traits::columns, Traits::slab_dims / 8, Traits::k_stride>(
            to, from + next * y.stride + d, y.stride, tile.columns - next, head_dim - d);
      } else {
        const int j = next + (slab - Traits::products * dim_slabs) * Traits::slab_keys;
        copy_tile<Traits::threads, Traits::slab_keys, Traits::dims / 8, Traits::stride>(
            to, from + j * y.stride, y.stride, tile.columns - j, head_dim);
      }
      if (++slab == Traits::products * dim_slabs + column_slabs(next)) {
        slab = 0;
        next += Traits::columns;
        if (next >= tile.columns) {
          next = tile.first_column;
          ++head;
        }
      }
    }
    copy_async_commit();
  }
};

/// log2(e) lse and d_out . out of the queries that a lane has: its rows, or its columns.
template <class Traits>
struct QuerySums {
  static constexpr int count = Traits::owns_queries ? Traits::Scores::rows : Traits::Scores::columns;
  float lse[count], dot[count];

  /// Of queries from `first` of the tile on; those at and after `end` get probabilities of 0.
  __device__ __forceinline__ void load(const Tensor<float, 3>& sums, int head, Index first_token, int first, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int query = first + (Traits::owns_queries ? 8 * i + lane / 4 : 8 * (i / 2) + i % 2 + lane % 4 * 2);
      const Index token = first_token + ::min(query, end - 1);
      lse[i] = query < end ? sums(0, head, token) * log2_e : INFINITY;
      dot[i] = query < end ? sums(1, head, token) : 0;
    }
  }

  /// S becomes P, or dS. (row, column): the first element's; scale: that of scores times log2(e).
  __device__ __forceinline__ void apply(typename Traits::Scores& s, const typename Traits::Scores& d_p, float scale,
                                        int row, int column, int diagonal) const {
    using Scores = typename Traits::Scores;
    const int offset = row + Scores::first_row() + diagonal - column - Scores::first_column();
#pragma unroll
    for (int r = 0; r < Scores::rows; ++r)
#pragma unroll
      for (int c = 0; c < Scores::columns; ++c) {
        const int past_diagonal = 8 * (c / 2) + c % 2 - 8 * r - offset, i = Traits::owns_queries ? r : c;
        const bool visible = Traits::owns_queries ? past_diagonal <= 0 : past_diagonal >= 0;
        const float p = visible ? exp2_approximate(::fmaf(s.at(r, c), scale, -lse[i])) : 0;
        s.at(r, c) = Traits::of == AttentionGradient::values ? p : p * (d_p.at(r, c) - dot[i]);
      }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    attention_backward_sm80_kernel(AttentionShape shape, AttentionBackwardTensors<bf16> at, AttentionKeys<bf16> source,
                                   Sequences sequences) {
  using Tile = std::conditional_t<Traits::owns_queries, OwnedQueries, OwnedKeys<Traits::rows>>;
  using Scores = typename Traits::Scores;
  constexpr int stride = Traits::stride, p_stride = Traits::p_stride, k_stride = Traits::k_stride;
  constexpr int rows_of_warp = 16 * Traits::row_tiles, columns_of_warp = 8 * Traits::key_tiles;
  constexpr int copied = Traits::rows * stride;
  extern __shared__ uint4 shared[];
  const Tile tile(Traits{}, shape, at, source, sequences);
  if (tile.rows == 0) return;
  const int head_dim = static_cast<int>(shape.head_dim), lane = threadIdx.x % 32;
  const int group = threadIdx.x / 32 % Traits::column_groups;
  const int row = threadIdx.x / 32 / Traits::column_groups * rows_of_warp;  // the warp's first
  const float scale = static_cast<float>(shape.scale) * log2_e;
  bf16* x = reinterpret_cast<bf16*>(shared);    // (products) of (rows, stride): X1, X2
  bf16* pairs = x + Traits::products * copied;  // (rows, p_stride): P or dS
  StageRing<Traits> ring{pairs + Traits::rows * p_stride};
  GradientSlabLoader<Traits> load{tile, head_dim, ceil_div(head_dim, Traits::slab_dims)};
  copy_tile<Traits::threads, Traits::rows, Traits::dims / 8, stride>(x, tile.x1.first, tile.x1.stride, tile.rows,
                                                                     head_dim);
  if constexpr (Traits::products == 2)
    copy_tile<Traits::threads, Traits::rows, Traits::dims / 8, stride>(x + copied, tile.x2.first, tile.x2.stride,
                                                                       tile.rows, head_dim);
#pragma unroll 1
  for (int s = 0; s < Traits::stages - 1; ++s) load(ring.first(s));

  typename Traits::Sums sums = {};
  QuerySums<Traits> queries;
  if constexpr (Traits::owns_queries) queries.load(at.sums, tile.head, tile.first_token, row, tile.rows);
  const bf16* own_x = x + row * stride + ldmatrix_offset_of_a<stride>();
  const bf16* own_pairs = pairs + row * p_stride + ldmatrix_offset_of_a<p_stride>();
  for (int head = 0; head < tile.heads; ++head)
    for (int first = tile.first_column; first < tile.columns; first += Traits::columns) {
      const int column = first + group * columns_of_warp;  // the warp's first
      const bool sees = Traits::owns_queries ? column <= row + rows_of_warp - 1 + tile.diagonal
                                             : column + columns_of_warp - 1 >= row + tile.diagonal;
      if constexpr (!Traits::owns_queries)
        queries.load(at.sums, tile.head + head, tile.first_token, column, tile.columns);
      Scores scores[Traits::products] = {};
#pragma unroll
      for (int product = 0; product < Traits::products; ++product)
        for (int slab = 0; slab < load.dim_slabs; ++slab) {
          const bf16* y = ring.to_read() + group * columns_of_warp * k_stride + ldmatrix_offset_of_b<k_stride>();
          load(ring.to_write());
          if (!sees) continue;
          const int d = slab * Traits::slab_dims;
          multiply_key_slab<Traits>(scores[product], own_x + product * copied + d, y,
                                    ::min(Traits::slab_dims, head_dim - d));
        }
      queries.apply(scores[0], scores[Traits::products - 1], scale, row, column, tile.diagonal);
      scores[0].store(pairs + row * p_stride + group * columns_of_warp, p_stride);
      const int slabs = load.column_slabs(first);
      for (int slab = 0; slab < slabs; ++slab) {
        const bf16* y = ring.to_read() + lane * stride + group * 8 * Traits::dim_tiles;
        load(ring.to_write());
        add_value_slab<Traits>(sums, own_pairs + slab * Traits::slab_keys, y);
      }
    }
  copy_async_wait<0>();
  tile.store(Traits{}, sums, row, group * 8 * Traits::dim_tiles, shape, at);
}

/// What fits these kernels, and their launch. A is bf16; templates, so that only what uses the kernels compiles them.
class AttentionBackwardSm80 {
 public:
  /// Otherwise: rows do not start at multiples of 16 bytes, or the GPU has too little shared memory.
  template <class A>
  static bool fit(const Context<cuda>& ctx, const AttentionShape& shape, const AttentionBackwardTensors<A>& at,
                  const AttentionKeys<A>& source) {
    constexpr Index piece = vector_width<bf16>;
    return shape.head_dim % piece == 0 && aligned(at.q, piece) && aligned(at.d_out, piece) &&
           aligned(source.k, piece) && aligned(source.v, piece) && aligned(at.d_q, 2) &&
           aligned(at.d_k.own, 2) && aligned(at.d_v.own, 2) &&
           with_traits<AttentionGradient::keys>(
               shape.head_dim, []<class Traits>(Traits) { return Traits::shared_bytes; }) <= ctx.most_shared();
  }

  template <class A>
  static void launch(Context<cuda>& ctx, const AttentionShape& shape, const AttentionBackwardTensors<A>& at,
                     const AttentionKeys<A>& source, const Sequences& sequences) {
    const auto run = [&]<class Traits>(Traits) {
      static_assert(Traits::shared_bytes <= 227 * 1024);
      const auto tiles = static_cast<unsigned>((sequences.tokens / Traits::rows + sequences.rows) * shape.heads);
      const unsigned blocks = Traits::owns_queries ? tiles : KeyTile<Traits::rows>::blocks(shape, source, sequences);
      allow_shared(attention_backward_sm80_kernel<Traits>, Traits::shared_bytes, "attention backward");
      attention_backward_sm80_kernel<Traits>
          <<<blocks, Traits::threads, Traits::shared_bytes, ctx.stream()>>>(shape, at, source, sequences);
      check_launch("attention backward");
    };
    with_traits<AttentionGradient::values>(shape.head_dim, run);
    with_traits<AttentionGradient::keys>(shape.head_dim, run);
    with_traits<AttentionGradient::queries>(shape.head_dim, run);
  }

 private:
  template <AttentionGradient Of, class F>
  static auto with_traits(Index head_dim, F&& f) {
    if (head_dim <= 64) return f(AttentionBackwardSm80Traits<Of, 4, 4, 64, 64, 4>{});
    if (head_dim <= 128) return f(AttentionBackwardSm80Traits<Of, 4, 8, 128, 64, 4>{});
    if (head_dim <= 160) return f(AttentionBackwardSm80Traits<Of, 4, 10, 80, 32, 4>{});
    if (head_dim <= 224) return f(AttentionBackwardSm80Traits<Of, 4, 14, 112, 32, 4>{});
    if (head_dim <= 256) return f(AttentionBackwardSm80Traits<Of, 4, 16, 128, 32, 4>{});
    if (head_dim <= 480) return f(AttentionBackwardSm80Traits<Of, 2, 15, 128, 32, 2>{});
    return f(AttentionBackwardSm80Traits<Of, 2, 16, 128, 32, 2>{});
  }
};

}  // namespace zamba::kernel
