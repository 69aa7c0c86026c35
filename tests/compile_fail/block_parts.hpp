// SPDX-License-Identifier: MIT
// A right block in parts: a case puts together those that it needs and writes the wrong one itself.
#pragma once

#include <zamba/pattern_stack.hpp>

namespace parts {

using namespace zamba;

inline constexpr Index width = 16;

struct Width {
  static constexpr Index d_model = width;
};
struct SharedFlag {
  static constexpr bool shared = true;
};

template <class W, class F>
struct ParametersOf {
  Vector<F> norm;
  Matrix<W> weight;
};
struct ParameterViews {
  template <class W, class F>
  using Parameters = ParametersOf<W, F>;
};
struct ParameterListing {
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("norm.weight", p.norm, {{width}}, constant(1), Decay::no);
    visit("weight", p.weight, {{width, width}}, normal(0.02));
  }
};

template <class S, class F>
struct StateOf {
  Tensor<F, 3> sum;
  Tensor<S, 3> keys;
};
struct StateViews {
  template <class S, class F>
  using State = StateOf<S, F>;
};
struct StateListing {
  template <class S, class Visit>
  static constexpr void visit_state(S& s, Visit visit) {
    visit("sum", s.sum, {{1, width}});
    visit.cache("keys", s.keys, width);
  }
};

template <class A, class F>
struct SavedOf {
  Matrix<A> h;
};
struct SavedViews {
  template <class A, class F>
  using Saved = SavedOf<A, F>;
};

struct Forward {
  template <class Device, class W, class F, class A, class S>
  static SavedOf<A, F> forward(Context<Device>&, const ParametersOf<const W, const F>&, const ResidualIO<A>&,
                               const Sequences&, const StateOf<S, F>&, Keep) {
    return {};
  }
};
struct Backward {
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>&, const ParametersOf<const W, const F>&, const ParametersOf<F, F>&,
                       const SavedOf<A, F>&, const ResidualIO<A>&, Matrix<A>, Matrix<A>, const Sequences&,
                       const StateOf<S, F>&, const StateOf<F, F>&) {}
};
struct SharedBackward {
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>&, const ParametersOf<const W, const F>&, const ParametersOf<F, F>&,
                       const SavedOf<A, F>&, const ResidualIO<A>&, Matrix<const A>, Matrix<A>, Matrix<A>,
                       const Sequences&, const StateOf<S, F>&, const StateOf<F, F>&) {}
};

struct Layer : Width, ParameterViews, ParameterListing, StateViews, StateListing, SavedViews, Forward, Backward {};
struct SharedLayer : Width,
                     SharedFlag,
                     ParameterViews,
                     ParameterListing,
                     StateViews,
                     StateListing,
                     SavedViews,
                     Forward,
                     SharedBackward {};

}  // namespace parts
