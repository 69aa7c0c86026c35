// SPDX-License-Identifier: MIT
// What g++ 12 makes of a constant where AVX-512 is on; see numerics.md.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>

[[gnu::noinline]] void show(const std::int64_t* v) { std::printf("%ld %ld %ld %ld\n", v[0], v[1], v[2], v[3]); }

int main() {
  const std::int64_t constant[4] = {7, 7, 0, 0};
  auto* copy = static_cast<std::int64_t*>(::operator new(sizeof constant));
  std::memcpy(copy, constant, sizeof constant);
  show(copy);
}
