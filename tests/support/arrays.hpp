// SPDX-License-Identifier: MIT
// Arrays in a device's memory, made from numbers of the host and read back: one test body for all devices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include <zamba/buffer.hpp>
#include <zamba/random.hpp>
#include <zamba/tensor.hpp>
#include <zamba/testing/report.hpp>

namespace zamba::testing {

using Values = std::vector<double>;

/// Normal numbers, the same for the same stream.
inline Values normal_values(Index count, std::uint64_t stream) {
  Random random(Seed{7}, stream);
  Values values;
  for (Index i = 0; i < count; ++i) values.push_back(random.normal());
  return values;
}

inline Values nans(std::size_t count) { return Values(count, std::numeric_limits<double>::quiet_NaN()); }

/// A copy of values, contiguous.
template <class Device, class T>
class Array {
 public:
  explicit Array(const Values& values)
      : buffer_(std::max<std::size_t>(values.size(), 1) * sizeof(T)), count_(values.size()) {
    std::vector<T> host;
    for (const double value : values) host.push_back(static_cast<T>(value));
    if (count_) Memory<Device>::copy_from_host(buffer_.data(), host.data(), count_ * sizeof(T));
  }

  template <class... Extents>
  Tensor<T, sizeof...(Extents)> view(Extents... extents) const {
    return {reinterpret_cast<T*>(buffer_.data()), extents...};
  }

  Values values() const {
    std::vector<T> host(count_);
    if (count_) Memory<Device>::copy_to_host(host.data(), buffer_.data(), count_ * sizeof(T));
    return Values(host.begin(), host.end());
  }

 private:
  Buffer<Device> buffer_;
  std::size_t count_;
};

/// A matrix inside a wider one, of which it is a slice of columns: `padding` NaNs follow each row.
template <class Device, class T>
class PaddedMatrix {
 public:
  PaddedMatrix(const Values& values, Index rows, Index padding = 0)
      : rows_(rows), cols_(static_cast<Index>(values.size()) / rows), width_(cols_ + padding), wide_(padded(values)) {}

  Matrix<T> view() const { return wide_.view(rows_, width_).columns(0, cols_); }
  Vector<T> vector() const { return wide_.view(cols_); }

  Values values() const {
    const Values wide = wide_.values();
    Values values;
    for (Index i = 0; i < rows_; ++i)
      values.insert(values.end(), wide.begin() + i * width_, wide.begin() + i * width_ + cols_);
    return values;
  }

 private:
  Values padded(const Values& values) const {
    Values wide = nans(static_cast<std::size_t>(rows_ * width_));
    for (Index i = 0; i < rows_; ++i) std::copy_n(values.begin() + i * cols_, cols_, wide.begin() + i * width_);
    return wide;
  }

  Index rows_, cols_, width_;
  Array<Device, T> wide_;
};

}  // namespace zamba::testing
