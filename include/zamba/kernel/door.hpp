// SPDX-License-Identifier: MIT
// Door: what the free function of an operator checks in a checked build (checked.hpp): the shapes of its arguments.
//
//   if constexpr (checked) {
//     const kernel::Door door{"linear"};
//     door.shape("x", x, y.rows(), weight.cols());
//     door.optional("bias", bias, weight.rows());
//   }
#pragma once

#include <sstream>
#include <string>

#include <zamba/checked.hpp>
#include <zamba/tensor.hpp>

namespace zamba::kernel {

struct Door {
  const char* name;  // of the operator

  /// Throws unless the view has these extents, as in "zamba: linear: x is (5, 3), wanted (5, 4)".
  template <class T, int Rank, class... Extents>
  void shape(const char* argument, const Tensor<T, Rank>& view, Extents... extents) const {
    static_assert(sizeof...(Extents) == Rank);
    const Index wanted[] = {static_cast<Index>(extents)...};
    bool right = view.data || view.size() == 0;
    for (int i = 0; i < Rank; ++i) right = right && view.shape[i] == wanted[i];
    if (!right) fail(name, ": ", argument, " is ", text<Rank>(view.shape), ", wanted ", text<Rank>(wanted));
  }

  /// The same of a view that may be absent.
  template <class T, int Rank, class... Extents>
  void optional(const char* argument, const Tensor<T, Rank>& view, Extents... extents) const {
    if (view) shape(argument, view, extents...);
  }

 private:
  template <int Rank>
  static std::string text(const Index (&extents)[std::size_t{Rank}]) {
    std::ostringstream all;
    for (int i = 0; i < Rank; ++i) all << (i == 0 ? "(" : ", ") << extents[i];
    all << ")";
    return all.str();
  }
};

}  // namespace zamba::kernel
