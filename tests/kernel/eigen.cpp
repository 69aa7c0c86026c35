// SPDX-License-Identifier: MIT
// Products in given scratch are the plain sums, of any shape and order, and stay within that scratch.
#include <zamba/kernel/eigen.hpp>

#include <algorithm>
#include <new>
#include <vector>

#include <doctest/doctest.h>

#include <zamba/buffer.hpp>
#include <zamba/random.hpp>
#include <zamba/testing/sanitized.hpp>

namespace {

using namespace zamba;

/// Small integers, whose sums are exact in any order.
template <class A>
std::vector<A> integers(Index count, std::uint64_t stream) {
  Random random(Seed{8}, stream);
  std::vector<A> values(static_cast<std::size_t>(count));
  for (A& value : values) value = static_cast<A>(random.below(7) - 3);
  return values;
}

/// y += a b, or y = a b, with either factor as it lies or transposed, all in rows that are further apart than they are
/// long.
template <class A>
void check_product(Index rows, Index depth, Index cols, bool left, bool right, bool add) {
  constexpr Index gap = 3;
  const auto strided = [](std::vector<A>& memory, Index n, Index width) {
    return Matrix<A>(memory.data(), n, width + gap).columns(0, width);
  };
  auto of_a = integers<A>((std::max(rows, depth)) * (std::max(rows, depth) + gap), 1);
  auto of_b = integers<A>((std::max(cols, depth)) * (std::max(cols, depth) + gap), 2);
  auto of_y = integers<A>(rows * (cols + gap), 3);
  auto wanted = of_y;
  const Matrix<A> a = left ? strided(of_a, depth, rows) : strided(of_a, rows, depth);
  const Matrix<A> b = right ? strided(of_b, cols, depth) : strided(of_b, depth, cols);
  const Matrix<A> y = strided(of_y, rows, cols);
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < cols; ++j) {
      A& sum = wanted[static_cast<std::size_t>(i * (cols + gap) + j)];
      if (!add) sum = 0;
      for (Index k = 0; k < depth; ++k) sum += (left ? a(k, i) : a(i, k)) * (right ? b(j, k) : b(k, j));
    }

  const Index size = kernel::product_scratch<A>(rows, depth, cols);
  const Buffer<cpu> buffer(static_cast<std::size_t>(size + 64) * sizeof(A));
  A* scratch = reinterpret_cast<A*>(buffer.data());
  std::fill_n(scratch, size + 64, A(12345));
  const auto run = [&](const auto& a_factor, const auto& b_factor) {
    add ? kernel::add_product(y, a_factor, b_factor, scratch) : kernel::set_product(y, a_factor, b_factor, scratch);
  };
  if (left && right) run(kernel::transposed(a), kernel::transposed(b));
  if (left && !right) run(kernel::transposed(a), b);
  if (!left && right) run(a, kernel::transposed(b));
  if (!left && !right) run(a, b);
  CHECK(of_y == wanted);
  CHECK(std::all_of(scratch + size, scratch + size + 64, [](A value) { return value == A(12345); }));
}

}  // namespace

TEST_CASE_TEMPLATE("eigen: products in given scratch are the plain sums", A, float, double) {
  const Index shapes[][3] = {{1, 1, 1},   {3, 4, 5},  {6, 7, 7},   {1, 40, 9}, {9, 40, 1},   {64, 16, 33},  {17, 1, 50},
                             {33, 65, 3}, {0, 5, 30}, {30, 0, 30}, {5, 30, 0}, {47, 48, 49}, {100, 300, 20}};
  for (const auto& [rows, depth, cols] : shapes)
    for (const bool left : {false, true})
      for (const bool right : {false, true})
        for (const bool add : {false, true}) check_product<A>(rows, depth, cols, left, right, add);
}

TEST_CASE_TEMPLATE("eigen: blocks that do not fit at once", A, float, double) {
  check_product<A>(700, 1100, 30, false, true, true);
  check_product<A>(20, 1100, 900, true, false, true);
  // Each of these extents is divided in a product above, too; all at once are most of what a sanitizer would multiply.
  if (!testing::sanitized) check_product<A>(600, 900, 600, false, false, false);
  check_product<A>(30, 6000, 70, true, true, true);
}
