# SPDX-License-Identifier: MIT
# The README's lines, run by ../run_lines.sh in a folder that holds only this project, as zamba, and a program.cpp.
cmake -S zamba -B build && cmake --install build --prefix ~/.local
