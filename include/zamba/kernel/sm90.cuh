// SPDX-License-Identifier: MIT
// The instructions of sm_90a: wgmma, products of a warpgroup of four warps; TMA loads, copies of boxes of a tensor by
// one thread; mbarriers in shared memory, at which such copies arrive; setmaxnreg (PTX ISA: wgmma,
// cp.async.bulk.tensor, mbarrier, setmaxnreg). They belong to one architecture; code compiled for another has none of
// them.
//
// Matrices in shared memory are made of atoms: rows of 64 bf16, 128 bytes, with 128-byte swizzle: of a row's eight
// 16-byte pieces, piece p of row r lies at p ^ (r % 8), so that no two of eight neighbouring rows meet in a bank. An
// atom starts at a multiple of 1024 bytes; a box of 64 columns is loaded into one atom.
//
// Sums (64 x N) of a warpgroup: warp w has rows 16w to 16w + 15 as a Fragment<1, N / 8> (fragment.cuh).
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_runtime.h>

#include <zamba/context.cuh>
#include <zamba/kernel/mma.cuh>
#include <zamba/number.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

/// Whether this is compiled for an architecture with warpgroups.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool has_wgmma = true;
#else
inline constexpr bool has_wgmma = false;
#endif

inline constexpr int warpgroup_threads = 128;
inline constexpr int atom_columns = 64;  // bf16
inline constexpr int atom_row_bytes = 128;
inline constexpr int atom_alignment = 1024;

/// A barrier in shared memory. It completes a phase when as many have arrived as it waits for, and all bytes that they
/// announced; phases count from 0, and a wait for the phase before the first returns at once.
struct Mbarrier {
  std::uint64_t state;

  __device__ void init(unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  /// At the same barrier of another block of the cluster: its stores after the wait come after what was read here. Of
  /// the block's scope, as nothing written here is for it; of the cluster's it would wait for all stores under way.
  __device__ void arrive_at(unsigned block) {
    asm volatile(
        "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
        " mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(this)),
        "r"(block)
        : "memory");
  }
  /// Arrives, and announces the bytes of copies.
  __device__ void arrive_expect_tx(unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  __device__ void wait(unsigned phase) {
    unsigned done = 0;
    while (!done)
      asm volatile(
          "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(phase & 1)
          : "memory");
  }
};

/// Makes initialised barriers visible to copies and to the other blocks of the cluster, after a barrier of them all.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// What this thread stored into shared memory becomes visible to products, after a barrier.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// A barrier of all threads of the cluster.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// Stores 16 bytes into the same place of another block of the cluster; they arrive at its barrier.
__device__ inline void store_async(void* to, unsigned block, const float (&values)[4], Mbarrier& barrier) {
  asm volatile(
      "{\n .reg .b32 there, at;\n mapa.shared::cluster.u32 there, %0, %2;\n mapa.shared::cluster.u32 at, %1, %2;\n"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3,%4,%5,%6}, [at];\n}" ::"r"(
          shared_address(to)),
      "r"(shared_address(&barrier)), "r"(block), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
      : "memory");
}
/// Barrier `index` of the block, from 1 on, for so many threads: of those that wait for it, and those that only arrive.
__device__ inline void named_barrier_sync(int index, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int index, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(index), "r"(threads) : "memory");
}

/// Whether a block, the only one of its multiprocessor, of so many warpgroups has what setmaxnreg gives a thread of
/// each, summed: what it was launched with, of which there are multiples of 8. Who asks for more waits for ever.
template <int Warpgroups>
constexpr bool registers_suffice(int sum) {
  return sum <= Warpgroups * (65536 / (Warpgroups * warpgroup_threads) / 8 * 8);
}

/// Gives registers of each thread of the warpgroup back, or takes free ones: Count remain.
template <int Count>
__device__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

/// The place of a box: its first column in a head, the head, its first position, the row of the batch.
struct TmaCoordinates {
  int column, head, position, row;
};

/// Begins to copy a box into shared memory; its bytes arrive at the barrier. Zeros where it leaves the tensor.
__device__ inline void tma_load(void* to, const CUtensorMap& from, const TmaCoordinates& place, Mbarrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&from), "r"(place.column), "r"(place.head), "r"(place.position), "r"(place.row), "r"(shared_address(&barrier))
      : "memory");
}
/// The same into the same place of each block of the cluster that `blocks` has the bit of, arriving at its barrier.
__device__ inline void tma_load_multicast(std::uint16_t blocks, void* to, const CUtensorMap& from,
                                          const TmaCoordinates& place, Mbarrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(to)),
      "l"(&from), "r"(place.column), "r"(place.head), "r"(place.position), "r"(place.row),
      "r"(shared_address(&barrier)), "h"(blocks)
      : "memory");
}

/// Names an operand of products, rows of whole atoms: 16 columns of it as a or b, or, where its rows are those of the
/// sum, 16 rows of it as b, then with the bytes from one atom of columns to the next. Adding descriptor_step moves it.
__device__ inline std::uint64_t shared_descriptor(const void* at, int next_atom = 16) {
  constexpr std::uint64_t eight_rows = 8 * atom_row_bytes, swizzle_128_bytes = 1;
  return (shared_address(at) & 0x3ffff) >> 4 | static_cast<std::uint64_t>(next_atom) >> 4 << 16 |
         eight_rows >> 4 << 32 | swizzle_128_bytes << 62;
}
__device__ constexpr std::uint64_t descriptor_step(int bytes) { return static_cast<std::uint64_t>(bytes) >> 4; }

