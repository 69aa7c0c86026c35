// SPDX-License-Identifier: MIT
// Models of both Mamba generations and of shared attention on both devices in one unit, as projects of their own
// compile them: CMakeLists.txt gives the flags that such projects set.
#include <zamba/zamba.cuh>

namespace {

using namespace zamba;

using Mamba = MambaBlock<MambaConfig{.d_model = 64, .d_state = 16, .n_heads = 2}>;
using Mamba2 = Mamba2Block<Mamba2Config{.d_model = 64, .d_state = 16, .n_heads = 4, .n_groups = 2}>;
using Shared = SharedAttention<SharedAttentionConfig{
    .d_model = 64, .n_heads = 4, .d_ff = 128, .rope = true, .mlp_adapter_rank = 4}>;
using MambaNet = LanguageModel<8, HybridStack<2, 2, Mamba, Shared>>;
using Mamba2Net = LanguageModel<8, HybridStack<2, 2, Mamba2, Shared>>;

}  // namespace

#ifndef __CUDACC_DEBUG__  // -G is about kernels
template class zamba::Model<MambaNet, float, cpu>;
template class zamba::Model<Mamba2Net, float, cpu>;
#endif
template class zamba::Model<MambaNet, bf16, cuda>;
template class zamba::Model<Mamba2Net, bf16, cuda>;
