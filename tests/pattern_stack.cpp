// SPDX-License-Identifier: MIT
#include <zamba/pattern_stack.hpp>

#include <map>
#include <string>

#include <doctest/doctest.h>

#include <zamba/models/zamba_7b.hpp>
#include <zamba/testing/conformance.hpp>

#include "support/extend_properties.hpp"

using namespace zamba_test;

namespace {

template <class P>
std::string letters(const P& pattern) {
  return std::string(pattern.letters, static_cast<std::size_t>(P::layers()));
}

/// A shared block of a user, with no parameters of its uses: out = (x + x0) W^T.
struct SumShared {
  static constexpr bool shared = true;
  static constexpr Index d_model = 16;

  template <class W, class F>
  struct Parameters {
    Matrix<W> weight;
  };
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("weight", p.weight, {{d_model, d_model}}, fan_in(d_model));
  }
  template <class S, class F>
  struct State {};
  template <class S, class Visit>
  static constexpr void visit_state(S&, Visit) {}
  template <class A, class F>
  struct Saved {
    Matrix<A> sum;
  };

  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& sequences, const State<S, F>&, Keep) {
    Saved<A, F> s{ctx.arena().template tensor<A>(sequences.tokens, d_model)};
    ctx.copy(io.x, s.sum);
    add(ctx, io.t, s.sum);
    linear(ctx, s.sum, p.weight, io.out);
    return s;
  }
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>& ctx, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& s, const ResidualIO<A>&, std::type_identity_t<Matrix<const A>> d_out,
                       Matrix<A> d_x, Matrix<A> d_x0, const Sequences&, const State<S, F>&, const State<F, F>&) {
    linear_backward(ctx, d_out, s.sum, p.weight, d_x, Accumulate::yes, d_p.weight);
    linear_backward(ctx, d_out, s.sum, p.weight, d_x0, Accumulate::yes, {});
  }
};

/// A shared block with a state of fixed size: s_t = s_{t-1} / 2 + x_t + x0_t, out = w s.
struct SharedAverage {
  static constexpr bool shared = true;
  static constexpr Index d_model = 16;

  template <class W, class F>
  struct Parameters {
    Vector<F> weight;
  };
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("weight", p.weight, {{d_model}}, constant(1));
  }
  template <class S, class F>
  struct State {
    Tensor<F, 3> s;
  };
  template <class S, class Visit>
  static constexpr void visit_state(S& state, Visit visit) {
    visit("s", state.s, {{1, d_model}});
  }
  template <class A, class F>
  struct Saved {
    Matrix<A> s;
  };

  template <class Device, class W, class F, class A, class S>
  static Saved<A, F> forward(Context<Device>& ctx, const Parameters<const W, const F>& p, const ResidualIO<A>& io,
                             const Sequences& rows, const State<S, F>& state, Keep) {
    Saved<A, F> saved{ctx.arena().template tensor<A>(rows.tokens, d_model)};
    for (Index row = 0; row < rows.rows; ++row)
      for (Index c = 0; c < d_model; ++c) {
        A s = state.s && rows.start(row) > 0 ? state.s(row, 0, c) : 0;
        for (Index t = rows.begin(row); t < rows.begin(row + 1); ++t) {
          s = saved.s(t, c) = s / 2 + io.x(t, c) + io.t(t, c);
          io.out(t, c) = p.weight[c] * s;
        }
        if (state.s && rows.length(row) > 0) state.s(row, 0, c) = s;
      }
    return saved;
  }
  template <class Device, class W, class F, class A, class S>
  static void backward(Context<Device>&, const Parameters<const W, const F>& p, const Parameters<F, F>& d_p,
                       const Saved<A, F>& saved, const ResidualIO<A>&, Matrix<const A> d_out, Matrix<A> d_x,
                       Matrix<A> d_x0, const Sequences& rows, const State<S, F>&, const State<F, F>& d_state) {
    for (Index row = 0; row < rows.rows; ++row)
      for (Index c = 0; c < d_model; ++c) {
        if (rows.length(row) == 0) continue;
        A d_s = d_state.s ? d_state.s(row, 0, c) : 0;
        for (Index t = rows.begin(row + 1) - 1; t >= rows.begin(row); --t) {
          d_s += p.weight[c] * d_out(t, c);
          d_p.weight[c] += d_out(t, c) * saved.s(t, c);
          d_x(t, c) += d_s;
          d_x0(t, c) += d_s;
          d_s /= 2;
        }
        if (d_state.s) d_state.s(row, 0, c) = rows.start(row) > 0 ? d_s : 0;
      }
  }
};

template <class Net>
std::map<std::string, std::vector<double>> gradients_of(const Model<Net, double>& model) {
  const auto tokens = random_tokens(12, 1), targets = random_tokens(12, 2);
  const std::vector<Index> offsets{0, 5, 12};
  auto gradients = model.new_gradients();
  model.loss_and_gradients({tokens, targets, offsets}, gradients);
  std::map<std::string, std::vector<double>> values;
  for (const ParameterEntry& entry : model.entries())
    values[entry.name] = {gradients.values().data + entry.offset, gradients.values().data + entry.offset + entry.size};
  return values;
}

