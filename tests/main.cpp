// SPDX-License-Identifier: MIT
// main of every test program. The CUDA one leaves with 77, "skipped" to ctest, on a machine without a GPU.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#ifdef ZAMBA_TEST_CUDA
#include <cstdio>

#include <cuda_runtime_api.h>
#endif

int main(int argc, char** argv) {
#ifdef ZAMBA_TEST_CUDA
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("skipped: this machine has no CUDA device");
    return 77;
  }
#endif
  return doctest::Context(argc, argv).run();
}
