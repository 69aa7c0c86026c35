// SPDX-License-Identifier: MIT
// What the compiler can tell about a block; included by block.hpp. BlockCheck<B, Shared> finds the first thing that is
// wrong, Explained<B, Shared> says it in one sentence. Templates that take a block ask for a CheckedBlock: where that
// fails, nothing of them is instantiated, so the sentence is not followed by what else does not fit.
#pragma once

#include <algorithm>
#include <concepts>
#include <initializer_list>
#include <string_view>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/parameter.hpp>
#include <zamba/residual_io.hpp>
#include <zamba/sequences.hpp>
#include <zamba/tensor.hpp>

namespace zamba::detail {

enum class Problem {
  none,
  width,
  is_shared,
  is_not_shared,
  parameters,
  state,
  saved,
  visit_parameters,
  visit_use_parameters,
  visit_parameters_constexpr,
  parameter_no_tensor,
  parameter_extents,
  parameter_empty,
  parameter_element,
  parameter_initializer,
  visit_state,
  visit_state_constexpr,
  state_no_tensor,
  state_extents,
  state_empty,
  state_element,
  cache_element,
  forward,
  backward,
};

// In place of W and S, and of F.
struct StorageTag {};
struct ComputeTag {};

/// A name as a template argument, so that a failed static_assert prints it.
template <std::size_t Size>
struct Text {
  char characters[Size] = {};
};

/// The first wrong line of a listing.
struct Found {
  Problem problem = Problem::none;
  char name[64] = {};
  std::size_t length = 0;
  Index rank = 0, extents = 0;

  constexpr void add(Problem which, std::string_view text, Index tensor_rank, Index shape_extents) {
    if (problem != Problem::none) return;
    problem = which;
    rank = tensor_rank;
    extents = shape_extents;
    length = std::min(text.size(), sizeof name);
    std::copy_n(text.data(), length, name);
  }
};

/// A shape of any number of extents: Shape<Rank> of a tensor of another rank would take fewer without a word.
struct AnyShape {
  Index count = 0, least = 1;

  template <std::size_t Count>
  constexpr AnyShape(const Index (&extents)[Count]) : count(static_cast<Index>(Count)) {
    for (const Index extent : extents) least = std::min(least, extent);
  }
  template <int Rank>
  constexpr AnyShape(const Shape<Rank>& shape) : AnyShape(shape.extent) {}
  constexpr AnyShape(Index a) : AnyShape({a}, 1) {}
  constexpr AnyShape(Index a, Index b) : AnyShape({a, b}, 2) {}
  constexpr AnyShape(Index a, Index b, Index c) : AnyShape({a, b, c}, 3) {}
  constexpr AnyShape(Index a, Index b, Index c, Index d) : AnyShape({a, b, c, d}, 4) {}

 private:
  constexpr AnyShape(std::initializer_list<Index> extents, Index number) : count(number), least(std::min(extents)) {}
};

/// In place of ParameterVisitor: takes whatever a block may list, and notes the first line that ParameterVisitor would
/// not take, or would take for something else.
class ParameterCheck {
 public:
  constexpr explicit ParameterCheck(Found& found) : found_(&found) {}

  template <class T, int Rank>
  constexpr void operator()(std::string_view name, Tensor<T, Rank>&, AnyShape shape, Initializer,
                            Decay = Decay::yes) const {
    if (shape.count != Rank) found_->add(Problem::parameter_extents, name, Rank, shape.count);
    if (shape.least < 1) found_->add(Problem::parameter_empty, name, Rank, shape.count);
    if (!std::is_same_v<T, StorageTag> && !std::is_same_v<T, ComputeTag>)
      found_->add(Problem::parameter_element, name, Rank, shape.count);
  }
  template <class T>
  constexpr void operator()(std::string_view name, T&, AnyShape shape, Initializer, Decay = Decay::yes) const {
    found_->add(Problem::parameter_no_tensor, name, 0, shape.count);
  }
  template <class T>
  constexpr void operator()(std::string_view name, T&, AnyShape shape) const {
    found_->add(Problem::parameter_initializer, name, 0, shape.count);
  }
  constexpr ParameterCheck scope(std::string_view, Index = -1) const { return *this; }
  constexpr ParameterCheck stream(Index) const { return *this; }

 private:
  Found* found_;
};

/// The same in place of StateVisitor.
class StateCheck {
 public:
  constexpr explicit StateCheck(Found& found) : found_(&found) {}

