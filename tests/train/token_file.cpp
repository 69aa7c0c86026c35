// SPDX-License-Identifier: MIT
#include <vector>

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <tests/support/temporary_folder.hpp>
#include <zamba/train/token_file.hpp>

using zamba::Index;
using zamba::Token;
using zamba::TokenFile;
using zamba::TokenRange;
using zamba::TokenWidth;

TEST_SUITE("train/token_file") {
  TEST_CASE("the bytes are little-endian ids and nothing else") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    const std::vector<Token> tokens = {0, 1, 258, 65535};
    zamba::write_token_file(path, tokens, TokenWidth::u16);
    CHECK(zamba_test::read_text(path) == std::string("\0\0\1\0\2\1\xff\xff", 8));
    zamba::write_token_file(path, std::vector<Token>{67305985, 2147483647}, TokenWidth::u32);
    CHECK(zamba_test::read_text(path) == std::string("\1\2\3\4\xff\xff\xff\x7f", 8));
  }

  TEST_CASE("reading gives back what was written, in both widths") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    std::vector<Token> tokens(70000);
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<Token>(i * 7919 % 65536);
    for (const TokenWidth width : {TokenWidth::u16, TokenWidth::u32}) {
      zamba::write_token_file(path, tokens, width);
      const TokenFile file = TokenFile::open(path, width, 5);
      CHECK(file.size() == 70000);
      CHECK(file.document_end() == 5);
      std::vector<Token> read(tokens.size());
      file.copy(0, read);
      CHECK(read == tokens);
      std::vector<Token> window(3);
      file.copy(69997, window);
      CHECK(window == std::vector<Token>(tokens.end() - 3, tokens.end()));
      CHECK(file[12345] == tokens[12345]);
      file.copy(70000, {});
      CHECK_THROWS_WITH(
          file.copy(69998, window),
          ("zamba: TokenFile '" + path.string() + "': wanted 3 tokens from position 69998 on, of 70000").c_str());
      CHECK_THROWS_AS(file.copy(-1, window), zamba::Error);
      CHECK_THROWS_AS(file.copy(INT64_MAX, window), zamba::Error);
    }
    zamba::write_token_file(path, {}, TokenWidth::u16);
    CHECK(TokenFile::open(path, TokenWidth::u16).size() == 0);
  }

  TEST_CASE("files that are not token files are refused") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    CHECK_THROWS_WITH(TokenFile::open(path, TokenWidth::u16),
                      ("zamba: cannot open '" + path.string() + "': No such file or directory").c_str());
    zamba_test::write_text(path, "123456");
    CHECK(TokenFile::open(path, TokenWidth::u16).size() == 3);
    CHECK_THROWS_WITH(
        TokenFile::open(path, TokenWidth::u32),
        ("zamba: TokenFile '" + path.string() + "': 6 bytes are not a whole number of 32-bit tokens").c_str());
    CHECK_THROWS_AS(TokenFile::open(path, TokenWidth::u16, -2), zamba::Error);
    const auto pipe = folder.path / "pipe";
    REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
    CHECK_THROWS_WITH(TokenFile::open(pipe, TokenWidth::u16),
                      ("zamba: cannot read '" + pipe.string() + "': wanted a regular file, came a pipe").c_str());
  }

  TEST_CASE("an id too large for the width is refused, and the old file stays") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    zamba::write_token_file(path, std::vector<Token>{1, 2}, TokenWidth::u16);
    CHECK_THROWS_WITH(
        zamba::write_token_file(path, std::vector<Token>{3, 65536}, TokenWidth::u16),
        ("zamba: cannot write '" + path.string() + "': token 1 is 65536, and 16 bits hold 0 to 65535").c_str());
    CHECK_THROWS_AS(zamba::write_token_file(path, std::vector<Token>{-1}, TokenWidth::u32), zamba::Error);
    CHECK(TokenFile::open(path, TokenWidth::u16)[1] == 2);
  }

  TEST_CASE("check_vocabulary names the first id outside") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    zamba::write_token_file(path, std::vector<Token>{3, 256, 255, 300}, TokenWidth::u16);
    const TokenFile file = TokenFile::open(path, TokenWidth::u16);
    CHECK_NOTHROW(file.check_vocabulary(301));
    CHECK_THROWS_WITH(file.check_vocabulary(256), ("zamba: TokenFile '" + path.string() +
                                                   "': token 1 is 256, outside a vocabulary of 256; wrong width or "
                                                   "wrong tokenizer?")
                                                      .c_str());
    CHECK_THROWS_AS(file.check_vocabulary(300), zamba::Error);
    zamba_test::write_text(path, "\xff\xff\xff\xff");  // negative as a Token, but no token id
    CHECK_THROWS_AS(TokenFile::open(path, TokenWidth::u32).check_vocabulary(2147483647), zamba::Error);
  }

  TEST_CASE("a split covers the range, and cuts between documents where it can") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    std::vector<Token> tokens(100, 1);
    tokens[83] = 0;
    zamba::write_token_file(path, tokens, TokenWidth::u16);
    const TokenFile plain = TokenFile::open(path, TokenWidth::u16);
    const TokenFile documents = TokenFile::open(path, TokenWidth::u16, 0);
    const auto check = [](const zamba::TrainHeldOut& parts, Index first, Index cut, Index last) {
      CHECK(parts.train.first == first);
      CHECK(parts.train.last == cut);
      CHECK(parts.held_out.first == cut);
      CHECK(parts.held_out.last == last);
    };
    check(zamba::split(TokenRange::whole(plain), 0.2), 0, 80, 100);
    check(zamba::split(TokenRange::whole(documents), 0.2), 0, 84, 100);
    check(zamba::split(TokenRange::whole(documents), 0.16), 0, 84, 100);  // on the boundary already
    check(zamba::split(TokenRange::whole(documents), 0.22), 0, 84, 100);
    check(zamba::split(TokenRange::whole(documents), 0.5), 0, 50, 100);  // the boundary is 34 away, more than 25
    check(zamba::split(TokenRange::whole(documents), 0.1), 0, 90, 100);  // it lies before the cut
    check(zamba::split({&documents, 40, 90}, 0.2), 40, 84, 90);
    CHECK_THROWS_AS(zamba::split(TokenRange::whole(plain), 0), zamba::Error);
    CHECK_THROWS_AS(zamba::split(TokenRange::whole(plain), 1), zamba::Error);
    CHECK_THROWS_WITH(zamba::split(TokenRange::whole(plain), 0.001),
                      "zamba: split: 0.001 of 100 tokens leaves one side empty");
    CHECK_THROWS_WITH(TokenRange{}.check(), "zamba: TokenRange: there is no file");
    CHECK_THROWS_WITH((TokenRange{&plain, 50, 101}.check()),
                      ("zamba: TokenRange: [50, 101) is no part of the 100 tokens of '" + path.string() + "'").c_str());
  }
}
