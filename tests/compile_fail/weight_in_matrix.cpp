// SPDX-License-Identifier: MIT
// expect: zamba: Parameters hold a Matrix<W> or Tensor<W, 3>, which are for plain numbers, and the weights' type is
// none
#include <zamba/parameter.hpp>

#include "../support/scaled.hpp"

struct Block {
#ifndef ZAMBA_EXPECT_FAILURE
  template <class W, class F>
  struct Parameters {
    zamba::Weight<W> weight;
  };
#else
  template <class W, class F>
  struct Parameters {
    zamba::Matrix<W> weight;
  };
#endif
  template <class P, class Visit>
  static constexpr void visit_parameters(P& p, Visit visit) {
    visit("weight", p.weight, {{16, 16}}, zamba::fan_in(16));
  }
};

void list(Block::Parameters<const zamba_test::Scaled<signed char>, const float>& parameters) {
  zamba::visit_parameters<Block>(parameters, [](const zamba::Name&, auto&, auto, zamba::Initializer, zamba::Decay) {});
}
