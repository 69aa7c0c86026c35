// SPDX-License-Identifier: MIT
// The parameters that a block lists, with their places in memory: a table of entries, views bound into memory by it,
// and the gradients of them all.
#pragma once

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <zamba/block.hpp>
#include <zamba/buffer.hpp>
#include <zamba/number.hpp>
#include <zamba/weight.hpp>

namespace zamba {

/// A parameter of a model, as a saver or an optimiser sees it.
struct ParameterEntry {
  std::string name;
  std::vector<Index> shape;
  Index size = 0;
  Initializer initializer{};
  Decay decay = Decay::yes;
  bool precise = false;         // stored in compute_t<T>, not in weight_t<T>
  Index offset = 0;             // of its first element among all elements; a multiple of 64 bytes in every type
  std::size_t byte_offset = 0;  // of its first byte in the model's memory
  std::size_t bytes = 0;        // there

  /// Elements of a row, as WeightTraits counts them: its last extent.
  Index cols() const { return shape.back(); }
  /// Bytes at one position of its first extent.
  Index row_bytes() const { return static_cast<Index>(bytes) / shape.front(); }
};

namespace detail {

struct WeightTag {};
struct PreciseTag {};

/// The parameters of Net with their places in memory, in a model of T.
template <class Net, class T>
std::vector<ParameterEntry> list_parameters() {
  constexpr Index granule = static_cast<Index>(alignment) / 2;  // elements of the smallest type in `alignment` bytes
  std::vector<ParameterEntry> entries;
  typename Net::template Parameters<WeightTag, PreciseTag> parameters;
  Index offset = 0;
  std::size_t bytes = 0;
  visit_parameters<Net>(
      parameters, [&](const Name& name, auto& tensor, auto shape, Initializer initializer, Decay decay) {
        constexpr bool precise = std::is_same_v<std::remove_pointer_t<decltype(tensor.data)>, PreciseTag>;
        using Stored = std::conditional_t<precise, compute_t<T>, weight_t<T>>;
        const ParameterEntry& entry =
            entries.emplace_back(ParameterEntry{name.str(),
                                                {std::begin(shape.extent), std::end(shape.extent)},
                                                shape.size(),
                                                initializer,
                                                decay,
                                                precise,
                                                offset,
                                                bytes,
                                                weight_bytes<Stored>(shape.size(), *std::rbegin(shape.extent))});
        offset += ceil_div(entry.size, granule) * granule;
        bytes += align_up(entry.bytes);
      });
  return entries;
}

/// The values that parameter number i of a model begins with.
inline std::vector<double> initial_values(const ParameterEntry& entry, std::size_t i, Seed seed) {
  Random random(seed, i);
  std::vector<double> values(static_cast<std::size_t>(entry.size));
  for (Index k = 0; k < entry.size; ++k)
    values[static_cast<std::size_t>(k)] = entry.initializer(random, k, entry.shape.back());
  return values;
}

/// Points the views of `parameters` into memory: f(i) gives the first byte of the i-th.
template <class Net, class P, class F>
void bind_parameters(P& parameters, F&& first_byte) {
  std::size_t i = 0;
  visit_parameters<Net>(parameters, [&](const Name&, auto& view, auto shape, Initializer, Decay) {
    const auto data = reinterpret_cast<decltype(view.data)>(first_byte(i++));
    std::apply([&](auto... extents) { view = {data, extents...}; }, std::to_array(shape.extent));
  });
}

}  // namespace detail

/// Gradients of all parameters, float32 (float64 for double) whatever the storage type. They add up until zero() is
/// called.
template <class Net, class T, class Device>
class Gradients {
 public:
  using F = compute_t<T>;

  explicit Gradients(const std::vector<ParameterEntry>& entries) {
    const ParameterEntry& last = entries.back();
    count_ = last.offset + last.size;
    buffer_ = Buffer<Device>(static_cast<std::size_t>(count_) * sizeof(F));
    detail::bind_parameters<Net>(
        views_, [&](std::size_t i) { return buffer_.data() + entries[i].offset * static_cast<Index>(sizeof(F)); });
    zero();
  }

  void zero() { Memory<Device>::zero(buffer_.data(), buffer_.size()); }
  const typename Net::template Parameters<F, F>& views() const { return views_; }
  /// All elements, at the offsets of ParameterEntry; the gaps between parameters are zero.
  Vector<F> values() const { return {reinterpret_cast<F*>(buffer_.data()), count_}; }

 private:
  Index count_ = 0;
  Buffer<Device> buffer_;
  typename Net::template Parameters<F, F> views_;
};

}  // namespace zamba
