# SPDX-License-Identifier: MIT
"""Writes include/zamba/text/unicode/classes_table.hpp and unicode_compositions.hpp: unicode_tables.py include/zamba/detail

The characters are those of the PyPI package `unicodedata2`, whose major version is that of Unicode; it lacks two
properties, which the package `regex` has: pip install unicodedata2==16.0.0 regex==2024.11.6
"""

import sys
from pathlib import Path

import regex
import unicodedata2 as database

target = Path(sys.argv[1])
version = ".".join(database.unidata_version.split(".")[:2])
codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
category = {code: database.category(chr(code)) for code in codes}


def property_of(name):
    pattern = regex.compile(r"\p{" + name + "}")
    return {code for code in codes if pattern.fullmatch(chr(code))}


for name in set(category.values()):
    assert property_of(name) == {code for code in codes if category[code] == name}, "regex is of another Unicode"


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
    return merged((code, code) for code in codes if accept(code))


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


alphabetic = property_of("Alphabetic") | property_of("Join_Control")
is_word = lambda code: code in alphabetic or category[code][0] == "M" or category[code] in ("Nd", "Pc")
write(
    "unicode_classes.hpp",
    f"// Classes of characters after Unicode {version}: letters (L), numbers (N), and what else a word may consist of\n"
    "// (UTS 18: Alphabetic, M, Nd, Pc, Join_Control).\n",
    "struct CodeRange {\n  char32_t first, last;\n};\n",
    [
        table("CodeRange letters", ranges_where(lambda code: category[code][0] == "L")),
        table("CodeRange numbers", ranges_where(lambda code: category[code][0] == "N")),
        table(
            "CodeRange numbers_of_words", ranges_where(lambda code: category[code][0] == "N" and is_word(code))
        ),
        table(
            "CodeRange others_of_words", ranges_where(lambda code: category[code][0] not in "LN" and is_word(code))
        ),
    ],
)

decomposition = {code: database.decomposition(chr(code)) for code in codes}
canonical = [
    (code, *(int(part, 16) for part in text.split())) for code, text in decomposition.items() if text and text[0] != "<"
]
excluded = {row[0] for row in canonical if database.normalize("NFC", chr(row[0])) != chr(row[0])}
write(
    "unicode_compositions.hpp",
    f"// Canonical decompositions, compositions and combining classes after Unicode {version}, for normal form C. Hangul\n"
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
            merged((code, code, value) for code in codes if (value := database.combining(chr(code)))),
        ),
    ],
)