/// To be called before the first product, and wherever registers that products use were written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Ends a group of products.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most Groups of the last groups are under way.
template <int Groups>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}
/// Keeps the compiler from moving what reads or writes these registers across this line.
template <int Count>
__device__ __forceinline__ void fence_operand(float (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int Count>
__device__ __forceinline__ void fence_operand(unsigned (&registers)[Count][4]) {
#pragma unroll
  for (int i = 0; i < Count; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
}

/// sums (64 x N) of products over 16. ss: sums = or += a b^T of two operands in shared memory; rs: sums += a b with a
/// in registers, laid out like a in mma.cuh, and the rows of b being those of the sum.
template <int N>
struct Wgmma;

#define ZAMBA_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define ZAMBA_NAMES_16 ZAMBA_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define ZAMBA_NAMES_24 ZAMBA_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define ZAMBA_NAMES_32 ZAMBA_NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define ZAMBA_NAMES_48 ZAMBA_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define ZAMBA_NAMES_56 ZAMBA_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define ZAMBA_NAMES_64 ZAMBA_NAMES_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define ZAMBA_SUMS_AT(i)                                                                                        \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define ZAMBA_SUMS_8 ZAMBA_SUMS_AT(0)
#define ZAMBA_SUMS_16 ZAMBA_SUMS_8, ZAMBA_SUMS_AT(8)
#define ZAMBA_SUMS_24 ZAMBA_SUMS_16, ZAMBA_SUMS_AT(16)
#define ZAMBA_SUMS_32 ZAMBA_SUMS_24, ZAMBA_SUMS_AT(24)
#define ZAMBA_SUMS_48 ZAMBA_SUMS_32, ZAMBA_SUMS_AT(32), ZAMBA_SUMS_AT(40)
#define ZAMBA_SUMS_56 ZAMBA_SUMS_48, ZAMBA_SUMS_AT(48)
#define ZAMBA_SUMS_64 ZAMBA_SUMS_56, ZAMBA_SUMS_AT(56)

// n, the registers of the sums, and the numbers of the six operands after them.
#define ZAMBA_WGMMA(n, count, n0, n1, n2, n3, n4)                                                              \
  template <>                                                                                                  \
  struct Wgmma<n> {                                                                                            \
    static __device__ __forceinline__ void ss(float* sums, std::uint64_t a, std::uint64_t b, bool add) {       \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #n2 ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n    \
                   "k16.f32.bf16.bf16 {" ZAMBA_NAMES_##count "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, 0;\n}"        \
                   : ZAMBA_SUMS_##count                                                                        \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                              \
    }                                                                                                          \
    static __device__ __forceinline__ void rs(float* sums, const unsigned (&a)[4], std::uint64_t b) {          \
      asm volatile("{\n .reg .pred p;\n setp.eq.u32 p, 0, 0;\n wgmma.mma_async.sync.aligned.m64n" #n           \
                   "k16.f32.bf16.bf16 {" ZAMBA_NAMES_##count "}, {%" #n0 ",%" #n1 ",%" #n2 ",%" #n3 "}, %" #n4 \
                                                             ", p, 1, 1, 1;\n}"                                \
                   : ZAMBA_SUMS_##count                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                      \
    }                                                                                                          \
  };

ZAMBA_WGMMA(16, 8, 8, 9, 10, 11, 12)
ZAMBA_WGMMA(32, 16, 16, 17, 18, 19, 20)
ZAMBA_WGMMA(48, 24, 24, 25, 26, 27, 28)
ZAMBA_WGMMA(64, 32, 32, 33, 34, 35, 36)
ZAMBA_WGMMA(96, 48, 48, 49, 50, 51, 52)
ZAMBA_WGMMA(112, 56, 56, 57, 58, 59, 60)
ZAMBA_WGMMA(128, 64, 64, 65, 66, 67, 68)

#undef ZAMBA_WGMMA
#undef ZAMBA_SUMS_64
#undef ZAMBA_SUMS_56
#undef ZAMBA_SUMS_48
#undef ZAMBA_SUMS_32
#undef ZAMBA_SUMS_24
#undef ZAMBA_SUMS_16
#undef ZAMBA_SUMS_8
#undef ZAMBA_SUMS_AT
#undef ZAMBA_NAMES_64
#undef ZAMBA_NAMES_56
#undef ZAMBA_NAMES_48
#undef ZAMBA_NAMES_32
#undef ZAMBA_NAMES_24
#undef ZAMBA_NAMES_16
#undef ZAMBA_NAMES_8

/// Describes heads of a tensor (rows, positions, heads * head_dim), whose rows begin at multiples of 16 bytes, to
/// copies of boxes: 64 columns of one head at `positions` positions. `tensor` is not read.
inline CUtensorMap tensor_map_of_heads(Tensor<const bf16, 3> tensor, Index head_dim, Index positions) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    require(function != nullptr, "cuTensorMapEncodeTiled: the driver does not have it");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const auto count = [](Index n) { return static_cast<cuuint64_t>(n); };
  const auto bytes = [](Index n) { return static_cast<cuuint64_t>(n) * sizeof(bf16); };
  const cuuint64_t extents[] = {count(head_dim), count(tensor.shape[2] / head_dim), count(tensor.shape[1]),
                                count(tensor.shape[0])};
  const cuuint64_t strides[] = {bytes(head_dim), bytes(tensor.stride[1]), bytes(tensor.stride[0])};
  const cuuint32_t box[] = {atom_columns, 1, static_cast<cuuint32_t>(positions), 1}, each[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<bf16*>(tensor.data), extents,
                                 strides, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(result));
  return map;
}

}  // namespace zamba::kernel
