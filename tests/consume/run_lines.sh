#!/bin/sh
# SPDX-License-Identifier: MIT
# run_lines.sh SOURCE FOLDER LINES [fresh]: does what the file LINES says, as a user with a home of his own, and runs the
# program that comes out of it. fresh: in an empty folder, with copies of the project SOURCE and of program.cpp.
set -eu
source=$1 folder=$2 lines=$3
if [ "${4:-}" = fresh ]; then
  rm -rf "$folder"
  mkdir -p "$folder/zamba" "$folder/home"
  (cd "$source" && tar -cf - --exclude='./build*' --exclude=./.git .) | tar -xf - -C "$folder/zamba"
  cp "$source/tests/consume/program.cpp" "$folder"
fi
cd "$folder"
rm -f program
export HOME="$folder/home"
. "$lines"
[ ! -e program ] || ./program
