// SPDX-License-Identifier: MIT
// AttentionShape: the heads of an attention, see ops/attention.hpp.
#pragma once

#include <zamba/device.hpp>

namespace zamba {

struct AttentionShape {
  Index heads = 0, kv_heads = 0, head_dim = 0;  // heads is a multiple of kv_heads
  double scale = 0;
};

}  // namespace zamba
