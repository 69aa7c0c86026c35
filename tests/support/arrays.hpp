// SPDX-License-Identifier: MIT
// Arrays of seeded random numbers, contiguous and strided: in a device's memory, made from numbers of the host and read
// back, so that one test body serves all devices; and the host's own, whose elements a test sees and moves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include <zamba/buffer.hpp>
#include <zamba/number.hpp>
#include <zamba/random.hpp>
#include <zamba/tensor.hpp>
#include <zamba/testing/finite_differences.hpp>
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
      : PaddedMatrix(values, rows, static_cast<Index>(values.size()) / rows, padding) {}
  /// Of so many columns, and of no rows where there are no values.
  static PaddedMatrix of_width(const Values& values, Index cols, Index padding = 0) {
    return {values, static_cast<Index>(values.size()) / cols, cols, padding};
  }

  Matrix<T> view() const { return wide_.view(rows_, width_).columns(0, cols_); }
  /// The rows in so many equal parts, (count, rows / count, cols); nothing where there are no rows.
  Tensor<T, 3> parts(Index count) const {
    if (rows_ == 0) return {};
    return wide_.view(count, rows_ / count, width_).columns(0, cols_);
  }
  Vector<T> vector() const { return wide_.view(cols_); }

  Values values() const {
    const Values wide = wide_.values();
    Values values;
    for (Index i = 0; i < rows_; ++i)
      values.insert(values.end(), wide.begin() + i * width_, wide.begin() + i * width_ + cols_);
    return values;
  }

 private:
  PaddedMatrix(const Values& values, Index rows, Index cols, Index padding)
      : rows_(rows), cols_(cols), width_(cols + padding), wide_(padded(values)) {}

  Values padded(const Values& values) const {
    Values wide = nans(static_cast<std::size_t>(rows_ * width_));
    for (Index i = 0; i < rows_; ++i) std::copy_n(values.begin() + i * cols_, cols_, wide.begin() + i * width_);
    return wide;
  }

  Index rows_, cols_, width_;
  Array<Device, T> wide_;
};

/// Normal numbers as T, the same for the same stream.
template <class T>
std::vector<T> random_values(Index count, std::uint64_t stream) {
  std::vector<T> values;
  for (const double value : normal_values(count, stream))
    values.push_back(static_cast<T>(static_cast<compute_t<T>>(value)));
  return values;
}

/// Owned elements of a matrix whose rows lie `gap` elements apart from each other: a column slice of a wider one.
template <class T>
struct Strided {
  Strided(Index rows, Index cols, Index gap, std::uint64_t stream)
      : values(random_values<T>(rows * (cols + gap), stream)), view(values.data(), rows, cols + gap) {
    view = view.columns(gap / 2, cols);
  }
  Strided(const Strided&) = delete;
  std::vector<T> values;
  Matrix<T> view;
};

/// Of a matrix, by norm, against what the plain loop `wanted(i, j)` gives.
template <class T, class F>
double relative_error(Matrix<T> got, F&& wanted) {
  Values ours, theirs;
  for (Index i = 0; i < got.rows(); ++i)
    for (Index j = 0; j < got.cols(); ++j) {
      ours.push_back(static_cast<double>(got(i, j)));
      theirs.push_back(wanted(i, j));
    }
  return relative_error(ours, theirs);
}

}  // namespace zamba::testing
