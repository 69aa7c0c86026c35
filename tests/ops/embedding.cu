// SPDX-License-Identifier: MIT
#include <zamba/ops/embedding.cuh>

#define ZAMBA_TEST_ON On<cpu, float>, On<cuda, float>, On<cuda, double>, On<cuda, bf16>
#include "embedding.cpp"

namespace {

/// Random tokens, of which three of four are one and the same where `skewed` says so.
std::vector<Token> tokens_of(Index count, Index vocabulary, bool skewed) {
  auto tokens = random_tokens(count, vocabulary);
  if (skewed)
    for (std::size_t i = 0; i < tokens.size(); ++i)
      if (i % 4 != 1) tokens[i] = static_cast<Token>(vocabulary / 2);
  return tokens;
}

/// Small integers, whose sums are exact in any order.
double integer(Index t, Index c) { return static_cast<double>((t * 7 + c * 3) % 5 - 2); }

template <class A>
void check_sums(const std::vector<Token>& tokens, Index vocabulary, Index width, Index gap) {
  using F = compute_t<A>;
  const auto count = static_cast<Index>(tokens.size());
  CAPTURE(count);
  CAPTURE(vocabulary);
  CAPTURE(width);
  Values rows, wanted;
  for (Index t = 0; t < count; ++t)
    for (Index c = 0; c < width; ++c) rows.push_back(integer(t, c));
  for (Index v = 0; v < vocabulary; ++v)
    for (Index c = 0; c < width; ++c) wanted.push_back(integer(v, c + 1));
  Context<cuda> ctx;
  const Array<cuda, Token> on_device(Values(tokens.begin(), tokens.end()));
  const PaddedMatrix<cuda, A> d_out(rows, count, gap);
  const PaddedMatrix<cuda, F> d_table(wanted, vocabulary, gap);
  for (std::size_t i = 0; i < rows.size(); ++i)
    wanted[static_cast<std::size_t>(tokens[i / static_cast<std::size_t>(width)]) * static_cast<std::size_t>(width) +
           i % static_cast<std::size_t>(width)] += rows[i];
  embedding_backward(ctx, on_device.view(count).data, count, d_out.view(), d_table.view());
  CHECK(d_table.values() == wanted);
}

TEST_CASE_TEMPLATE("embedding: gradients of any number of tokens, those of the most frequent one in pieces", A, float,
                   double, bf16) {
  // Pieces of 64 rows, sorted by 8 bits at a time in tiles of 1024, of which a block takes one up to 2^17 tokens.
  for (const Index count : {1, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 2049, 8200})
    for (const bool skewed : {false, true}) {
      check_sums<A>(tokens_of(count, 300, skewed), 300, 8, 8);
      check_sums<A>(tokens_of(count, 5, skewed), 5, 3, 1);
    }
  for (const Index vocabulary : {1, 2, 255, 256, 257, 65535, 65536, 65537})
    check_sums<A>(tokens_of(777, vocabulary, false), vocabulary, 8, 0);
  for (const Index count : {1 << 17, (1 << 17) + 1, 140001}) check_sums<A>(tokens_of(count, 300, true), 300, 3, 1);
  check_sums<A>(std::vector<Token>(8200, 6), 7, 40, 8);                     // one token alone
  check_sums<A>(tokens_of(300, 9, true), 9, 2064, 8);                       // of more than one block of columns
  check_sums<A>({299, 0, 299, 255, 256, 0, 298, 299, 1, 256}, 300, 16, 3);  // digits that differ in either place
}

TEST_CASE_TEMPLATE("embedding: a rerun of gradients is bit-equal, on another context and after other allocations", A,
                   float, double, bf16) {
  using F = compute_t<A>;
  const Index count = 3000, vocabulary = 50, width = 72;
  const auto tokens = tokens_of(count, vocabulary, true);
  const Array<cuda, Token> on_device(Values(tokens.begin(), tokens.end()));
  const Array<cuda, A> d_out(normal_values(count * width, 1));
  const auto run = [&](Index taken_before) {
    Context<cuda> ctx;
    ctx.arena().template tensor<std::byte>(taken_before);
    const Array<cuda, F> d_table(normal_values(vocabulary * width, 2));
    embedding_backward(ctx, on_device.view(count).data, count, d_out.view(count, width),
                       d_table.view(vocabulary, width));
    return d_table.values();
  };
  CHECK(run(5 << 20) == run(1));
}

TEST_CASE("embedding: gradients in tables and of rows of more than 2^31 elements") {
  const Index stride = Index{1} << 30, width = 8, rows = 3, elements = (rows - 1) * stride + width;
  if (Memory<cuda>::free_bytes() < static_cast<std::size_t>(elements) * (sizeof(float) + sizeof(bf16)) + (1 << 30)) {
    MESSAGE("skipped: not enough memory is free");
    return;
  }
  const Buffer<cuda> out(static_cast<std::size_t>(elements) * sizeof(bf16));
  const Buffer<cuda> table(static_cast<std::size_t>(elements) * sizeof(float));
  Matrix<bf16> d_out(reinterpret_cast<bf16*>(out.data()), rows, width);
  Matrix<float> d_table(reinterpret_cast<float*>(table.data()), rows, width);
  d_out.stride[0] = d_table.stride[0] = stride;
  Context<cuda> ctx;
  for (Index row = 0; row < rows; ++row) {
    ctx.fill(d_out[row], bf16(static_cast<float>(row + 1)));
    ctx.zero(d_table[row]);
  }
  const Array<cuda, Token> tokens({2, 0, 2});
  embedding_backward(ctx, tokens.view(rows).data, rows, d_out, d_table);
  std::vector<float> got(static_cast<std::size_t>(rows * width));
  Memory<cuda>::copy_pieces_to_host(got.data(), d_table.data, width * sizeof(float), rows,
                                    static_cast<std::size_t>(stride) * sizeof(float));
  for (Index i = 0; i < rows * width; ++i)
    CHECK(got[static_cast<std::size_t>(i)] == (i < width ? 2 : i < 2 * width ? 0 : 4));
}

}  // namespace
