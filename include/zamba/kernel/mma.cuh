// SPDX-License-Identifier: MIT
// Products of tensor cores by one warp, from compute capability 8.0 on (PTX ISA: mma.m16n8k16, ldmatrix). All lanes of
// a warp call each of them together.
//
// Fragments, with g = lane / 4 and t = lane % 4; each register holds two neighbouring bf16, the lower half first:
//   a (16 x 16)   {row g, columns 2t..}, {row g + 8, 2t..}, {row g, 2t + 8..}, {row g + 8, 2t + 8..}
//   b (16 x 8)    {rows 2t.., column g}, {rows 2t + 8.., column g}
//   c (16 x 8)    (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), in float
#pragma once

#include <zamba/kernel/async_copy.cuh>
#include <zamba/kernel/math.cuh>

namespace zamba::kernel {

/// c += a b
__device__ inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8 x 8 matrices of bf16 from shared memory: lane l names row l % 8 of matrix l / 8, 16 aligned bytes; it gets
/// elements 2t and 2t + 1 of row g of each.
__device__ inline void ldmatrix(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

/// The same of the matrices transposed: elements 2t and 2t + 1 of column g of each.
__device__ inline void ldmatrix_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace zamba::kernel
