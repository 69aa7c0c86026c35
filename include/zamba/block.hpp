// SPDX-License-Identifier: MIT
// What a block is. A block maps the residual stream to itself; a stack of blocks is a block again.
//
//   struct MyBlock {
//     static constexpr Index d_model;
//     template <class W, class F> struct Parameters;       views of weights (W) and of precise parameters (F)
//     template <class S, class F> struct State;            views of what a sequence leaves behind; S: storage of caches
//     template <class A, class F> struct Saved;            views of what backward needs; A: activations
//     visit_parameters(p, visit)                           lists every parameter once (parameter.hpp)
//     visit_state(s, visit)                                lists every tensor of the state once
//     forward(ctx, p, io, sequences, state, keep)          -> Saved
//     backward(ctx, p, d_p, saved, io, d, d_t, sequences, state, d_state)
//   };
//
// Everything is static: a block is a description. Its normalisation and its residual connection belong to it,
//   out = x + mix( norm(x + t) ),
// where t is a second input that enters the mixer only, never the residual stream; it may be absent.
#pragma once

#include <concepts>
#include <string_view>
#include <type_traits>

#include <zamba/block/check.hpp>
#include <zamba/context.hpp>
#include <zamba/error.hpp>
#include <zamba/number.hpp>
#include <zamba/parameter.hpp>
#include <zamba/residual_io.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba {

/// What visit_state calls: f(name, tensor, rows_per_sequence, width), where a tensor that grows with the sequence has
/// rows_per_sequence = per_position.
inline constexpr Index per_position = -1;

template <class F>
class StateVisitor {
 public:
  constexpr explicit StateVisitor(F& f) : f_(&f) {}

  /// tensor (sequences, shape...): a state of fixed size.
  template <class T>
  constexpr void operator()(std::string_view name, Tensor<T, 3>& tensor, Shape<2> shape) const {
    (*f_)(Name{&prefix_, name}, tensor, shape.extent[0], shape.extent[1]);
  }
  /// tensor (sequences, max_length, width): one entry a position.
  template <class T>
  constexpr void cache(std::string_view name, Tensor<T, 3>& tensor, Index width) const {
    (*f_)(Name{&prefix_, name}, tensor, per_position, width);
  }
  constexpr StateVisitor scope(std::string_view name, Index number = -1) const {
    return StateVisitor(*f_, Name{&prefix_, name, number});
  }

 private:
  constexpr StateVisitor(F& f, Name prefix) : f_(&f), prefix_(prefix) {}

  F* f_;
  Name prefix_;
};

/// Visits the state `s` of block B with f(name, tensor, rows_per_sequence or per_position, width).
template <class B, class S, class F>
constexpr void visit_state(S& s, F&& f) {
  B::visit_state(s, StateVisitor<std::remove_reference_t<F>>(f));
}

/// What is a layer of a stack: the members above, with those arguments, and listings whose tensors have the ranks,
/// extents and element types that they must. Whether they compute what they should is checked by
/// testing::conformance<B>().
template <class B>
concept Block = detail::BlockCheck<B, false>::passed;

/// What several layers share; shared_use.hpp says what it has.
template <class B>
concept SharedBlock = detail::BlockCheck<B, true>::passed;

/// Whether B does all its computing by operators, so that its forward pass can be run dry (dry_run.hpp): a block
/// that does has `static constexpr bool by_operators = true`.
template <class B>
inline constexpr bool by_operators = [] {
  if constexpr (requires { B::by_operators; })
    return B::by_operators;
  else
    return false;
}();

/// Whether B can run on Device: on the CPU every block, elsewhere one that computes by operators only. A block with
/// kernels of its own says it by `template <class Device> static constexpr bool runs_on = ...`.
template <class B, class Device>
inline constexpr bool runs_on = [] {
  if constexpr (requires { B::template runs_on<Device>; })
    return B::template runs_on<Device>;
  else
    return DeviceTraits<Device>::host_reads || by_operators<B>;
}();

