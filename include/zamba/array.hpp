// SPDX-License-Identifier: MIT
// Subscripts of type Index for the standard containers, which count unsigned.
#pragma once

#include <array>
#include <cstddef>

#include <zamba/device.hpp>

namespace zamba::detail {

/// An element of a vector, span or the like.
template <class Container>
constexpr decltype(auto) item(Container&& container, Index i) {
  return container[static_cast<std::size_t>(i)];
}

/// std::array of N elements, N and subscripts being of type Index.
template <class T, Index N>
struct Array : std::array<T, static_cast<std::size_t>(N)> {
  using Base = std::array<T, static_cast<std::size_t>(N)>;
  constexpr T& operator[](Index i) { return Base::operator[](static_cast<std::size_t>(i)); }
  constexpr const T& operator[](Index i) const { return Base::operator[](static_cast<std::size_t>(i)); }
};

}  // namespace zamba::detail
