// SPDX-License-Identifier: MIT
// adamw_step against a plain loop in double, masters in two halves against float weights, and the sum of squares.
#include <zamba/ops/adamw_step.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <tests/support/arrays.hpp>
#include <tests/support/devices.hpp>

using namespace zamba;
using zamba::testing::new_context;
using zamba::testing::random_values;
using zamba::testing::relative_error;

namespace {

template <class Device, class T>
struct On {
  using device = Device;
  using type = T;
};

/// A device's copy of host values, aligned to 64 bytes or, by `shift` elements, not.
template <class Device, class T>
class Copy {
 public:
  explicit Copy(const std::vector<T>& values, Index shift = 0)
      : shift_(shift), count_(std::ssize(values)), buffer_((values.size() + 16) * sizeof(T)) {
    if (count_ > 0) Memory<Device>::copy_from_host(view().data, values.data(), values.size() * sizeof(T));
  }
  Vector<T> view() const { return {reinterpret_cast<T*>(buffer_.data()) + shift_, count_}; }
  void take(std::vector<T>& to) const {
    if (count_ > 0) Memory<Device>::copy_to_host(to.data(), view().data, to.size() * sizeof(T));
  }

 private:
  Index shift_, count_;
  Buffer<Device> buffer_;
};

/// A parameter with its moments, as one step finds them. The master of a bf16 weight is split for the step.
template <class Device, class W, class F>
struct Problem {
  explicit Problem(Index n)
      : weight(random_values<W>(n, 1)),
        master(weight.begin(), weight.end()),
        gradient(random_values<F>(n, 2)),
        m(random_values<F>(n, 3)),
        v(random_values<F>(n, 4)) {
    for (F& value : v) value *= value;
  }
  void step(const AdamWScalars& scalars, double norm_squared, int threads, Index shift = 0) {
    auto ctx = new_context<Device>(threads);
    std::vector<std::uint16_t> lower;
    if constexpr (std::is_same_v<W, bf16>)
      for (std::size_t i = 0; i < master.size(); ++i) {
        const SplitFloat halves(master[i]);
        weight[i] = halves.nearest;
        lower.push_back(halves.low);
      }
    const Copy<Device, W> weight_(weight, shift);
    const Copy<Device, F> gradient_(gradient, shift), m_(m, shift), v_(v, shift);
    const Copy<Device, std::uint16_t> low(lower, shift);
    const Copy<Device, double> norm(std::vector<double>{norm_squared});
    const AdamWTensors<W, F> tensors{weight_.view(), low.view(), gradient_.view(), m_.view(), v_.view()};
    adamw_step(ctx, tensors, scalars, norm.view().data);
    weight_.take(weight), m_.take(m), v_.take(v);
    if constexpr (std::is_same_v<W, bf16>) {
      low.take(lower);
      for (std::size_t i = 0; i < lower.size(); ++i) master[i] = static_cast<float>(SplitFloat(weight[i], lower[i]));
    }
  }

  std::vector<W> weight;
  std::vector<F> master, gradient, m, v;
};

/// The definition, as in PyTorch: decay, moments, bias corrections, update.
struct Definition {
  template <class Device, class W, class F>
  Definition(const Problem<Device, W, F>& p, const AdamWScalars& s, double norm) {
    const double clip = s.clip_norm > 0 ? std::min(1.0, s.clip_norm / (norm + 1e-6)) : 1;
    for (std::size_t i = 0; i < p.weight.size(); ++i) {
      const double g = clip * p.gradient[i];
      m.push_back(s.beta1 * p.m[i] + (1 - s.beta1) * g);
      v.push_back(s.beta2 * p.v[i] + (1 - s.beta2) * g * g);
      const double m_hat = m[i] / (1 - std::pow(s.beta1, s.step_number)),
                   v_hat = v[i] / (1 - std::pow(s.beta2, s.step_number)), decayed = 1 - s.learning_rate * s.decay;
      weight.push_back(p.master[i] * decayed - s.learning_rate * m_hat / (std::sqrt(v_hat) + s.eps));
    }
  }
  std::vector<double> weight, m, v;
};

}  // namespace

