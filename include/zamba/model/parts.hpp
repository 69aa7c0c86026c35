// SPDX-License-Identifier: MIT
// What the members of Model are made of: what extend() takes and how much that is, a sample of the weights, and a state
// that an error leaves as it was.
#pragma once

#include <algorithm>
#include <array>
#include <span>

#include <zamba/dry_run.hpp>
#include <zamba/state.hpp>

namespace zamba {

namespace detail {

inline void check_vocabulary(std::span<const Token> tokens, Index vocabulary, const char* what, bool negative_allowed) {
  for (std::size_t i = 0; i < tokens.size(); ++i)
    require((tokens[i] >= 0 || negative_allowed) && tokens[i] < vocabulary, what, ": token ", tokens[i],
            " at position ", i, " is outside the vocabulary of ", vocabulary);
}

/// What extend() takes for itself.
template <class A>
struct ExtendRoom {
  Vector<Index> first;    // (rows + 1) of each row's tokens among all
  Vector<Index> done;     // (rows) of them computed
  Vector<Index> offsets;  // (rows + 1) of the rows of a chunk
  Vector<Index> starts;   // (rows)
  Vector<Token> chunk;    // (tokens of a chunk)
  Matrix<A> last;         // (rows, d) that left the stack at each row's last token

  template <class Ctx>
  ExtendRoom(Ctx& ctx, Index rows, Index tokens, Index d)
      : first(ctx.host_arena().template tensor<Index>(rows + 1)),
        done(ctx.host_arena().template tensor<Index>(rows)),
        offsets(ctx.host_arena().template tensor<Index>(rows + 1)),
        starts(ctx.host_arena().template tensor<Index>(rows)),
        chunk(ctx.host_arena().template tensor<Token>(tokens)),
        last(ctx.arena().template tensor<A>(rows, d)) {}

  /// lengths: of the rows' tokens; empty: of one row, `count`.
  void begin(std::span<const Index> lengths, Index count) const {
    first[0] = 0;
    for (Index row = 0; row < done.size(); ++row) {
      first[row + 1] = first[row] + (lengths.empty() ? count : item(lengths, row));
      done[row] = 0;
    }
  }
  /// The next `most` tokens of all, row after row; so many positions of each row are in its state before all of them.
  Sequences next_chunk(const Token* all, std::span<const Index> lengths_in_state, Index most) const {
    Sequences sequences{offsets.data, starts.data, done.size(), 0, 0};
    offsets[0] = 0;
    for (Index row = 0; row < sequences.rows; ++row) {
      const Index taken = std::min(first[row + 1] - first[row] - done[row], most - offsets[row]);
      std::copy_n(all + first[row] + done[row], taken, chunk.data + offsets[row]);
      offsets[row + 1] = offsets[row] + taken;
      starts[row] = item(lengths_in_state, row) + done[row];
      sequences.longest = std::max(sequences.longest, taken);
    }
    sequences.tokens = offsets[sequences.rows];
    return sequences;
  }
};

/// Bytes of the arena for a chunk of so many tokens of all rows, no row having more than `longest`; 0 where Net does
/// not run dry.
template <class Net, class T, class Device, class Views>
std::size_t scratch_bytes(const Views& parameters, int threads, StateOptions options, Index tokens, Index longest) {
  if constexpr (by_operators<Net>) {
    using A = activation_t<T, Device>;
    Context<DryRun<Device>> ctx(threads);
    typename Net::template State<cache_t<T>, compute_t<T>> state;
    visit_state<Net>(state, [&]<class Element>(const Name&, Tensor<Element, 3>& tensor, Index rows, Index width) {
      tensor = {reinterpret_cast<Element*>(alignment), options.batch, rows == per_position ? options.max_length : rows,
                width};
    });
    const ExtendRoom<A> room(ctx, options.batch, tokens, Net::d_model);
    const Sequences sequences{ctx.readable(room.offsets.data, options.batch + 1),
                              ctx.readable(room.starts.data, options.batch), options.batch, tokens, longest};
    const auto s = Net::template forward<A>(ctx, parameters, ctx.readable(room.chunk.data, tokens), sequences, state,
                                            Keep::nothing);
    const auto logits = [&](Matrix<const A> x) {
      Net::logits(ctx, parameters, x, Matrix<A>(reinterpret_cast<A*>(alignment), x.rows(), Net::vocabulary));
    };
    logits(s.x);
    logits(room.last);
    return ctx.arena().peak();
  } else {
    return 0;
  }
}

/// A hash of up to 256 pieces of a parameter of so many bytes, chained.
template <class Device>
std::uint64_t hash_sample(const std::byte* from, std::size_t bytes, std::uint64_t hash) {
  constexpr std::size_t piece = 64, pieces = 256;
  std::array<std::uint64_t, piece * pieces / sizeof(std::uint64_t)> sample = {};
  if (bytes <= sizeof sample)
    Memory<Device>::copy_to_host(sample.data(), from, bytes);
  else
    Memory<Device>::copy_pieces_to_host(sample.data(), from, piece, pieces, (bytes - piece) / (pieces - 1));
  const std::size_t words = ceil_div(std::min(bytes, sizeof sample), sizeof(std::uint64_t));
  for (std::size_t i = 0; i < words; ++i) {
    hash = (hash ^ sample[i]) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

/// compute(); where it throws, what it may have rewritten of a state is as it was. Caches only grow: what is new there
/// nobody reads.
template <class Net, class F, class Device, class Views, class Compute>
auto keeping_state(Context<Device>& ctx, const Views& state, Compute&& compute) {
  ArenaScope scope(ctx.arena());
  const Vector<F> saved = save_rewritten<Net, F>(ctx, state);
  try {
    return compute();
  } catch (...) {
    Index at = 0;
    auto parts = state;
    visit_state<Net>(parts, [&]<class Element>(const Name&, Tensor<Element, 3>& tensor, Index rows, Index) {
      if constexpr (std::is_same_v<Element, F>) {
        if (rows == per_position) return;
        ctx.copy(saved.slice(at, tensor.size()), tensor.flat());
        at += tensor.size();
      }
    });
    throw;
  }
}

}  // namespace detail

}  // namespace zamba
