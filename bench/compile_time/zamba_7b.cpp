// SPDX-License-Identifier: MIT
// What it costs to compile a large model: every member of Zamba-7B's Model, the training step among them.
#include <zamba/zamba.hpp>

template class zamba::Model<zamba::Zamba7B, float, zamba::cpu>;
