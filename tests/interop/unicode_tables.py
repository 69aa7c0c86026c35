# SPDX-License-Identifier: MIT
"""Writes include/zamba/detail/unicode_classes.hpp and unicode_compositions.hpp from the Unicode character database, as
Debian's package unicode-data has it: unicode_tables.py /usr/share/unicode include/zamba/detail
"""

import re
import sys
from pathlib import Path

source, target = Path(sys.argv[1]), Path(sys.argv[2])
records = []  # first code, last code, category, combining class, decomposition
for row in (source / "UnicodeData.txt").read_text().splitlines():
    field = row.split(";")
    code = int(field[0], 16)
    if field[1].endswith("Last>"):
        records[-1][1] = code
    else:
        records.append([code, code, field[2], int(field[3]), field[5]])


def property_of(name, file):
    codes = set()
    for row in (source / file).read_text().splitlines():
        found = re.match(r"(\w+)(?:\.\.(\w+))?\s*;\s*" + name + r"\b", row)
        if found:
            codes.update(range(int(found[1], 16), int(found[2] or found[1], 16) + 1))
    return codes


def merged(ranges):
    """Ranges (first, last, *value) in order, neighbours of one value as one."""
    result = []
    for first, last, *value in ranges:
        if result and result[-1][1] + 1 == first and result[-1][2:] == value:
            result[-1][1] = last
        else:
            result.append([first, last, *value])
    return result


def ranges_where(accept):
    return merged((first, last) for first, last, category, _, _ in records if accept(first, category))


def table(declaration, rows):
    lines, line = [f"inline constexpr {declaration}[] = {{"], "   "
    for row in rows:
        text = " {" + ", ".join(f"0x{number:x}" for number in row) + "},"
        if len(line) + len(text) > 120:
            lines.append(line)
            line = "   "
        line += text
    return "\n".join(lines + [line, "};"])


def write(name, comment, structs, tables):
    (target / name).write_text(
        f"// SPDX-License-Identifier: MIT\n{comment}// Written by tests/interop/unicode_tables.py.\n#pragma once\n\n"
        f"namespace zamba::detail {{\n\n{structs}\n// clang-format off\n"
        + "\n\n".join(tables)
        + "\n// clang-format on\n\n}  // namespace zamba::detail\n"
    )


alphabetic = property_of("Alphabetic", "DerivedCoreProperties.txt") | property_of("Join_Control", "PropList.txt")
is_word = lambda first, category: first in alphabetic or category[0] == "M" or category in ("Nd", "Pc")
write(
    "unicode_classes.hpp",
    "// Classes of characters after Unicode 15.0: letters (L), numbers (N), and what else a word may consist of\n"
    "// (UTS 18: Alphabetic, M, Nd, Pc, Join_Control).\n",
    "struct CodeRange {\n  char32_t first, last;\n};\n",
    [
        table("CodeRange letters", ranges_where(lambda _, category: category[0] == "L")),
        table("CodeRange numbers", ranges_where(lambda _, category: category[0] == "N")),
        table(
            "CodeRange numbers_of_words", ranges_where(lambda c, category: category[0] == "N" and is_word(c, category))
        ),
        table(
            "CodeRange others_of_words",
            ranges_where(lambda c, category: category[0] not in "LN" and is_word(c, category)),
        ),
    ],
)

excluded = property_of("Full_Composition_Exclusion", "DerivedNormalizationProps.txt")
canonical = [
    (code, *(int(part, 16) for part in text.split())) for code, _, _, _, text in records if text and text[0] != "<"
]
write(
    "unicode_compositions.hpp",
    "// Canonical decompositions, compositions and combining classes after Unicode 15.0, for normal form C. Hangul\n"
    "// syllables, which follow from arithmetic, are left out.\n",
    "struct Composition {\n  char32_t composed, first, second;\n};\n\n"
    "struct Replacement {\n  char32_t from, to;\n};\n\n"
    "struct ClassRange {\n  char32_t first, last;\n  unsigned char combining_class;\n};\n",
    [
        table("Composition compositions", [row for row in canonical if row[0] not in excluded]),
        "// Taken apart, but never put together.\n"
        + table("Composition decompositions", [row for row in canonical if row[0] in excluded and len(row) == 3]),
        table("Replacement replacements", [row for row in canonical if len(row) == 2]),
        table(
            "ClassRange combining_classes",
            merged((first, last, value) for first, last, _, value, _ in records if value),
        ),
    ],
)
