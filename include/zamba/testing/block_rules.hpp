// SPDX-License-Identifier: MIT
// The rules of docs/add_a_block.md that testing::conformance checks, and RuleReport, whose failed lines name one.
#pragma once

#include <string>

#include <zamba/testing/report.hpp>

namespace zamba::testing {

struct BlockRule {
  int number;
  const char* text;
};

/// In the words of docs/add_a_block.md.
namespace block_rules {

inline constexpr BlockRule listing{1, "every parameter is listed once, under a name of its own"},
    fresh{2, "a row with rows.start(row) == 0 begins from zero and does not read the state"},
    unused{3, "what a state or a cache holds where nothing was written yet, and scratch memory, may be anything"},
    empty_row{4, "a row without tokens leaves its state and that state's gradient as they are"},
    no_state{5, "the state's views may be empty: begin from zero, leave nothing"},
    cuts{6, "one call over many tokens equals many calls over few"}, rows{7, "a row knows nothing of the other rows"},
    causal{8, "a token changes nothing before it"},
    in_place{9, "io.out may be the memory of io.x, which is not read once io.out is written"},
    second_input{10, "io.t may be an empty view, which is zero, and d_t then is empty too"},
    gradients{11, "backward computes the derivatives of forward"},
    added{12, "d_p is added to, and d_t is assigned; a shared block adds to d_x and d_x0"},
    given{13, "backward has what it is given: io.out is empty there, and d_state may be"},
    again{14, "what is computed again is the same"},
    types{15, "float32 and bf16 storage change results by their rounding, and by no more at a cut"},
    operators{16, "a block that says by_operators touches no data and takes the same memory when it is run dry"},
    no_residual{17, "a shared block has no residual inside: the stack adds nothing of x to its stream"},
    stacked{18, "a block computes the same inside a stack"};

inline constexpr const BlockRule* all[] = {&listing, &fresh,  &unused,   &empty_row,    &no_state,    &cuts,
                                           &rows,    &causal, &in_place, &second_input, &gradients,   &added,
                                           &given,   &again,  &types,    &operators,    &no_residual, &stacked};

}  // namespace block_rules

/// Adds lines to a Report; a line that fails ends with the rule that was broken.
class RuleReport {
 public:
  explicit RuleReport(Report& report) : report_(report) {}

  void add(const BlockRule& rule, const std::string& name, double error, double bound, std::string note = {}) {
    const bool passed = Report::Line{name, error, bound, {}}.passed();
    if (!passed) {
      if (!note.empty()) note += "; ";
      note += "rule " + std::to_string(rule.number) + " of docs/add_a_block.md: " + rule.text;
    }
    report_.add(name, error, bound, note);
  }
  void expect(const BlockRule& rule, const std::string& name, bool condition, std::string note = {}) {
    add(rule, name, condition ? 0 : 1, 0, std::move(note));
  }
  bool passed() const { return report_.passed(); }

 private:
  Report& report_;
};

}  // namespace zamba::testing
