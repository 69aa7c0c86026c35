// SPDX-License-Identifier: MIT
// Named parameters: a block lists each of its parameters once, and counters, initialisation, loader, saver and
// optimiser follow.
//
//   template <class W, class F>
//   struct Parameters { Weight<W> in_proj; Vector<F> D; };
//
//   template <class P, class Visit>
//   static constexpr void visit_parameters(P& p, Visit visit) {
//     visit("in_proj.weight", p.in_proj, {2 * D, d}, fan_in(d));
//     visit("D", p.D, {D}, constant(1), Decay::no);
//   }
//
// W is the storage type of weights that products multiply by (weight.hpp), F that of parameters kept in float32 or
// better (A_log, D, biases, norms).
#pragma once

#include <cmath>
#include <string>
#include <string_view>
#include <utility>

#include <zamba/random.hpp>
#include <zamba/tensor.hpp>
#include <zamba/weight.hpp>

namespace zamba {

/// How the values of a parameter begin.
struct Initializer {
  /// The value of element `index` of a parameter whose last extent is `cols`; `argument` is what the block gave.
  double (*draw)(Random&, double argument, Index index, Index cols);
  double argument = 0;
  Index writes = 0;  // of a product that adds to the residual stream: how many products do; 0: of any other parameter

  double operator()(Random& random, Index index, Index cols) const {
    const double value = draw(random, argument, index, cols);
    return writes > 1 ? value / std::sqrt(static_cast<double>(writes)) : value;
  }
};

namespace detail {  // named, since nvcc 13.0 loses lambdas in these positions

inline double draw_normal(Random& random, double deviation, Index, Index) { return deviation * random.normal(); }
inline double draw_uniform(Random& random, double bound, Index, Index) { return bound * (2 * random.uniform() - 1); }
inline double draw_fan_in(Random& random, double inputs, Index, Index) {
  return (2 * random.uniform() - 1) / std::sqrt(inputs);
}
inline double draw_constant(Random&, double value, Index, Index) { return value; }
inline double draw_log_arange(Random&, double, Index index, Index cols) {
  return std::log(static_cast<double>(index % cols + 1));
}
inline double draw_inverse_softplus_dt(Random& random, double, Index, Index) {
  const double dt = std::exp(std::log(0.001) + random.uniform() * std::log(0.1 / 0.001));
  return std::fmax(dt, 1e-4) + std::log(-std::expm1(-std::fmax(dt, 1e-4)));
}

}  // namespace detail

constexpr Initializer normal(double deviation) { return {detail::draw_normal, deviation}; }
constexpr Initializer uniform(double bound) { return {detail::draw_uniform, bound}; }
constexpr Initializer constant(double value) { return {detail::draw_constant, value}; }
/// Of a product's weights, and of a convolution's bias: uniform in +-1 / sqrt(inputs), where `inputs` is how many each
/// output sums, so that results are of one size at every width. PyTorch's modules, and so Mamba's, begin like this.
/// std > 0: normal(std) instead, as one published width may want it.
constexpr Initializer fan_in(Index inputs, double std = 0) {
  return std > 0 ? normal(std) : Initializer{detail::draw_fan_in, static_cast<double>(inputs)};
}
/// Of a product that adds to the residual stream: divided by the root of how many do, as far as that is known
/// (ParameterVisitor::stream), so that the stream is of one size at every depth. Source: GPT-2; Mamba's own models.
constexpr Initializer into_residual(Initializer initializer) {
  initializer.writes = 1;
  return initializer;
}
/// into_residual(fan_in(inputs)); std > 0: normal(std), whatever the depth.
constexpr Initializer residual_fan_in(Index inputs, double std = 0) {
  return std > 0 ? normal(std) : into_residual(fan_in(inputs));
}
/// log(1), log(2), ... along the last extent: the usual A_log (S4D-real).
constexpr Initializer log_arange() { return {detail::draw_log_arange, 0}; }
/// The inverse of softplus, dt + log(-expm1(-dt)), at dt log-uniform in [0.001, 0.1]: the usual dt bias.
constexpr Initializer inverse_softplus_dt() { return {detail::draw_inverse_softplus_dt, 0}; }

/// Whether AdamW's weight decay applies: not to A_log, D, biases, convolutions and norms.
enum class Decay { no, yes };

/// Extents of a parameter or of one row of a state, written {out, in}.
template <int Rank>
struct Shape {
  Index extent[std::size_t{Rank}];

