// SPDX-License-Identifier: MIT
#include <string>
#include <vector>

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <tests/support/temporary_folder.hpp>
#include <zamba/data/token_file.hpp>

using zamba::Index;
using zamba::Token;
using zamba::TokenFile;
using zamba::TokenRange;
using zamba::TokenWidth;

TEST_SUITE("data/token_file") {
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

  TEST_CASE("check_vocabulary finds an id anywhere, in both widths, and each part of a file is read once") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    for (const TokenWidth width : {TokenWidth::u16, TokenWidth::u32})
      for (const Index at : {0, 1, 127, 128, 4095, 4096, 9'999, 10'000}) {
        std::vector<Token> tokens(10'001);
        for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<Token>(100 + i % 50);
        tokens[static_cast<std::size_t>(at)] = 150;
        zamba::write_token_file(path, tokens, width);
        const TokenFile file = TokenFile::open(path, width);
        CHECK_NOTHROW(file.check_vocabulary(151));
        const std::string message = "zamba: TokenFile '" + path.string() + "': token " + std::to_string(at) +
                                    " is 150, outside a vocabulary of 150; wrong width or wrong tokenizer?";
        CHECK_THROWS_WITH(file.check_vocabulary(150), message.c_str());
        CHECK_NOTHROW(file.check_vocabulary(150, 0, at));
        CHECK_NOTHROW(file.check_vocabulary(150, at + 1, 10'001));
        CHECK_THROWS_WITH(file.check_vocabulary(150, at, at + 1), message.c_str());
        using zamba::check_vocabulary;
        CHECK_NOTHROW(check_vocabulary({{&file, at + 1, 10'001}, {&file, 0, at}, {&file, at / 2, at}}, 150));
        CHECK_THROWS_WITH(check_vocabulary({{&file, 0, 10'001}, {&file, 0, at}}, 150), message.c_str());
      }
  }

  TEST_CASE("a file of 32-bit tokens is not opened as one of 16-bit tokens") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    const auto opens = [&](const std::vector<Token>& tokens, TokenWidth written, TokenWidth opened) {
      zamba::write_token_file(path, tokens, written);
      try {
        TokenFile::open(path, opened);
      } catch (const zamba::Error& error) {
        CHECK(std::string(error.what()) ==
              "zamba: TokenFile '" + path.string() +
                  "': opened as 16-bit tokens, every second one is nearly 0, as where the tokens are of 32 bits; "
                  "TokenWidth::u32?");
        return false;
      }
      return true;
    };
    for (const Token vocabulary : {7, 256, 50'280, 65'536, 151'936, 1'000'000})
      for (const Index size : {40, 3'000}) {
        CAPTURE(vocabulary);
        std::vector<Token> tokens(static_cast<std::size_t>(size));
        for (std::size_t i = 0; i < tokens.size(); ++i)
          tokens[i] = static_cast<Token>((i * 7'919 + i * i * 31) % static_cast<std::size_t>(vocabulary));
        CHECK(!opens(tokens, TokenWidth::u32, TokenWidth::u16));
        CHECK(opens(tokens, TokenWidth::u32, TokenWidth::u32));
        if (vocabulary <= 65'536) CHECK(opens(tokens, TokenWidth::u16, TokenWidth::u16));
      }
    // Texts that only look a little like it.
    CHECK(opens(std::vector<Token>(100, 0), TokenWidth::u16, TokenWidth::u16));
    CHECK(opens(std::vector<Token>(100, 5), TokenWidth::u16, TokenWidth::u16));
    CHECK(opens({7, 0, 8, 0, 9, 0}, TokenWidth::u16, TokenWidth::u16));
    std::vector<Token> nearly(100, 0);
    for (std::size_t i = 0; i < nearly.size(); i += 2) nearly[i] = 99;
    nearly[51] = 77;
    CHECK(opens(nearly, TokenWidth::u16, TokenWidth::u16));
    zamba::write_token_file(path, nearly, TokenWidth::u16);
    CHECK_THROWS_WITH(
        TokenFile::open(path, TokenWidth::u16, 65'536),
        ("zamba: TokenFile '" + path.string() + "': the document end is 65536, which 16 bits cannot hold").c_str());
  }

  TEST_CASE("a range has a target unless all but its last token are document ends") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a.bin";
    zamba::write_token_file(path, std::vector<Token>{0, 0, 0, 4, 0}, TokenWidth::u16);
    const TokenFile file = TokenFile::open(path, TokenWidth::u16, 0), plain = TokenFile::open(path, TokenWidth::u16);
    CHECK(TokenRange::whole(file).has_target());
    CHECK(!TokenRange{&file, 0, 3}.has_target());
    CHECK(!TokenRange{&file, 0, 4}.has_target());  // 4 is the last: nothing follows it here
    CHECK(TokenRange{&file, 3, 5}.has_target());
    CHECK(TokenRange{&plain, 0, 2}.has_target());
    CHECK(!TokenRange{&plain, 0, 1}.has_target());
    CHECK(!TokenRange{&plain, 2, 2}.has_target());
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
