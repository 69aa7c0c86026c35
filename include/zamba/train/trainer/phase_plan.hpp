// SPDX-License-Identifier: MIT
// PhasePlan: the phases of a run in steps, which text each draws from, and what of them decides a run's numbers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <zamba/data/mixture.hpp>
#include <zamba/error.hpp>
#include <zamba/io/line_plot.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/train/phase.hpp>

namespace zamba::detail {

class PhasePlan {
 public:
  /// length: of a row. Throws for phases that make no sense, naming them.
  PhasePlan(std::vector<Phase> phases, Index tokens_per_step, Index length);

  const std::vector<Phase>& phases() const { return phases_; }
  const Mixture& mixture(std::size_t phase) const { return mixtures_[phase]; }
  Index steps() const { return ends_.back(); }
  /// The number of steps after which a phase has ended.
  Index end(std::size_t phase) const { return ends_[phase]; }
  bool ends_at(Index step) const { return std::binary_search(ends_.begin(), ends_.end(), step); }

  /// After so many steps: the phase of the next one, its learning rate, and how many phases have begun.
  std::size_t phase_at(Index step) const {
    return static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end() - 1, step) - ends_.begin());
  }
  double rate_at(Index step) const {
    const std::size_t now = phase_at(step);
    return phases_[now].rate.at((step - begin(now)) * tokens_per_step_, phases_[now].tokens);
  }
  std::size_t begun_at(Index step) const {
    std::size_t count = 1;
    while (count < phases_.size() && begin(count) < step) ++count;
    return count;
  }

  /// Reads every text once, as far as it is used; held_out: one more, where it has a file.
  void check_texts(const TokenRange& held_out, Index vocabulary) const;
  /// Adds all that decides the numbers of the phases begun so far. Phases that did not begin yet may still be changed.
  void describe(Index step, Metadata& text) const;
  /// Those begun so far, over the tokens of the run.
  std::vector<PlotBand> bands(Index step) const;

 private:
  Index begin(std::size_t phase) const { return phase > 0 ? ends_[phase - 1] : 0; }

  std::vector<Phase> phases_;
  std::vector<Mixture> mixtures_;  // of each phase
  std::vector<Index> ends_;        // in steps
  Index tokens_per_step_;
};

inline PhasePlan::PhasePlan(std::vector<Phase> phases, Index tokens_per_step, Index length)
    : phases_(std::move(phases)), tokens_per_step_(tokens_per_step) {
  require(!phases_.empty(), "Trainer: there is no phase");
  constexpr Index most = std::numeric_limits<Index>::max() / 2;
  Index steps = 0;
  for (const Phase& phase : phases_) {
    require(phase.tokens > 0, "Trainer: phase '", phase.name, "' must have a positive number of tokens, got ",
            phase.tokens);
    phase.rate.check(phase.tokens);
    if (phase.tokens <= most) steps += phase.tokens / tokens_per_step + (phase.tokens % tokens_per_step != 0);
    require(phase.tokens <= most && steps <= most / tokens_per_step, "Trainer: phase '", phase.name, "' ends beyond ",
            most, " tokens");
    ends_.push_back(steps);
    mixtures_.emplace_back(phase.mixture);
    mixtures_.back().check(length);
    json_text(phase.name);  // names go to the checkpoint's metadata: throws where they could not
    for (const MixtureSource& source : phase.mixture) json_text(source.name);
  }
}

inline void PhasePlan::check_texts(const TokenRange& held_out, Index vocabulary) const {
  std::vector<TokenRange> ranges;
  const auto add = [&](const TokenRange& range, const std::string& what) {
    range.check();
    const std::string path = range.file->path().string();
    const Token end = range.file->document_end().value_or(0);
    require(end < vocabulary, "Trainer: the document end of '", path, "' is ", end,
            ", outside the model's vocabulary of ", vocabulary);
    require(range.has_target(), "Trainer: ", what, " ('", path, "' from ", range.first, " to ", range.last,
            ") has no target: there is no token that another one follows in its document");
    ranges.push_back(range);
  };
  for (const Phase& phase : phases_)
    for (const MixtureSource& source : phase.mixture)
      add(source.range, "'" + source.name + "' of phase '" + phase.name + "'");
  if (held_out.file) add(held_out, "the held_out text");
  check_vocabulary(std::move(ranges), vocabulary);
}

inline void PhasePlan::describe(Index step, Metadata& text) const {
  for (std::size_t i = 0; i < begun_at(step); ++i) {
    const std::string key = "phase " + std::to_string(i + 1) + ".";
    text[key + "name"] = phases_[i].name;
    text[key + "tokens"] = std::to_string(phases_[i].tokens);
    text[key + "rate"] = phases_[i].rate.str();
    text[key + "mixture"] = mixtures_[i].str();
    for (const MixtureSource& source : mixtures_[i].sources()) {
      std::string& prints = text[key + "text of " + source.name];  // names may be equal
      prints += (prints.empty() ? "" : " ") + std::to_string(fingerprint(source.range));
    }
  }
}

inline std::vector<PlotBand> PhasePlan::bands(Index step) const {
  std::vector<PlotBand> bands;
  for (std::size_t i = 0; i < begun_at(step); ++i)
    bands.push_back({phases_[i].name, static_cast<double>(begin(i) * tokens_per_step_),
                     static_cast<double>(end(i) * tokens_per_step_)});
  return bands;
}

}  // namespace zamba::detail
