// SPDX-License-Identifier: MIT
// RadixSelect: radix select over ordered weights, by a thread block. It finds the token at which the cumulative count,
// or the cumulative mass, of the order by weight exceeds a target, without sorting: as radix sort from the most
// significant digit on, but going into one bin only.
//
//   digit 0      2048 bins over the upper 11 bits of 58: how many tokens, and their mass
//   prefix sum   over the bins; the bin in which the measure exceeds the target is the next place
//   digit 1..    the same for the tokens of that place, until they are one, or all equal
//
// A key is the bits of 1 less those of the weight, as integers: the larger a weight, the smaller its key. Masses are
// integers, so histograms by atomic additions are exact in every order. See generate/sampler.cuh.
#pragma once

#include <cstdint>

#include <zamba/kernel/block_reduce.cuh>
#include <zamba/kernel/block_scan.cuh>

namespace zamba::kernel {

/// How many tokens, and their mass.
struct Amount {
  unsigned count;
  std::uint64_t mass;

  __device__ Amount operator+(const Amount& other) const { return {count + other.count, mass + other.mass}; }
};

/// By what a search measures the order.
enum class Measure { count, mass };

/// The tokens of a row in the order of their weights, largest first and then by id, as a block of Threads sees them.
/// Weights are at most 1. All threads call each member, and the results are the same for all.
template <int Threads>
class RadixSelect {
  static constexpr int warps = Threads / warp_size;
  static constexpr int digit_bits = 11, bins = 1 << digit_bits;
  static_assert(bins == 2 * Threads, "zamba: a thread has two bins");

 public:
  /// Some tokens of equal weight, or one, or some without mass: those whose key, without its last `shift` bits, is
  /// `key`.
  struct Place {
    std::uint64_t key;
    int shift;
    Amount before, here;  // of all tokens that come earlier; of these

    __device__ std::uint64_t mass_of_one() const { return here.mass / here.count; }
  };
  struct Shared {
    unsigned counts[bins], low[bins], high[bins];  // of masses, 32 bits each
    Place found;
    std::uint64_t of_warps[warps];
  };

  __device__ RadixSelect(Shared& shared, const double* weights, int size, double whole)
      : shared_(shared), weights_(weights), size_(size), whole_(whole) {}

  __device__ std::uint64_t mass(double weight) const { return __double2ull_rn(weight * whole_); }
  /// Small for large weights; any two differ where the weights do.
  __device__ static std::uint64_t key(double weight) {
    return __double_as_longlong(1.0) - __double_as_longlong(weight);
  }

  /// Counts everything; to be called before find().
  __device__ Amount count_all() {
    first_ = histogram(0, Place{0, key_bits, {}, {}}, nullptr);
    return total_;
  }

  /// The token at which the measure of the order exceeds `target`, which is less than the whole.
  __device__ Place find(Measure measure, std::uint64_t target) {
    Place place{0, key_bits, {}, {}};
    descend(place, first_, 0, measure, target);
    for (int digit = 1; place.here.count > 1 && place.here.mass > 0 && place.shift > 0; ++digit) {
      bool equal = false;
      const Bins bins = histogram(digit, place, &equal);
      if (equal) {  // in all bits
        place = {shared_.found.key, 0, place.before, place.here};
        break;
      }
      descend(place, bins, digit, measure, target);
    }
    return place;
  }

