// SPDX-License-Identifier: MIT
// How an operator is declared and found for a device, and which devices train.
//
// An operator `foo` is a struct template `Foo<Device>` of static functions (forward, backward, scratch) and free
// functions `foo(ctx, ...)` that call them:
//   ops/foo.hpp  declares the primary template, whose use is an error that names the missing header, specialises
//                Foo<cpu>, and defines the free functions that blocks call;
//   ops/foo.cuh  specialises Foo<cuda> with kernels and launchers.
// The specialisation is looked up when a block is instantiated, so the .cuh may be included after the block.
// A block's forward pass is run dry, too (dry_run.hpp): there Foo has the entries that DryOperator lists by name.
#pragma once

#include <zamba/device.hpp>

namespace zamba {

namespace detail {

/// False, but only once Device is known: for a static_assert in a primary template.
template <class Device>
inline constexpr bool no_version_for = false;

// Defined in dry_run.hpp.
template <class Device>
struct DryRun;
template <template <class> class Operator, class Device>
struct DryOperator;

struct NamedBackward {
  int backward;
};
template <class Version>
struct NamedTwice : Version, NamedBackward {};

}  // namespace detail

/// Whether a version of an operator, RmsNorm<cuda> say, has a function `backward`, whatever its arguments: beside
/// another of that name it would be ambiguous. For units that see the version.
template <class Version>
inline constexpr bool defines_backward = !requires {
  &detail::NamedTwice<Version>::backward;
};

// What training calls.
template <class Device>
struct AdamWStep;
template <class Device>
struct Add;
template <class Device>
struct Attention;
template <class Device>
struct CausalConv1d;
template <class Device>
struct CrossEntropy;
template <class Device>
struct Embedding;
template <class Device>
struct GatedActivation;
template <class Device>
struct GatedRmsNorm;
template <class Device>
struct Linear;
template <class Device>
struct RmsNorm;
template <class Device>
struct Rope;
template <class Device>
struct SelectiveScan;
template <class Device>
struct Ssd;

/// The same for units that do not see the version, as those of g++ that use a model on CUDA: stated here, and compared
/// with the kernels by zamba.cuh. Of Add and AdamWStep, which training alone calls, it is their forward pass.
template <template <class> class Operator, class Device>
inline constexpr bool has_backward = false;
template <template <class> class Operator>
inline constexpr bool has_backward<Operator, cpu> = true;
template <>
inline constexpr bool has_backward<AdamWStep, cuda> = true;
template <>
inline constexpr bool has_backward<Add, cuda> = true;
template <>
inline constexpr bool has_backward<Attention, cuda> = true;
template <>
inline constexpr bool has_backward<CausalConv1d, cuda> = true;
template <>
inline constexpr bool has_backward<CrossEntropy, cuda> = true;
template <>
inline constexpr bool has_backward<Embedding, cuda> = true;
template <>
inline constexpr bool has_backward<GatedActivation, cuda> = true;
template <>
inline constexpr bool has_backward<GatedRmsNorm, cuda> = true;
template <>
inline constexpr bool has_backward<Linear, cuda> = true;
template <>
inline constexpr bool has_backward<RmsNorm, cuda> = true;
template <>
inline constexpr bool has_backward<Rope, cuda> = true;  // by the function that is its forward pass
template <>
inline constexpr bool has_backward<SelectiveScan, cuda> = true;
template <>
inline constexpr bool has_backward<Ssd, cuda> = true;

namespace detail {

template <class Device, template <class> class... Operators>
inline constexpr bool have_backward = (has_backward<Operators, Device> && ...);

}  // namespace detail

/// Whether models train on a device: every operator has its backward pass there.
template <class Device>
inline constexpr bool trains =
    detail::have_backward<Device, AdamWStep, Add, Attention, CausalConv1d, CrossEntropy, Embedding, GatedActivation,
                          GatedRmsNorm, Linear, RmsNorm, Rope, SelectiveScan, Ssd>;

}  // namespace zamba

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
