// SPDX-License-Identifier: MIT
#include <zamba/io/json_lines.hpp>

#include <vector>

#include <doctest/doctest.h>
#include <tests/support/temporary_folder.hpp>
#include <zamba/error.hpp>

TEST_SUITE("io/json_lines") {
  TEST_CASE("lines that are not blank, by the numbers they have in the file") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "a";
    const auto lines = [&](const std::string& text) {
      zamba_test::write_text(path, text);
      std::vector<std::string> seen;
      const zamba::Index count = zamba::for_each_json_line(path, [&](std::string_view line, const std::string& place) {
        seen.push_back(place.substr(path.string().size()) + ": " + std::string(line));
      });
      CHECK(count == static_cast<zamba::Index>(seen.size()));
      return seen;
    };
    using Lines = std::vector<std::string>;
    CHECK(lines("").empty());
    CHECK(lines("\n \t\r\n").empty());
    CHECK(lines("{}") == Lines{", line 1: {}"});
    CHECK(lines("{}\n\n{\"a\": 1}\r\n x\n") == Lines{", line 1: {}", ", line 3: {\"a\": 1}\r", ", line 4:  x"});
    CHECK_THROWS_AS(zamba::for_each_json_line(folder.path / "b", [](auto, auto) {}), zamba::Error);
  }
}
