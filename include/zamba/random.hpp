// SPDX-License-Identifier: MIT
// Random: seeded numbers that are the same on every platform and device, and for every order of drawing.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include <zamba/device.hpp>

namespace zamba {

/// What decides every random choice of a model, a run or a sampler.
struct Seed {
  std::uint64_t value = 0;
};

/// A counter-based stream: SplitMix64 (Steele, Lea, Flood 2014) over a key made of the seed and a stream number.
/// The standard library's engines are portable but its distributions are not, so those are here.
class Random {
 public:
  ZAMBA_HOST_DEVICE explicit Random(Seed seed, std::uint64_t stream = 0)
      : counter_(mix(seed.value + mix(stream + 1))) {}

  ZAMBA_HOST_DEVICE std::uint64_t bits() { return mix(counter_ += 0x9e3779b97f4a7c15u); }
  /// Uniform in [0, 1), with 53 bits.
  ZAMBA_HOST_DEVICE double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  /// Uniform in [0, count).
  Index below(Index count) { return static_cast<Index>(uniform() * static_cast<double>(count)); }
  /// Normal with mean 0 and deviation 1 (Box and Muller).
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

 private:
  ZAMBA_HOST_DEVICE static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  std::uint64_t counter_;
};

}  // namespace zamba
