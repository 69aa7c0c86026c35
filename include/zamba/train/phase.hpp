// SPDX-License-Identifier: MIT
// Phase: a part of training, as data.
//
//   {.name = "pretraining", .tokens = 950'000'000'000,
//    .rate = LearningRate::warm_up(1.5e-4, {.fraction = 0.01}).then(LearningRate::cosine(1.5e-4, 7.5e-5)),
//    .mixture = {{TokenRange::whole(web), 1, "web"}}}
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <zamba/data/mixture.hpp>
#include <zamba/state.hpp>
#include <zamba/train/schedule.hpp>

namespace zamba {

struct Phase {
  std::string name;
  Index tokens = 0;   // rounded up to whole steps
  LearningRate rate;  // a function of the tokens of this phase
  std::vector<MixtureSource> mixture;
};

namespace detail {

/// A hash of tokens spread evenly over a range: equal for equal texts, and cheap for files of any size.
inline std::uint64_t fingerprint(const TokenRange& range) {
  constexpr Index samples = 4096;
  Hash hash;
  hash.add(range.size());
  hash.add(Index{range.file->document_end().value_or(-1)});
  const Index step = range.size() / samples + 1;
  for (Index at = range.first; at < range.last; at += step) hash.add(Index{(*range.file)[at]});
  return hash.value();
}

}  // namespace detail
}  // namespace zamba
