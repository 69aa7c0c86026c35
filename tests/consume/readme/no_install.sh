# SPDX-License-Identifier: MIT
g++ -std=c++20 -O2 -march=native -mmove-max=128 -mstore-max=128 -fopenmp -I zamba/include -I /usr/include/eigen3 program.cpp -o program