  template <class T, int Rank>
  constexpr void operator()(std::string_view name, Tensor<T, Rank>&, AnyShape shape) const {
    if (Rank != 3 || shape.count != 2) found_->add(Problem::state_extents, name, Rank, shape.count);
    if (shape.least < 1) found_->add(Problem::state_empty, name, Rank, shape.count);
    if (!std::is_same_v<T, ComputeTag>) found_->add(Problem::state_element, name, Rank, shape.count);
  }
  template <class T>
  constexpr void operator()(std::string_view name, T&, AnyShape shape) const {
    found_->add(Problem::state_no_tensor, name, 0, shape.count);
  }
  template <class T, int Rank>
  constexpr void cache(std::string_view name, Tensor<T, Rank>&, Index width) const {
    if (Rank != 3) found_->add(Problem::state_extents, name, Rank, 1);
    if (width < 1) found_->add(Problem::state_empty, name, Rank, 1);
    if (!std::is_same_v<T, StorageTag> && !std::is_same_v<T, ComputeTag>)
      found_->add(Problem::cache_element, name, Rank, 1);
  }
  template <class T>
  constexpr void cache(std::string_view name, T&, Index) const {
    found_->add(Problem::state_no_tensor, name, 0, 1);
  }
  constexpr StateCheck scope(std::string_view, Index = -1) const { return *this; }

