// SPDX-License-Identifier: MIT
// expect: zamba::Context: a block that says 'by_operators = true' calls parallel_for
#include <zamba/model.hpp>

#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
constexpr bool says_by_operators = false;
#else
constexpr bool says_by_operators = true;
#endif
struct Mixer : Layer {
  static constexpr bool by_operators = says_by_operators;

  template <class Device, class W, class F, class A, class S>
  static SavedOf<A, F> forward(Context<Device>& ctx, const ParametersOf<const W, const F>&, const ResidualIO<A>& io,
                               const Sequences&, const StateOf<S, F>&, Keep) {
    ctx.parallel_for(io.x.rows(), [&](Index t, int) { io.out(t, 0) = 2 * io.x(t, 0); });
    return {};
  }
};
using Net = LanguageModel<256, UniformStack<2, Mixer>>;
void first_token(const Model<Net>& model, Model<Net>::StateType& state) { model.extend(state, {1}); }
