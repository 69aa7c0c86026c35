# SPDX-License-Identifier: MIT
export PKG_CONFIG_PATH=~/.local/share/pkgconfig
g++ -std=c++20 -O2 -march=native -mmove-max=128 -mstore-max=128 -fopenmp $(pkg-config --cflags zamba) program.cpp -o program
