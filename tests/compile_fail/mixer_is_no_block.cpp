// SPDX-License-Identifier: MIT
// expect: zamba::Block: a block says its width, at least 1: 'static constexpr Index d_model'
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/pattern_stack.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64}>;
#else
struct Mixer {
  static constexpr int width = 64;
};
#endif
using Stack = zamba::UniformStack<4, Mixer>;
static_assert(Stack::layers == 4);
