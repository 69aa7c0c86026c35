// SPDX-License-Identifier: MIT
// DryRun<Device>: a device on which nothing is computed. What runs on it takes its scratch from an arena that only
// counts, so a pass, forward or backward, tells how much memory it needs on Device before any is taken.
//
// A block runs on it as it is. Its operators do nothing but take what the scratch() of their version for Device takes.
// So an operator takes part by two things:
//   scratch(ctx, the arguments of an entry)   static, in a version that needs scratch: takes it from ctx.arena(), of
//                                             Device or of DryRun<Device>, reads extents only, and counts on the worst
//                                             lengths of rows that such a batch may have. backward_scratch is that
//                                             of the entries for gradients. The version itself takes its scratch by
//                                             them, so that they cannot say less
//   an entry of a name that is listed here    forward, or another of DryOperator's, where an operator has two forms of
//                                             the same types; a new name is one line there
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include <zamba/context.hpp>
#include <zamba/op.hpp>

namespace zamba {

namespace detail {

template <class Device>
struct DryRun {};

}  // namespace detail

/// Views into no memory: their addresses differ, and nobody reads or writes there.
template <class Device>
class Arena<detail::DryRun<Device>> {
 public:
  using Mark = std::size_t;

  template <class T, class... Extents>
  Tensor<T, static_cast<int>(sizeof...(Extents))> tensor(Extents... extents) {
    const std::size_t at = used_;
    used_ += align_up(std::max<std::size_t>(detail::checked_bytes(sizeof(T), extents...), 1));
    require(used_ < std::size_t{1} << 62, "workspace: more memory than can be addressed");
    peak_ = std::max(peak_, used_);
    return {reinterpret_cast<T*>(alignment + at), extents...};
  }

  Mark mark() const { return used_; }
  void rewind(Mark mark) { used_ = mark; }
  /// The most bytes that were taken at once.
  std::size_t peak() const { return peak_; }

 private:
  std::size_t used_ = 0, peak_ = 0;
};

template <class Device>
class Context<detail::DryRun<Device>> {
 public:
  explicit Context(int threads) : threads_(threads) {}

  int threads() const { return threads_; }
  /// Of a block on CUDA, from compute capability 9.0 on: versions that take another way with less are not counted.
  static constexpr std::size_t most_shared() { return 227 << 10; }
  Arena<detail::DryRun<Device>>& arena() { return arena_; }
  Arena<detail::DryRun<Device>>& host_arena() { return DeviceTraits<Device>::host_reads ? arena_ : host_arena_; }
  template <class T>
  const T* readable(const T* host, Index count) {
    return DeviceTraits<Device>::host_reads ? host : arena_.template tensor<T>(count).data;
  }

  template <class T, int Rank>
  void copy(Tensor<T, Rank>, std::type_identity_t<Tensor<std::remove_const_t<T>, Rank>>) {}
  template <class T, int Rank>
  void fill(Tensor<T, Rank>, T) {}
  template <class T, int Rank>
  void zero(Tensor<T, Rank>) {}
  template <class F>
  void parallel_for(Index, F&&) {
    static_assert(
        detail::no_version_for<F>,
        "zamba::Context: a block that says 'by_operators = true' calls parallel_for: that is computing of its "
        "own, which belongs into an operator");
  }

 private:
  int threads_;
  Arena<detail::DryRun<Device>> arena_, host_arena_;
};

namespace detail {

/// In place of what an entry returns: a value of any type, which says nothing.
struct DryResult {
  template <class T>
  operator T() const {
    return {};
  }
};

/// The functions of Operator<DryRun<Device>>, under all the names that operators have for them.
template <template <class> class Operator, class Device>
struct DryOperator {
#define ZAMBA_DRY_ENTRY(name, scratch)                                                 \
  template <class... Types, class... Arguments>                                        \
  static DryResult name(Context<DryRun<Device>>& ctx, const Arguments&... arguments) { \
    ArenaScope scope(ctx.arena());                                                     \
    if constexpr (requires { Operator<Device>::scratch(ctx, arguments...); })          \
      Operator<Device>::scratch(ctx, arguments...);                                    \
    return {};                                                                         \
  }
  ZAMBA_DRY_ENTRY(forward, scratch)
  ZAMBA_DRY_ENTRY(concat_forward, scratch)
  ZAMBA_DRY_ENTRY(forward_heads, scratch)
  ZAMBA_DRY_ENTRY(turn, scratch)
  ZAMBA_DRY_ENTRY(backward, backward_scratch)
  ZAMBA_DRY_ENTRY(concat_backward, backward_scratch)
  ZAMBA_DRY_ENTRY(backward_heads, backward_scratch)
  ZAMBA_DRY_ENTRY(sum_of_squares, scratch)
#undef ZAMBA_DRY_ENTRY
};

}  // namespace detail

}  // namespace zamba
