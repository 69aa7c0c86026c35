// SPDX-License-Identifier: MIT
// expect: zamba: there is no Context for this device here: include <zamba/zamba.cuh> and compile with nvcc
// lines: 500
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/model.hpp>

using Mixer = zamba::MambaBlock<zamba::MambaConfig{.d_model = 64}>;
using Net = zamba::LanguageModel<256, zamba::UniformStack<4, Mixer>>;
using Model = zamba::Model<Net, float, zamba::cuda>;

#ifndef ZAMBA_EXPECT_FAILURE
extern template class zamba::Model<Net, float, zamba::cuda>;
#endif

void first_token(const Model& model, Model::StateType& state) { model.extend(state, {1}); }
