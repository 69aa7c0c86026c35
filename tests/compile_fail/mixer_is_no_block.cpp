// SPDX-License-Identifier: MIT
// expect: B::d_model
// expect: UniformStack
// expect: Block
#include <zamba/zamba.hpp>

#ifndef ZAMBA_EXPECT_FAILURE
using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64}>;
#else
struct Mixer {
  static constexpr int width = 64;
};
#endif
using Stack = zamba::UniformStack<4, Mixer>;
static_assert(Stack::layers == 4);
