// SPDX-License-Identifier: MIT
// Scaled<Code>: integers with one scale a row, a weight type that is no plain number. A weight is scale * code; a row
// is its codes, then the scale, padded so that scales are aligned.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include <zamba/kernel/simd.hpp>
#include <zamba/weight.hpp>

namespace zamba_test {

using zamba::Index, zamba::Tensor;

template <class Code>
struct Scaled {
  static constexpr Index largest = std::numeric_limits<Code>::max();

  static constexpr Index codes_bytes(Index cols) { return zamba::ceil_div(cols, Index{4}) * 4; }
  static constexpr Index row_bytes(Index cols) { return codes_bytes(cols) + Index{sizeof(float)}; }
};

template <class Code, int Rank>
struct ScaledView {
  static constexpr int rank = Rank;

  const std::byte* data = nullptr;
  Tensor<const Code, Rank> codes;    // (..., rows, cols)
  Tensor<const float, Rank> scales;  // (..., rows, 1)

  ScaledView() = default;
  template <class... Extents>
  ScaledView(const std::byte* first, Extents... extents)
      : data(first), codes(reinterpret_cast<const Code*>(first), extents...) {
    const Index bytes = Scaled<Code>::row_bytes(cols());
    scales = {reinterpret_cast<const float*>(first + Scaled<Code>::codes_bytes(cols())), extents...};
    scales.shape[Rank - 1] = 1;
    for (int i = Rank - 2, rows = 1; i >= 0; rows *= static_cast<int>(codes.shape[i--])) {
      codes.stride[i] = rows * bytes;
      scales.stride[i] = codes.stride[i] / Index{sizeof(float)};
    }
  }
  ScaledView(const std::byte* first, const Tensor<const Code, Rank>& some, const Tensor<const float, Rank>& of)
      : data(first), codes(some), scales(of) {}

  explicit operator bool() const { return data != nullptr; }
  Index rows() const { return codes.rows(); }
  Index cols() const { return codes.cols(); }
  Index size() const { return codes.size(); }
  auto operator[](Index i) const { return ScaledView<Code, Rank - 1>(data, codes[i], scales[i]); }
  ScaledView slice(Index first, Index count) const {
    return {data, codes.slice(first, count), scales.slice(first, count)};
  }
  ScaledView columns(Index first, Index count) const { return {data, codes.columns(first, count), scales}; }

  template <class A>
  zamba::kernel::Pack<A> load(Index o, Index k, Index count) const {
    A values[zamba::kernel::lanes<A>] = {};
    for (Index i = 0; i < std::min(count, zamba::kernel::lanes<A>); ++i)
      values[i] = static_cast<A>(scales(o, Index{0})) * static_cast<A>(codes(o, k + i));
    return zamba::kernel::load(values);
  }
};

}  // namespace zamba_test

template <class Code>
struct zamba::WeightTraits<zamba_test::Scaled<Code>> {
  using Type = zamba_test::Scaled<Code>;
  template <class, int Rank>
  using View = zamba_test::ScaledView<Code, Rank>;

  static constexpr std::size_t row_bytes(Index cols) { return static_cast<std::size_t>(Type::row_bytes(cols)); }

  static void encode(const double* values, Index cols, std::byte* row) {
    double greatest = 0;
    for (Index k = 0; k < cols; ++k) greatest = std::max(greatest, std::abs(values[k]));
    float& scale = *reinterpret_cast<float*>(row + Type::codes_bytes(cols));
    scale = static_cast<float>(greatest / Type::largest);
    for (Index k = 0; k < cols; ++k)
      reinterpret_cast<Code*>(row)[k] = static_cast<Code>(scale > 0 ? std::lround(values[k] / scale) : 0);
  }
  static void decode(const std::byte* row, Index cols, double* values) {
    const double scale = *reinterpret_cast<const float*>(row + Type::codes_bytes(cols));
    for (Index k = 0; k < cols; ++k) values[k] = scale * reinterpret_cast<const Code*>(row)[k];
  }
};
