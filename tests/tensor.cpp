// SPDX-License-Identifier: MIT
#include <zamba/tensor.hpp>

#include <numeric>
#include <vector>

#include <doctest/doctest.h>

using namespace zamba;

TEST_SUITE("tensor") {
  TEST_CASE("rows, slices and columns are views of the same memory") {
    std::vector<int> values(24);
    std::iota(values.begin(), values.end(), 0);
    const Tensor<int, 3> t(values.data(), 2, 3, 4);
    CHECK(t.size() == 24);
    CHECK(t.rows() == 2);
    CHECK(t.cols() == 4);
    CHECK(t(1, 2, 3) == 23);
    CHECK(t[1][2][3] == 23);
    CHECK(&t[1](0, 0) == values.data() + 12);
    CHECK(t.flat()[17] == 17);
    CHECK(t.as_matrix().rows() == 6);
    CHECK(t.as_matrix()(5, 1) == 21);
    const Matrix<int> part = t.as_matrix().slice(2, 3).columns(1, 2);
    CHECK(part.rows() == 3);
    CHECK(part.cols() == 2);
    CHECK(part(0, 0) == 9);
    CHECK(part(2, 1) == 18);
    part(2, 1) = -1;
    CHECK(values[18] == -1);
    const Matrix<const int> read_only = part;
    CHECK(read_only(2, 1) == -1);
    CHECK(t.slice(1, 1)(0, 0, 0) == 12);
  }

  TEST_CASE("a view of nothing is false") {
    CHECK_FALSE(Matrix<float>());
    CHECK(Matrix<float>().size() == 0);
    CHECK_FALSE(Matrix<float>().columns(3, 1));
    const Matrix<float> extents_alone(nullptr, 4, 5);
    CHECK_FALSE(extents_alone.slice(2, 1));
    CHECK_FALSE(extents_alone.columns(2, 1));
    float value = 0;
    CHECK(Vector<float>(&value, 1));
  }

  TEST_CASE("offsets have 64 bits") {
    const Matrix<char> huge(nullptr, Index{1} << 40, 1000);
    CHECK(huge.size() == 1000 * (Index{1} << 40));
    CHECK(huge.slice((Index{1} << 40) - 1, 1).stride[0] == 1000);
  }
}