  /// The sum of value(weight) over all tokens.
  template <class Value>
  __device__ std::uint64_t sum_by_id(Value value) {
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, part = size_ / warps;
    std::uint64_t sum = 0;
#pragma unroll 4
    for (int i = 2 * lane; i < part; i += 2 * warp_size) {
      const double2 two = *reinterpret_cast<const double2*>(weights_ + warp * part + i);
      sum += value(two.x) + value(two.y);
    }
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    __syncthreads();  // what an earlier call left has been read
    if (lane == 0) shared_.of_warps[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared_.of_warps[w];
    return sum;
  }
  /// After it: the token at which that sum exceeds `target`, known to one thread only; the others get -1.
  template <class Value>
  __device__ int find_by_id(std::uint64_t target, Value value) const {
    const int part = size_ / warps;
    int warp = 0;
    std::uint64_t before = 0;
    for (; before + shared_.of_warps[warp] <= target; ++warp) before += shared_.of_warps[warp];
    for (int i = threadIdx.x;; i += Threads) {
      const std::uint64_t mine = i < part ? value(weights_[warp * part + i]) : 0;
      std::uint64_t here;
      const std::uint64_t before_mine = before + block_exclusive_sum<Threads>(mine, here);
      if (before + here > target) return before_mine <= target && target < before_mine + mine ? warp * part + i : -1;
      before += here;
    }
  }

 private:
  /// Of weights of 2^-64 and more. Smaller ones have no mass, and share the last bin of the first histogram.
  static constexpr int key_bits = 58;

  /// A thread's two bins, and all that lie before them.
  struct Bins {
    Amount of[2], before;
  };

  /// Exact, in whatever order threads come: every overflow of the low half is seen by one of them.
  __device__ void add_to_bin(unsigned bin, const Amount& amount) {
    if (amount.count == 0) return;
    atomicAdd(&shared_.counts[bin], amount.count);
    const auto low = static_cast<unsigned>(amount.mass), high = static_cast<unsigned>(amount.mass >> 32);
    const unsigned before = atomicAdd(&shared_.low[bin], low), carry = before + low < low;
    if (high + carry > 0) atomicAdd(&shared_.high[bin], high + carry);
  }

  __device__ static int shift_of(int digit) { return ::max(key_bits - digit_bits * (digit + 1), 0); }

  /// The bins of a digit, for the tokens at `place`; whether all their keys are equal, where asked for, and
  /// then that key is in shared_.found.
  __device__ Bins histogram(int digit, const Place& place, bool* equal) {
    const int shift = shift_of(digit);
    const std::uint64_t mask = (std::uint64_t{1} << (place.shift - shift)) - 1;
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += Threads) {
      shared_.counts[bin] = 0;
      shared_.low[bin] = 0;
      shared_.high[bin] = 0;
    }
    __syncthreads();
    std::uint64_t least = ~std::uint64_t{0}, greatest = 0;
    unsigned bin = 0;
    Amount gathered{};  // for one bin, as neighbours may be in the same
    const auto take = [&](double weight) {
      const std::uint64_t k = key(weight);
      if (!(weight > 0) || (digit > 0 && k >> place.shift != place.key)) return;
      least = ::min(least, k);
      greatest = ::max(greatest, k);
      const auto next = static_cast<unsigned>(digit > 0 ? k >> shift & mask : ::min(k >> shift, mask));
      if (next != bin) {
        add_to_bin(bin, gathered);
        gathered = {};
        bin = next;
      }
      gathered = gathered + Amount{1, mass(weight)};
    };
#pragma unroll 4
    for (int i = 2 * threadIdx.x; i < size_; i += 2 * Threads) {
      const double2 two = *reinterpret_cast<const double2*>(weights_ + i);
      take(two.x);
      take(two.y);
    }
    add_to_bin(bin, gathered);
    if (equal) {
      least = block_min<Threads>(least);
      greatest = block_max<Threads>(greatest);
      *equal = least == greatest;
      if (threadIdx.x == 0) shared_.found.key = least;
    }
    __syncthreads();
    Bins bins;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int bin = 2 * threadIdx.x + i;
      bins.of[i] = {shared_.counts[bin], std::uint64_t{shared_.high[bin]} << 32 | shared_.low[bin]};
    }
    const Amount both = bins.of[0] + bins.of[1];
    bins.before.count = block_exclusive_sum<Threads>(both.count, total_.count);
    bins.before.mass = block_exclusive_sum<Threads>(both.mass, total_.mass);
    return bins;
  }

  /// Goes from `place` to the bin in which the measure exceeds `target`.
  __device__ void descend(Place& place, const Bins& bins, int digit, Measure measure, std::uint64_t target) {
    const auto of = [&](const Amount& amount) { return measure == Measure::count ? amount.count : amount.mass; };
    const int shift = shift_of(digit);
    __syncthreads();  // what was found before has been read
    Amount before = place.before + bins.before;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Amount after = before + bins.of[i];
      if (of(before) <= target && target < of(after))
        shared_.found = {place.key << (place.shift - shift) | (2 * threadIdx.x + i), shift, before, bins.of[i]};
      before = after;
    }
    __syncthreads();
    place = shared_.found;
  }

  Shared& shared_;
  const double* weights_;
  int size_;
  double whole_;
  Bins first_;
  Amount total_;  // of the last histogram
};

}  // namespace zamba::kernel