namespace detail {

// Comparisons of sizes, as variable templates: a failed static_assert prints both numbers.
template <Index A, Index B>
inline constexpr bool equal = A == B;

template <Index Number, Index Least>
inline constexpr bool at_least = Number >= Least;

template <Index Number, Index Most>
inline constexpr bool at_most = Number <= Most;

template <Index Number, Index Divisor>
inline constexpr bool divides = Divisor > 0 && Number % Divisor == 0;

template <class B>
constexpr Index active_parameters() {
  if constexpr (requires { B::active_parameters; })
    return B::active_parameters;
  else
    return parameter_count<B>;
}

template <class Count>
struct CountStateBytes {
  Count batch, length, bytes = 0;
  template <class T>
  constexpr void operator()(const Name&, Tensor<T, 3>&, Index rows, Index width) {
    bytes += batch * (rows == per_position ? length : Count(rows)) * Count(width) * Count(sizeof(T));
  }
};

/// Count: what the sum is taken in, double where it may exceed every Index.
template <class B, class T, class Count>
constexpr Count state_bytes(Count batch, Count length) {
  typename B::template State<cache_t<T>, compute_t<T>> state;
  CountStateBytes<Count> counter{batch, length};
  visit_state<B>(state, counter);
  return counter.bytes;
}

/// The parts of a state that a forward pass rewrites, one after the other in the arena. Caches only grow: they are left
/// out.
template <class B, class F, class Device, class State>
Vector<F> save_rewritten(Context<Device>& ctx, State state) {
  Index size = 0, at = 0;
  visit_state<B>(state, [&](const Name&, auto& tensor, Index rows, Index) {
    if (rows != per_position) size += tensor.size();
  });
  const Vector<F> saved = ctx.arena().template tensor<F>(size);
  visit_state<B>(state, [&]<class Element>(const Name&, Tensor<Element, 3>& tensor, Index rows, Index) {
    if constexpr (std::is_same_v<Element, F>) {  // what is rewritten is of type F; a cache of another type is not
      if (rows == per_position) return;
      ctx.copy(tensor.flat(), saved.slice(at, tensor.size()));
      at += tensor.size();
    }
  });
  return saved;
}

/// `state` with its rewritten parts replaced by views of what save_rewritten kept; caches are shared.
template <class B, class State, class F>
State restore_rewritten(State state, Vector<F> saved) {
  Index at = 0;
  visit_state<B>(state, [&](const Name&, auto& tensor, Index rows, Index) {
    if (rows == per_position) return;
    tensor.data = reinterpret_cast<decltype(tensor.data)>(saved.data + at);
    at += tensor.size();
  });
  return state;
}

}  // namespace detail

/// Weights that a token meets: parameters shared by several layers count once per use.
template <class B>
inline constexpr Index active_parameter_count = detail::active_parameters<B>();

/// The deviation that a block's config asks for in place of initial weights by fan-in (parameter.hpp); 0: none.
template <class B>
inline constexpr double init_std = [] {
  if constexpr (requires { B::init_std; })
    return B::init_std;
  else
    return 0.0;
}();

/// Floating-point operations of one token's forward pass, 2 per active parameter; attention over a context of L
/// positions adds what it reads from the cache (state_bytes).
template <class B>
inline constexpr Index flops_per_token = 2 * active_parameter_count<B>;

/// Bytes of the state of `batch` sequences with room for `length` positions each, in a model of T. Throws where they
/// are none or more than can be addressed.
template <class B, class T>
constexpr Index state_bytes(Index batch, Index length) {
  if (batch < 0 || length < 0 ||
      detail::state_bytes<B, T>(static_cast<double>(batch), static_cast<double>(length)) >= 0x1p62)
    fail("state_bytes: batch ", batch, " and length ", length, " are negative or need more than can be addressed");
  return detail::state_bytes<B, T>(batch, length);
}

}  // namespace zamba
