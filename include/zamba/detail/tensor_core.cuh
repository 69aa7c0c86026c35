// SPDX-License-Identifier: MIT
// The instructions of tensor cores and of asynchronous copies, from compute capability 8.0 on (PTX ISA: mma.m16n8k16,
// ldmatrix, cp.async). All lanes of a warp call each of them together, except copy_async. And functions by approximate
// instructions of one thread.
//
// Fragments, with g = lane / 4 and t = lane % 4; each register holds two neighbouring bf16, the lower half first:
//   a (16 x 16)   {row g, columns 2t..}, {row g + 8, 2t..}, {row g, 2t + 8..}, {row g + 8, 2t + 8..}
//   b (16 x 8)    {rows 2t.., column g}, {rows 2t + 8.., column g}
//   c (16 x 8)    (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), in float
#pragma once

#include <zamba/device.hpp>

namespace zamba::detail {

/// A place in shared memory as instructions name it.
__device__ inline unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

/// c += a b
__device__ inline void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8 x 8 matrices of bf16 from shared memory: lane l names row l % 8 of matrix l / 8, 16 aligned bytes; it gets
/// elements 2t and 2t + 1 of row g of each.
__device__ inline void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

/// The same of the matrices transposed: elements 2t and 2t + 1 of column g of each.
__device__ inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

/// Begins to copy 16 aligned bytes into shared memory; zeros where `valid` is not true, then `from` is not read.
__device__ inline void copy_async(void* shared, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

/// The same, and a hint that what follows in memory, up to 128 bytes, will be read soon.
__device__ inline void copy_async_ahead(void* shared, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

/// Ends a group of this thread's copies.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most Groups of this thread's last groups are still under way. Other threads see the copies after a
/// barrier.
template <int Groups>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

/// Two values as one register of a fragment, `low` first, each rounded to nearest even.
__device__ inline unsigned pack_bf16(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

/// exp(x) is 2 to the power of x times it.
inline constexpr float log2_e = 1.44269504f;

/// 2^x, within 2 units in the last place.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x, within 1 unit in the last place; 0 for an infinite x.
__device__ inline float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// x / (1 + e^-x), in float within (3 + |x|) 1e-7 of its value.
__device__ inline float silu(float x) { return x * reciprocal_approximate(1.0f + exp2_approximate(x * -log2_e)); }
__device__ inline double silu(double x) { return x / (1 + ::exp(-x)); }

}  // namespace zamba::detail