  constexpr Index size() const {
    Index n = 1;
    for (Index e : extent) n *= e;
    return n;
  }
};

/// A dotted name, held as a chain of its parts so that visiting needs no memory and runs at compile time.
struct Name {
  const Name* parent = nullptr;
  std::string_view text = {};
  Index number = -1;

  /// "layers.3.mixer.in_proj.weight"
  std::string str() const {
    std::string whole = parent ? parent->str() : std::string();
    if (!text.empty()) whole.append(whole.empty() ? "" : ".").append(text);
    if (number >= 0) whole.append(".").append(std::to_string(number));
    return whole;
  }
};

/// What visit_parameters calls: hands every tensor with its full name to f(name, tensor, shape, initializer, decay).
template <class F>
class ParameterVisitor {
 public:
  constexpr explicit ParameterVisitor(F& f) : f_(&f) {}

  template <class T, int Rank>
  constexpr void operator()(std::string_view name, Tensor<T, Rank>& tensor, std::type_identity_t<Shape<Rank>> shape,
                            Initializer initializer, Decay decay = Decay::yes) const {
    static_assert(std::is_same_v<Weight<T, Rank>, Tensor<T, Rank>>,
                  "zamba: Parameters hold a Matrix<W> or Tensor<W, 3>, which are for plain numbers, and the weights' "
                  "type is none: say Weight<W> or Weight<W, 3>");
    take(name, tensor, shape, initializer, decay);
  }
  /// A Weight that is no Tensor.
  template <class View>
  constexpr void operator()(std::string_view name, View& view, std::type_identity_t<Shape<View::rank>> shape,
                            Initializer initializer, Decay decay = Decay::yes) const {
    take(name, view, shape, initializer, decay);
  }

  /// The visitor for a part called `name`, or the number-th of several. Valid while this visitor is.
  constexpr ParameterVisitor scope(std::string_view name, Index number = -1) const {
    return ParameterVisitor(*f_, Name{&prefix_, name, number}, writes_);
  }
  /// The visitor for the parts of one residual stream, to which `writes` products add: residual_writes<Part>. For
  /// whoever begins the stream, as LanguageModel does.
  constexpr ParameterVisitor stream(Index writes) const { return ParameterVisitor(*f_, prefix_, writes); }

 private:
  constexpr ParameterVisitor(F& f, Name prefix, Index writes) : f_(&f), prefix_(prefix), writes_(writes) {}

  template <class View, int Rank>
  constexpr void take(std::string_view name, View& view, Shape<Rank> shape, Initializer initializer,
                      Decay decay) const {
    if (initializer.writes > 0) initializer.writes = writes_;
    (*f_)(Name{&prefix_, name}, view, shape, initializer, decay);
  }

  F* f_;
  Name prefix_;
  Index writes_ = 1;
};

/// Visits the parameters `p` of block B with f(name, tensor, shape, initializer, decay).
template <class B, class P, class F>
constexpr void visit_parameters(P& p, F&& f) {
  B::visit_parameters(p, ParameterVisitor<std::remove_reference_t<F>>(f));
}

namespace detail {

struct CountParameters {
  Index count = 0, residual_writes = 0;
  template <class T, int Rank>
  constexpr void operator()(const Name&, Tensor<T, Rank>&, Shape<Rank> shape, Initializer initializer, Decay) {
    count += shape.size();
    residual_writes += initializer.writes > 0;
  }
};

template <class B>
constexpr CountParameters count_parameters() {
  typename B::template Parameters<char, char> parameters;
  CountParameters counter;
  visit_parameters<B>(parameters, counter);
  return counter;
}

}  // namespace detail

/// How many parameters a block has; shared ones count once.
template <class B>
inline constexpr Index parameter_count = detail::count_parameters<B>().count;

/// How many products of a block add to the residual stream: those listed with into_residual.
template <class B>
inline constexpr Index residual_writes = detail::count_parameters<B>().residual_writes;

}  // namespace zamba
