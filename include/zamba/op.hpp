// SPDX-License-Identifier: MIT
// How an operator is declared and found for a device.
//
// An operator `foo` is a struct template `Foo<Device>` of static functions (forward, backward, step) and free functions
// `foo(ctx, ...)` that call them:
//   ops/foo.hpp  declares the primary template, whose use is an error that names the missing header, specialises
//   Foo<cpu>
//                and defines the free functions that blocks call;
//   ops/foo.cuh  specialises Foo<cuda> with kernels and launchers.
// The specialisation is looked up when a block is instantiated, so the .cuh may be included after the block.
#pragma once

namespace zamba::detail {

/// False, but only once Device is known: for a static_assert in a primary template.
template <class Device>
inline constexpr bool no_version_for = false;

// Defined in dry_run.hpp.
template <class Device>
struct DryRun;
template <template <class> class Operator, class Device>
struct DryOperator;

}  // namespace zamba::detail

/// Declares operator Name, found for a device by specialisation; `header` is the file that specialises it for cuda.
#define ZAMBA_DECLARE_OPERATOR(Name, header)                                                               \
  template <class Device>                                                                                  \
  struct Name {                                                                                            \
    static_assert(::zamba::detail::no_version_for<Device>,                                                 \
                  "zamba::" #Name " has no version for this device here: include <zamba/ops/" header       \
                  "> or <zamba/zamba.cuh> and compile with nvcc, or declare the model `extern template`"); \
  };                                                                                                       \
  template <class Device>                                                                                  \
  struct Name<::zamba::detail::DryRun<Device>> : ::zamba::detail::DryOperator<Name, Device> {}