/// The gradients of copies shared in turn are sums of those of a stack in which every use has a copy with the same
/// weights; those of all else are the same.
template <class InTurn, class Apart>
void check_copies() {
  constexpr Index uses = Apart::Stack::uses, copies = InTurn::Stack::copies;
  static_assert(Apart::Stack::copies == uses && copies < uses);
  const auto in_turn = random_model<InTurn, double>();
  Model<Apart, double> apart(Seed{1});
  const auto shared = [](const std::string& name) { return name.starts_with("shared."); };
  const auto in_copy = [](std::string name) {  // "shared.2.q" to "shared.0.q" where there are two copies
    name[7] = static_cast<char>('0' + (name[7] - '0') % copies);
    return name;
  };
  for (const ParameterEntry& entry : apart.entries()) {
    const std::string name = shared(entry.name) ? in_copy(entry.name) : entry.name;
    for (const ParameterEntry& from : in_turn.entries())
      if (from.name == name) apart.write(entry, in_turn.read(from));
  }
  auto wanted = gradients_of(in_turn);
  std::map<std::string, std::vector<double>> sums;
  for (const auto& [name, values] : gradients_of(apart)) {
    auto& sum = sums[shared(name) ? in_copy(name) : name];
    sum.resize(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) sum[i] += values[i];
  }
  CHECK(sums.size() == wanted.size());
  for (const ParameterEntry& entry : in_turn.entries()) {
    CAPTURE(entry.name);
    const auto& values = wanted[entry.name];
    CHECK(relative_error(sums[entry.name], values) <= 1e-12);  // sums in another order, through all layers
    CHECK(relative_error(values, std::vector<double>(values.size())) > 0);
  }
}

}  // namespace

