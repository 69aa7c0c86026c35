// SPDX-License-Identifier: MIT
#include "generate.hpp"

int main(int argc, char** argv) {
  zamba_apps::Interrupt::listen();
  auto console = zamba_apps::Console::standard();
  return zamba_apps::generate(zamba_apps::arguments_of(argc, argv), zamba_apps::compiled_models(), console);
}
