// SPDX-License-Identifier: MIT
#include <string>
#include <vector>

#include <doctest/doctest.h>
#include <zamba/text/byte_tokenizer.hpp>

using zamba::ByteTokenizer;
using zamba::Token;

TEST_SUITE("text/byte_tokenizer") {
  TEST_CASE("every byte is its own value, and any bytes come back") {
    const ByteTokenizer tokenizer;
    CHECK(tokenizer.encode("Aé\n") == std::vector<Token>{65, 0xc3, 0xa9, 10});
    CHECK(tokenizer.encode("").empty());
    std::string all;
    for (int i = 0; i < 512; ++i) all.push_back(static_cast<char>(i));
    const std::vector<Token> tokens = tokenizer.encode(all);
    for (std::size_t i = 0; i < tokens.size(); ++i) CHECK(tokens[i] == static_cast<Token>(i % 256));
    CHECK(tokenizer.decode(tokens) == all);
  }

  TEST_CASE("a document ends with the document end and does not hold it") {
    CHECK(ByteTokenizer().encode_document("ab") == std::vector<Token>{97, 98, 0});
    CHECK(ByteTokenizer(10).encode_document("ab") == std::vector<Token>{97, 98, 10});
    CHECK(ByteTokenizer(10).document_end() == 10);
    CHECK_THROWS_WITH(ByteTokenizer(10).encode_document("ab\ncd"),
                      "zamba: ByteTokenizer: byte 2 of the document is 10, which ends documents");
    CHECK_THROWS_AS(ByteTokenizer(255).encode_document("\xff"), zamba::Error);
  }

  TEST_CASE("ids that are no bytes are refused") {
    CHECK_THROWS_WITH(ByteTokenizer().decode(std::vector<Token>{65, 256}),
                      "zamba: ByteTokenizer: token 1 is 256, not 0 to 255");
    CHECK_THROWS_AS(ByteTokenizer().decode(std::vector<Token>{-1}), zamba::Error);
    CHECK_THROWS_WITH(ByteTokenizer(256), "zamba: ByteTokenizer: the document end must be 0 to 255, got 256");
    CHECK_THROWS_AS(ByteTokenizer(-1), zamba::Error);
  }
}