TEST_CASE_TEMPLATE("adamw_step: matches its definition", Where, ZAMBA_TEST_ON) {
  using F = typename Where::type;
  // A handful of roundings an element, and the cancellation of (1 - lr decay) p with the update: 10 epsilon.
  constexpr double tolerance = sizeof(F) == 8 ? 2e-15 : 1.2e-6;
  for (const Index n : {1, 7, 33, 2048, 70'001})
    for (const AdamWScalars scalars :
         {AdamWScalars{0.1, 0.9, 0.95, 1e-8, 0.1, 1, 1}, AdamWScalars{0.1, 0.8, 0.999, 1e-3, 0, 0, 7},
          AdamWScalars{0.01, 0, 0.5, 1e-8, 0.5, 1e6, 1000}}) {
      Problem<typename Where::device, F, F> problem(n);
      const double norm = 3.5;
      const Definition wanted(problem, scalars, norm);
      problem.step(scalars, norm * norm, 2);
      CHECK(relative_error(problem.weight, wanted.weight) < tolerance);
      CHECK(relative_error(problem.m, wanted.m) < tolerance);
      CHECK(relative_error(problem.v, wanted.v) < tolerance);
    }
}

TEST_CASE_TEMPLATE("adamw_step: the master of a bf16 weight is stepped to the bits of a float weight", Where,
                   ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  for (const Index n : {1, 9, 5'003}) {
    Problem<Device, float, float> whole(n);
    Problem<Device, bf16, float> split(n);
    split.master = whole.weight;
    for (Index t = 1; t <= 4; ++t) {
      const AdamWScalars scalars{1e-3, 0.9, 0.95, 1e-8, 0.1, 1, t};
      whole.step(scalars, 4, 2);
      split.step(scalars, 4, 2);
    }
    CHECK(split.master == whole.weight);
    CHECK(split.m == whole.m);
    CHECK(split.v == whole.v);
    for (std::size_t i = 0; i < split.weight.size(); ++i)
      REQUIRE(split.weight[i].bits == SplitFloat(split.master[i]).nearest.bits);
  }
}

TEST_CASE_TEMPLATE("adamw_step: elements that are not aligned to vectors change no bit", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  if (std::is_same_v<Device, cpu>) return;  // which asks for alignment
  const AdamWScalars scalars{1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 3};
  Problem<Device, bf16, float> aligned(1'003), shifted(1'003);
  aligned.step(scalars, 4, 1);
  shifted.step(scalars, 4, 1, 3);
  CHECK(aligned.master == shifted.master);
  CHECK(aligned.v == shifted.v);
}

/// The bits of floats: of both signs, of the least and greatest exponents and some others, with upper halves that are
/// even, odd, least and greatest, and every lower half.
template <class F>
void for_floats(F&& f) {
  for (const std::uint32_t sign : {0u, 1u})
    for (const std::uint32_t exponent : {0u, 1u, 2u, 60u, 126u, 127u, 128u, 253u, 254u})
      for (const std::uint32_t upper : {0u, 1u, 2u, 63u, 64u, 126u, 127u})
        for (std::uint32_t lower = 0; lower < 0x10000; ++lower)
          f(std::bit_cast<float>(sign << 31 | exponent << 23 | upper << 16 | lower));
}

TEST_CASE("SplitFloat: every float comes back, from the bf16 nearest to it and 16 bits") {
  Index wrong = 0, ties = 0;
  for_floats([&](float value) {
    const SplitFloat halves(value);
    const auto bits = std::bit_cast<std::uint32_t>(value);
    wrong += std::bit_cast<std::uint32_t>(static_cast<float>(halves)) != bits;
    wrong += halves.low != (bits & 0xffff);
    // Nearest: bf16's own rounding, but for a tie that it takes to the even one below.
    const bool tie = (bits & 0x1ffff) == 0x8000;
    ties += tie;
    wrong += halves.nearest.bits != bf16(value).bits + tie;
  });
  CHECK(wrong == 0);
  CHECK(ties > 0);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float value : {infinity, -infinity}) {
    const SplitFloat halves(value);
    CHECK(static_cast<float>(halves.nearest) == value);
    CHECK(static_cast<float>(halves) == value);
  }
  for (const std::uint32_t bits : {0x7f800001u, 0x7fffffffu, 0xffffffffu, 0xff80ffffu}) {
    const SplitFloat halves(std::bit_cast<float>(bits));
    CHECK(is_nan(static_cast<float>(halves.nearest)));
    CHECK(is_nan(static_cast<float>(halves)));
  }
}

TEST_CASE("SplitFloat: a zero that was written over another float stays a finite one") {
  for (const float zero : {0.f, -0.f})
    for (std::uint32_t low = 0; low < 0x10000; ++low) {
      const SplitFloat halves(bf16(zero), static_cast<std::uint16_t>(low));
      REQUIRE(std::abs(static_cast<float>(halves)) < std::numeric_limits<float>::min());
    }
}

TEST_CASE_TEMPLATE("adamw_step at a rate of 0 leaves every master in two halves as it is", Where, ZAMBA_TEST_ON) {
  std::vector<float> masters;
  for_floats([&, i = 0u](float value) mutable {
    if (i++ % 37 == 0 || (std::bit_cast<std::uint32_t>(value) & 0x7fff) < 2) masters.push_back(value);
  });
  const auto n = std::ssize(masters);
  Problem<typename Where::device, bf16, float> problem(0);
  problem.weight.resize(masters.size());
  problem.master = masters;
  problem.gradient = problem.m = problem.v = std::vector<float>(masters.size());
  problem.step({0, 0.9, 0.95, 1e-8, 0, 1, 1}, 4, 2);
  CHECK(std::memcmp(problem.master.data(), masters.data(), static_cast<std::size_t>(n) * sizeof(float)) == 0);
}

TEST_CASE_TEMPLATE("adamw_step: bit-equal for any number of threads, and in a rerun", Where, ZAMBA_TEST_ON) {
  using F = typename Where::type;
  const AdamWScalars scalars{1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 3};
  Problem<typename Where::device, F, F> one(200'003), three(200'003);
  one.step(scalars, 4, 1);
  three.step(scalars, 4, 3);
  CHECK(one.weight == three.weight);
  CHECK(one.m == three.m);
  CHECK(one.v == three.v);
}

TEST_CASE_TEMPLATE("adamw_step: no clipping below the norm allowed, and none when it is switched off", Where,
                   ZAMBA_TEST_ON) {
  Problem<typename Where::device, double, double> below(100), off(100), free(100);
  below.step({0.1, 0.9, 0.95, 1e-8, 0.1, 10, 1}, 4, 1);
  off.step({0.1, 0.9, 0.95, 1e-8, 0.1, 0, 1}, 1e9, 1);
  free.step({0.1, 0.9, 0.95, 1e-8, 0.1, 1e300, 1}, 1e9, 1);
  CHECK(below.weight == free.weight);
  CHECK(off.weight == free.weight);
}

namespace {

/// One element of a gradient is `large`, the others are 0, as is all that came before: clipped to a norm of 1.
template <class Device, class W, class F>
void clips_before_squaring(double large) {
  for (const Index n : {1, 3, 70'001}) {
    CAPTURE(large);
    Problem<Device, W, F> problem(n);
    const auto at = static_cast<std::size_t>(n / 2);
    for (auto* values : {&problem.gradient, &problem.m, &problem.v}) std::fill(values->begin(), values->end(), F(0));
    problem.gradient[at] = static_cast<F>(large);
    const double norm = std::abs(static_cast<double>(static_cast<F>(large))), before = problem.master[at];
    const auto others = problem.master;
    problem.step({1e-2, 0.9, 0.95, 1e-8, 0, 1, 1}, norm * norm, 2);
    // Two roundings of float, and the 1e-6 of the clipping where the norm is small.
    CHECK(problem.m[at] == doctest::Approx(large < 0 ? -0.1 : 0.1).epsilon(2e-6));
    CHECK(problem.v[at] == doctest::Approx(0.05).epsilon(4e-6));
    const double now = std::is_same_v<W, F> ? static_cast<double>(static_cast<float>(problem.weight[at]))
                                            : static_cast<double>(problem.master[at]);
    CHECK(now - before == doctest::Approx(large < 0 ? 1e-2 : -1e-2).epsilon(1e-4));  // weights near 1, in float
    for (std::size_t i = 0; i < others.size(); ++i)
      if (i != at) REQUIRE(static_cast<float>(problem.weight[i]) == static_cast<float>(static_cast<W>(others[i])));
  }
}

}  // namespace

TEST_CASE_TEMPLATE("adamw_step: a gradient is clipped before it is squared, whatever its size", Where, ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  for (const double large : {3., 1e10, -1.8e19, 1.9e19, 1e20, -1e30, 3e38}) {
    clips_before_squaring<Device, float, float>(large);
    clips_before_squaring<Device, bf16, float>(large);
    clips_before_squaring<Device, double, double>(large);
  }
  for (const double large : {1e100, -1e150}) clips_before_squaring<Device, double, double>(large);
}

TEST_CASE_TEMPLATE("adamw_step: many gradients near the largest float, whose clip is below the least", Where,
                   ZAMBA_TEST_ON) {
  constexpr Index n = 10'000;
  Problem<typename Where::device, float, float> problem(n);
  std::fill(problem.gradient.begin(), problem.gradient.end(), 3e38f);
  std::fill(problem.m.begin(), problem.m.end(), 0.f);
  std::fill(problem.v.begin(), problem.v.end(), 0.f);
  const double norm = 100 * static_cast<double>(3e38f);
  problem.step({1e-2, 0.9, 0.95, 1e-8, 0, 1, 1}, norm * norm, 2);
  for (Index i = 0; i < n; i += 999) {
    const auto at = static_cast<std::size_t>(i);
    CHECK(problem.m[at] == doctest::Approx(0.1 / 100).epsilon(1e-6));
    CHECK(problem.v[at] == doctest::Approx(0.05 / 1e4).epsilon(2e-6));
  }
}

TEST_CASE_TEMPLATE("adamw_step: a norm that is not finite, or whose square v could not hold, changes nothing", Where,
                   ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  constexpr double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for (const auto& bad : {std::pair{0., nan}, {0., inf}, {1., nan}, {1., inf}, {0., 2e19}, {1e20, 1e25}}) {
    const double clip = bad.first, norm = bad.second;
    CAPTURE(clip);
    CAPTURE(norm);
    Problem<Device, float, float> problem(5'000), as_it_was(5'000);
    Problem<Device, bf16, float> stored(5'000), stored_was(5'000);
    const AdamWScalars scalars{1e-2, 0.9, 0.95, 1e-8, 0.1, clip, 3};
    problem.step(scalars, norm * norm, 2);
    stored.step(scalars, norm * norm, 2);
    CHECK((problem.weight == as_it_was.weight && problem.m == as_it_was.m && problem.v == as_it_was.v));
    CHECK((stored.master == stored_was.master && stored.m == stored_was.m && stored.v == stored_was.v));
  }
  Problem<Device, double, double> wide(10), wide_was(10);
  wide.step({1e-2, 0.9, 0.95, 1e-8, 0.1, 0, 3}, 4e38, 1);  // what float could not hold
  CHECK(wide.weight != wide_was.weight);
}

TEST_CASE_TEMPLATE("sum_of_squares: summed in double, bit-equal for any number of threads and any alignment", Where,
                   ZAMBA_TEST_ON) {
  using Device = typename Where::device;
  using F = typename Where::type;
  const auto squared = [](const std::vector<F>& values, int threads, Index shift) {
    auto ctx = new_context<Device>(threads);
    const Copy<Device, F> there(values, shift);
    const Copy<Device, double> sum(std::vector<double>{-1});
    sum_of_squares(ctx, there.view(), sum.view().data);
    std::vector<double> result(1);
    sum.take(result);
    return result[0];
  };
  for (const Index n : {0, 1, 5, 16'384, 300'007}) {
    const std::vector<F> values = random_values<F>(n, 9);
    double wanted = 0;
    for (const F v : values) wanted += static_cast<double>(v) * static_cast<double>(v);
    const double one = squared(values, 1, 0);
    CHECK(one == squared(values, 3, 0));
    CHECK(one == squared(values, 1, 1));
    CHECK(std::abs(one - wanted) <= 1e-12 * wanted);  // 3e5 additions in double, each 1e-16, in another order
  }
  // Whose squares are beyond float.
  CHECK(squared(std::vector<F>(1000, F(1e30f)), 1, 0) == doctest::Approx(1e63));
}