TEST_SUITE("pattern_stack") {
  TEST_CASE("patterns") {
    CHECK(letters(uniform_pattern<3>) == "mmm");
    CHECK(letters(periodic_pattern<12, 6>) == "mmmmmhmmmmmh");
    CHECK(letters(periodic_pattern<3, 1>) == "hhh");
    // Zamba-7B-v1: 2, 7, 13, 19, ..., 73.
    std::string published(76, 'm');
    published[2] = 'h';
    for (std::size_t i = 7; i <= 73; i += 6) published[i] = 'h';
    CHECK(letters(zamba_pattern<76, 6, 4>) == published);
    CHECK(Zamba7B::Stack::uses == 13);
    CHECK(Hybrid::Stack::pattern.uses_before(3) == 1);
    CHECK(TwoCopies::Stack::pattern.uses_before(3) == 2);
  }

  TEST_CASE("sizes are those of a count by hand") {
    // norm 16, in_proj 64 * 16, conv 32 * 4 + 32, x_proj 2 * 9 * 16, dt_proj 32 + 32, A_log 32 * 4, D 32, out_proj 512
    constexpr Index mixer = 16 + 1024 + 160 + 288 + 64 + 128 + 32 + 512;
    // norm 32, q 32 * 32, k and v 16 * 32 each, o 16 * 32, norm 16, three matrices of 24 * 16
    constexpr Index shared = 32 + 1024 + 2 * 512 + 512 + 16 + 3 * 384;
    constexpr Index linear = 256, ends = 29 * 16 + 16;
    CHECK(parameter_count<Mixer> == mixer);
    CHECK(parameter_count<Shared> == shared);
    CHECK(parameter_count<Hybrid> == 4 * mixer + shared + 2 * linear + ends);
    CHECK(active_parameter_count<Hybrid> == 4 * mixer + 2 * (shared + linear) + ends);
    CHECK(flops_per_token<Hybrid> == 2 * active_parameter_count<Hybrid>);
    CHECK(parameter_count<TwoCopies> == 4 * mixer + 2 * shared + 3 * linear + ends);
    CHECK(active_parameter_count<TwoCopies> == 4 * mixer + 3 * (shared + linear) + ends);
    constexpr Index inner = 2 * mixer + shared + linear;
    CHECK(parameter_count<Nested> == 3 * inner + shared + linear + ends);
    CHECK(active_parameter_count<Nested> == parameter_count<Nested>);  // every shared block has one use
    // d 20, D 40, N 5, R 2, K 3, with biases.
    constexpr Index wide = 20 + 80 * 20 + 80 + 40 * 3 + 40 + 12 * 40 + 40 * 2 + 40 + 40 * 5 + 40 + 20 * 40 + 20;
    CHECK(parameter_count<Plain> == 2 * wide + 29 * 20 + 20);
    CHECK(active_parameter_count<Plain> == parameter_count<Plain>);

    // Per sequence and layer (K - 1 + N) * 32 floats; per use and position keys and values of 16.
    constexpr Index recurrent = 4 * (3 + 4) * 32 * 4;
    CHECK(state_bytes<Hybrid, float>(1, 10) == recurrent + 2 * 10 * 32 * 4);
    CHECK(state_bytes<Hybrid, bf16>(3, 10) == 3 * (recurrent + 2 * 10 * 32 * 2));
    CHECK(state_bytes<Hybrid, double>(1, 10) == 2 * state_bytes<Hybrid, float>(1, 10));
    CHECK(state_bytes<Plain, float>(1, 1000) == state_bytes<Plain, float>(1, 1));
  }

  TEST_CASE("Zamba-7B-v1 has its published sizes") {
    CHECK(parameter_count<Zamba7B> == 7'232'490'496);
    CHECK(parameter_count<Zamba7B::Stack::SharedType> == 358'263'680);
    CHECK(active_parameter_count<Zamba7B> == 7'232'490'496 + Index{12} * 358'263'680);  // 13 uses: 23.06 GFLOP a token
    // 386,048 bytes a token in bf16, and 36.1 MB a sequence whatever its length.
    constexpr Index of_token = state_bytes<Zamba7B, bf16>(1, 2) - state_bytes<Zamba7B, bf16>(1, 1);
    CHECK(of_token == 386'048);
    CHECK(state_bytes<Zamba7B, bf16>(1, 0) == 76 * 7424 * 16 * 4 + 76 * 7424 * 3 * 4);
  }

  TEST_CASE("names of a nested stack are whole and unique") {
    const auto entries = zamba::detail::list_parameters<Nested, float>();
    std::vector<std::string> names;
    for (const ParameterEntry& entry : entries) names.push_back(entry.name);
    CHECK(std::count(names.begin(), names.end(), "layers.2.layers.1.linear.weight") == 1);
    CHECK(std::count(names.begin(), names.end(), "layers.1.shared.0.q_proj.weight") == 1);
    std::sort(names.begin(), names.end());
    CHECK(std::adjacent_find(names.begin(), names.end()) == names.end());
  }

  TEST_CASE("parameters of a use are listed beside its layer, and counted once a use") {
    std::vector<std::string> names;
    for (const ParameterEntry& entry : zamba::detail::list_parameters<TwoAdapted, float>()) names.push_back(entry.name);
    const auto listed = [&](const char* name) { return std::count(names.begin(), names.end(), name); };
    for (const char* name :
         {"layers.0.q_adapter.a.weight", "layers.2.k_adapter.b.weight", "layers.3.v_adapter.a.weight",
          "layers.3.gate_up_adapter.b.weight", "layers.2.linear.weight"})
      CHECK(listed(name) == 1);
    CHECK(listed("layers.1.q_adapter.a.weight") == 0);
    std::sort(names.begin(), names.end());
    CHECK(std::adjacent_find(names.begin(), names.end()) == names.end());

    // Rank 2 from 32 to 32, 16 and 16; rank 3 from 16 to 48.
    constexpr Index use = 2 * (3 * 32 + 32 + 16 + 16) + 3 * (16 + 48);
    CHECK(parameter_count<Adapted> == parameter_count<Shared>);
    CHECK(parameter_count<TwoAdapted> == parameter_count<TwoCopies> + 3 * use);
    CHECK(active_parameter_count<TwoAdapted> == active_parameter_count<TwoCopies> + 3 * use);
    CHECK(flops_per_token<TwoAdapted> == 2 * active_parameter_count<TwoAdapted>);
    CHECK(state_bytes<TwoAdapted, bf16>(2, 9) == state_bytes<TwoCopies, bf16>(2, 9));
    CHECK(parameter_count<NestedAdapted> == parameter_count<Nested> + 4 * use);
    CHECK(active_parameter_count<NestedAdapted> == parameter_count<NestedAdapted>);
  }

  TEST_CASE("each use meets its own adapters") { check_adapters<double>(); }

  TEST_CASE("copies in turn: the gradient of a copy is the sum over its uses") {
    check_copies<TwoCopies, LanguageModel<vocabulary, PatternStack<"hmhh", Mixer, Shared, 3>>>();
    check_copies<TwoAdapted, LanguageModel<vocabulary, PatternStack<"hmhh", Mixer, Adapted, 3>>>();
  }

  TEST_CASE("a user's shared block has no parameters of its uses") {
    const auto report = zamba::testing::conformance<SumShared>();
    CHECK_MESSAGE(report.passed(), report.text());
    using InTurn = LanguageModel<vocabulary, PatternStack<"hmhh", Mixer, SumShared, 2>>;
    CHECK(parameter_count<InTurn::Stack> == 4 * parameter_count<Mixer> + 5 * 256);
    CHECK(active_parameter_count<InTurn::Stack> == 4 * parameter_count<Mixer> + 6 * 256);
    check_copies<InTurn, LanguageModel<vocabulary, PatternStack<"hmhh", Mixer, SumShared, 3>>>();
  }

  TEST_CASE("a shared block's state of fixed size is put back where the pass is computed again") {
    const auto report = zamba::testing::conformance<SharedAverage>();
    CHECK_MESSAGE(report.passed(), report.text());
    CHECK(report.text().find("in a stack, computed again, with a state: d parameters") != std::string::npos);
  }

  TEST_CASE("extend: Mamba layers only") { check_extend<Plain, double>(); }
  TEST_CASE("extend: stacks of stacks") { check_extend<Nested, double>(); }
  TEST_CASE("extend: stacks of stacks, with rope and adapters") { check_extend<NestedAdapted, double>(); }
}