 private:
  Found* found_;
};

template <class B>
concept HasUseParameters = requires {
  typename B::template UseParameters<float, float>;
};

template <class B>
constexpr Found check_parameters() {
  Found found;
  typename B::template Parameters<StorageTag, ComputeTag> parameters;
  B::visit_parameters(parameters, ParameterCheck(found));
  if constexpr (HasUseParameters<B>) {
    typename B::template UseParameters<StorageTag, ComputeTag> use;
    B::visit_use_parameters(use, ParameterCheck(found));
  }
  return found;
}

template <class B>
constexpr Found check_state() {
  Found found;
  typename B::template State<StorageTag, ComputeTag> state;
  B::visit_state(state, StateCheck(found));
  return found;
}

template <class B>
concept HasWidth = requires {
  typename std::integral_constant<Index, B::d_model>;
}
&&(B::d_model >= 1);
template <class B>
concept SaysShared = requires {
  requires B::shared;
};
template <class B>
concept HasParameters = requires {
  typename B::template Parameters<float, float>;
};
template <class B>
concept HasState = requires {
  typename B::template State<float, float>;
};
template <class B>
concept HasSaved = requires {
  typename B::template Saved<float, float>;
};
template <class B>
concept VisitsParameters = requires(typename B::template Parameters<StorageTag, ComputeTag>& p, ParameterCheck visit) {
  B::visit_parameters(p, visit);
};
template <class B>
concept VisitsUseParameters = requires(typename B::template UseParameters<StorageTag, ComputeTag>& p,
                                       ParameterCheck visit) {
  B::visit_use_parameters(p, visit);
};
template <class B>
concept VisitsState = requires(typename B::template State<StorageTag, ComputeTag>& s, StateCheck visit) {
  B::visit_state(s, visit);
};
template <class B>
concept CountsParameters = requires {
  typename std::integral_constant<bool, (check_parameters<B>(), true)>;
};
template <class B>
concept CountsState = requires {
  typename std::integral_constant<bool, (check_state<B>(), true)>;
};

/// What forward and backward are called with where weights and caches are bf16: then W and S differ from F and A.
template <class B>
struct Call {
  using Params = typename B::template Parameters<const bf16, const float>;
  using Gradients = typename B::template Parameters<float, float>;
  using Saved = typename B::template Saved<float, float>;
  using State = typename B::template State<bf16, float>;
  using StateGradients = typename B::template State<float, float>;
};
template <class B>
struct CallOfUse : Call<B> {
  using Use = typename B::template UseParameters<const bf16, const float>;
  using UseGradients = typename B::template UseParameters<float, float>;
};

template <class B, class Device, class C = Call<B>>
concept RunsForward = requires(Context<Device>& ctx, const typename C::Params& p, const ResidualIO<float>& io,
                               const Sequences& sequences, const typename C::State& state) {
  { B::forward(ctx, p, io, sequences, state, Keep::nothing) } -> std::same_as<typename C::Saved>;
};
template <class B, class Device, class C = CallOfUse<B>>
concept RunsUseForward = requires(Context<Device>& ctx, const typename C::Params& p, const typename C::Use& use,
                                  const ResidualIO<float>& io, const Sequences& sequences,
                                  const typename C::State& state) {
  { B::forward(ctx, p, use, io, sequences, state, Keep::nothing) } -> std::same_as<typename C::Saved>;
};
/// d comes as the gradient of out and leaves as that of x.
template <class B, class Device, class C = Call<B>>
concept RunsBackward = requires(Context<Device>& ctx, const typename C::Params& p, const typename C::Gradients& d_p,
                                const typename C::Saved& saved, const ResidualIO<float>& io, Matrix<float> d,
                                const Sequences& sequences, const typename C::State& state,
                                const typename C::StateGradients& d_state) {
  B::backward(ctx, p, d_p, saved, io, d, d, sequences, state, d_state);
};
/// d_out of a shared block is only read.
template <class B, class Device, class C = Call<B>>
concept RunsSharedBackward = requires(Context<Device>& ctx, const typename C::Params& p,
                                      const typename C::Gradients& d_p, const typename C::Saved& saved,
                                      const ResidualIO<float>& io, Matrix<const float> d_out, Matrix<float> d,
                                      const Sequences& sequences, const typename C::State& state,
                                      const typename C::StateGradients& d_state) {
  B::backward(ctx, p, d_p, saved, io, d_out, d, d, sequences, state, d_state);
};
template <class B, class Device, class C = CallOfUse<B>>
concept RunsUseBackward = requires(Context<Device>& ctx, const typename C::Params& p, const typename C::Use& use,
                                   const typename C::Gradients& d_p, const typename C::UseGradients& d_use,
                                   const typename C::Saved& saved, const ResidualIO<float>& io,
                                   Matrix<const float> d_out, Matrix<float> d, const Sequences& sequences,
                                   const typename C::State& state, const typename C::StateGradients& d_state) {
  B::backward(ctx, p, use, d_p, d_use, saved, io, d_out, d, d, sequences, state, d_state);
};

template <class B, bool Shared, class Device>
constexpr Problem check_calls() {
  if constexpr (HasUseParameters<B>) {
    if constexpr (!RunsUseForward<B, Device>) return Problem::forward;
    if constexpr (!RunsUseBackward<B, Device>) return Problem::backward;
  } else {
    if constexpr (!RunsForward<B, Device>) return Problem::forward;
    if constexpr (Shared && !RunsSharedBackward<B, Device>) return Problem::backward;
    if constexpr (!Shared && !RunsBackward<B, Device>) return Problem::backward;
  }
  return Problem::none;
}

template <class B, bool Shared>
constexpr Found check_block() {
  const auto only = [](Problem problem) {
    Found found;
    found.problem = problem;
    return found;
  };
  if constexpr (!HasWidth<B>)
    return only(Problem::width);
  else if constexpr (SaysShared<B> && !Shared)
    return only(Problem::is_shared);
  else if constexpr (!SaysShared<B> && Shared)
    return only(Problem::is_not_shared);
  else if constexpr (!HasParameters<B>)
    return only(Problem::parameters);
  else if constexpr (!HasState<B>)
    return only(Problem::state);
  else if constexpr (!HasSaved<B>)
    return only(Problem::saved);
  else if constexpr (!VisitsParameters<B>)
    return only(Problem::visit_parameters);
  else if constexpr (HasUseParameters<B> && !VisitsUseParameters<B>)
    return only(Problem::visit_use_parameters);
  else if constexpr (!CountsParameters<B>)
    return only(Problem::visit_parameters_constexpr);
  else if constexpr (check_parameters<B>().problem != Problem::none)
    return check_parameters<B>();
  else if constexpr (!VisitsState<B>)
    return only(Problem::visit_state);
  else if constexpr (!CountsState<B>)
    return only(Problem::visit_state_constexpr);
  else if constexpr (check_state<B>().problem != Problem::none)
    return check_state<B>();
  else if constexpr (check_calls<B, Shared, cpu>() != Problem::none && check_calls<B, Shared, cuda>() != Problem::none)
    return only(check_calls<B, Shared, cpu>());
  else
    return {};
}

template <class B, bool Shared>
struct BlockCheck {
  static constexpr Found found = check_block<B, Shared>();
  static constexpr bool passed = found.problem == Problem::none;
};

/// A failed static_assert prints the name of what is listed wrongly, its rank and how many extents were given.
template <bool Right, auto Name, Index Rank, Index Extents>
struct Listed {
  static constexpr bool value = Right;
};

template <class Check>
constexpr auto name_of() {
  Text<Check::found.length + 1> name;
  std::copy_n(Check::found.name, Check::found.length, name.characters);
  return name;
}

/// The names of docs/add_a_block.md for what BlockCheck found.
template <class B, bool Shared>
struct Explained {
  using Check = BlockCheck<B, Shared>;
  static constexpr bool passed = Check::passed;

  template <Problem P>
  static constexpr bool fine = Check::found.problem != P;
  template <Problem P>
  using Lists = Listed<(Check::found.problem != P), name_of<Check>(), Check::found.rank, Check::found.extents>;

