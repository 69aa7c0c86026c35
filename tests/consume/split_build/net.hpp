// SPDX-License-Identifier: MIT
#pragma once

#include <zamba/zamba.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 16, .d_state = 4}>;
using Net = zamba::LanguageModel<8, zamba::UniformStack<2, Mixer>>;
