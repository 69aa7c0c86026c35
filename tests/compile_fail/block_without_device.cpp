// SPDX-License-Identifier: MIT
// expect: zamba::Model: a block of this network does not say that it runs on this device
#include <zamba/model.hpp>

#include "block_parts.hpp"

using namespace parts;

#ifndef ZAMBA_EXPECT_FAILURE
struct Mixer : Layer {
  template <class Device>
  static constexpr bool runs_on = true;  // with kernels of its own
};
#else
struct Mixer : Layer {};  // loops of its own would read the device's memory from the host
#endif
using Net = zamba::LanguageModel<256, zamba::UniformStack<2, Mixer>>;
extern template class zamba::Model<Net, float, zamba::cuda>;