  static_assert(fine<Problem::width>,
                "zamba::Block: a block says its width, at least 1: 'static constexpr Index d_model'");
  static_assert(
      fine<Problem::is_shared>,
      "zamba::Block: a block that says 'shared = true' is no layer, since it has no residual of its own: give "
      "it to HybridStack or PatternStack as the shared block");
  static_assert(fine<Problem::is_not_shared>,
                "zamba::SharedBlock: the shared block must say 'static constexpr bool shared = true'; a layer's block "
                "cannot take its place, because what is shared has no residual of its own");
  static_assert(
      fine<Problem::parameters>,
      "zamba::Block: 'template <class W, class F> struct Parameters' is missing, or its arguments are others");
  static_assert(fine<Problem::state>,
                "zamba::Block: 'template <class S, class F> struct State' is missing, or its arguments are others; "
                "without a state it is empty");
  static_assert(fine<Problem::saved>,
                "zamba::Block: 'template <class A, class F> struct Saved' is missing, or its arguments are others");
  static_assert(fine<Problem::visit_parameters>,
                "zamba::Block: 'template <class P, class Visit> static constexpr void visit_parameters(P& p, Visit "
                "visit)' is missing: it lists every parameter once");
  static_assert(fine<Problem::visit_use_parameters>,
                "zamba::SharedBlock: UseParameters without 'template <class P, class Visit> static constexpr void "
                "visit_use_parameters(P& use, Visit visit)', which lists them");
  static_assert(fine<Problem::visit_parameters_constexpr>,
                "zamba::Block: visit_parameters must be constexpr, since the compiler counts parameters");
  static_assert(Lists<Problem::parameter_no_tensor>::value,
                "zamba::Block: visit_parameters lists what is no Vector, Matrix or Tensor; a part with parameters of "
                "its own lists them with visit.scope(name)");
  static_assert(Lists<Problem::parameter_extents>::value,
                "zamba::Block: visit_parameters gives a parameter a shape of another rank: {{width}} of a Vector, "
                "{{out, in}} of a Matrix");
  static_assert(Lists<Problem::parameter_empty>::value,
                "zamba::Block: visit_parameters gives a parameter an extent below 1; what a block does not have is not "
                "listed");
  static_assert(Lists<Problem::parameter_element>::value,
                "zamba::Block: visit_parameters lists a parameter whose elements are neither W nor F");
  static_assert(Lists<Problem::parameter_initializer>::value,
                "zamba::Block: visit_parameters lists a parameter without an initialiser: visit(name, tensor, "
                "{{out, in}}, initialiser)");
  static_assert(fine<Problem::visit_state>,
                "zamba::Block: 'template <class S, class Visit> static constexpr void visit_state(S& s, Visit visit)' "
                "is missing: it lists every tensor of the state once, or none");
  static_assert(fine<Problem::visit_state_constexpr>,
                "zamba::Block: visit_state must be constexpr, since the compiler counts the bytes of states");
  static_assert(Lists<Problem::state_no_tensor>::value,
                "zamba::Block: visit_state lists what is no Tensor; a part with a state of its own lists it with "
                "visit.scope(name)");
  static_assert(Lists<Problem::state_extents>::value,
                "zamba::Block: visit_state lists a tensor of another rank: a state is a Tensor<F, 3> with a shape of "
                "two extents, {{1, width}} of a vector, and a cache a Tensor<S, 3> with a width");
  static_assert(Lists<Problem::state_empty>::value,
                "zamba::Block: visit_state gives a tensor an extent below 1; what a block does not have is not listed");
  static_assert(Lists<Problem::state_element>::value,
                "zamba::Block: visit_state lists a state of fixed size whose elements are not F: it is rewritten with "
                "every token, so only caches, which are not, may be stored as S");
  static_assert(Lists<Problem::cache_element>::value,
                "zamba::Block: visit_state lists a cache whose elements are neither S nor F");
  static_assert(fine<Problem::forward> || Shared,
                "zamba::Block: forward(ctx, p, io, sequences, state, keep) is missing, takes other types, or does not "
                "return Saved<A, F>");
  static_assert(
      fine<Problem::backward> || Shared,
      "zamba::Block: backward(ctx, p, d_p, saved, io, d, d_t, sequences, state, d_state) is missing, or takes "
      "other types");
  static_assert(fine<Problem::forward> || !Shared,
                "zamba::SharedBlock: forward(ctx, p, io, sequences, state, keep), with 'use' after p where there are "
                "UseParameters, is missing, takes other types, or does not return Saved<A, F>");
  static_assert(
      fine<Problem::backward> || !Shared,
      "zamba::SharedBlock: backward(ctx, p, d_p, saved, io, d_out, d_x, d_x0, sequences, state, d_state), with "
      "'use' after p and 'd_use' after d_p where there are UseParameters, is missing, or takes other types: "
      "d_out is a Matrix<const A>");
};

/// As Block, and what is wrong is said.
template <class B>
concept CheckedBlock = Explained<B, false>::passed;

}  // namespace zamba::detail
