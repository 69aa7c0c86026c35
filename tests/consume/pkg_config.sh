#!/bin/sh
# SPDX-License-Identifier: MIT
# pkg_config.sh PKG_CONFIG COMPILER PREFIX PROGRAM: a build without CMake, by the flags of zamba.pc alone.
set -eu
here=$(dirname "$0")
export PKG_CONFIG_PATH="$3/share/pkgconfig"
flags=$("$1" --cflags --libs zamba)
case $flags in
  *-f* | *-m* | *-O* | *-W* | *-std*)
    echo "zamba.pc passes on compiler flags: $flags"
    exit 1
    ;;
esac
# shellcheck disable=SC2086  # flags are words
"$2" -std=c++20 "$here/program.cpp" $flags -o "$4"
"$4"
