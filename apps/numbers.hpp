// SPDX-License-Identifier: MIT
// Numbers and tables for people.
#pragma once

#include <algorithm>
#include <cstdio>
#include <ostream>
#include <string>
#include <vector>

#include <zamba/device.hpp>

namespace zamba_apps {

using zamba::Index;

/// "7,232,490,496".
inline std::string grouped(Index number) {
  std::string text = std::to_string(number);
  const int first_digit = number < 0;
  for (int at = static_cast<int>(text.size()) - 3; at > first_digit; at -= 3)
    text.insert(static_cast<std::size_t>(at), ",");
  return text;
}

/// Four digits of a number.
inline std::string rounded(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", number);
  return text;
}

/// "14.51 GB", in powers of 1000.
inline std::string bytes_text(double bytes) {
  const char* unit = "B";
  for (const char* next : {"kB", "MB", "GB", "TB"}) {
    if (bytes < 999.95) break;
    bytes /= 1000;
    unit = next;
  }
  return rounded(bytes) + " " + unit;
}

/// Rows of cells in columns: the first one on the left, the others on the right of their column.
inline void print_table(std::ostream& out, const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  }
  for (const auto& row : rows) {
    for (std::size_t c = 0; c < row.size(); ++c) {
      const std::string space(widths[c] - row[c].size(), ' ');
      out << (c ? "  " + space + row[c] : row.size() > 1 ? row[c] + space : row[c]);
    }
    out << "\n";
  }
}

}  // namespace zamba_apps
