// SPDX-License-Identifier: MIT
// The state and the parameters of a model against the tensors of a reference case, by groups.
#pragma once

#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <zamba/checkpoints/format.hpp>
#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/parameter_table.hpp>
#include <zamba/testing/reference_case.hpp>
#include <zamba/testing/report.hpp>

namespace zamba::testing::detail {

/// The error of several tensors that is worst for its bound.
class Group {
 public:
  void add(const std::string& name, double error, double bound) {
    ++count_;
    const bool worse = error / bound > worst_ / bound_ || is_nan(error);  // a NaN is worse than any number
    if (count_ > 1 && (is_nan(worst_) || !worse)) return;
    worst_ = error;
    bound_ = bound;
    name_ = name;
  }
  void report(Report& report, const std::string& group) const {
    if (count_ == 0) return;
    report.add(group, worst_, bound_, count_ == 1 ? name_ : "the worst of " + std::to_string(count_) + " is " + name_);
  }

 private:
  int count_ = 0;
  double worst_ = 0, bound_ = 1;
  std::string name_;
};

/// Compares the state with cache.*.I of the case.
inline void compare_caches(ReferenceCase& reference, const std::vector<StateValues>& state, Index batch,
                           const std::string& how, double bound, Report& report) {
  const std::map<std::string, std::string> kinds{
      {"conv", "conv"}, {"scan", "ssm"}, {"keys", "key"}, {"values", "value"}};
  std::map<std::string, Group> groups;
  for (const StateValues& ours : state) {
    const std::size_t dot = ours.name.rfind('.');
    const std::string part = ours.name.substr(dot + 1), layer = ours.name.substr(0, dot);
    const auto kind = kinds.find(part);
    if (kind == kinds.end()) continue;
    const std::string name = "cache." + kind->second + layer.substr(layer.rfind('.'));
    if (const TensorEntry* entry = reference.find(name)) {
      const Values wanted = cache_in_our_order(*entry, part, batch, ours.rows, ours.width);
      groups[kind->second].add(name, relative_error(ours.values, wanted), bound);
    }
  }
  for (const auto& [kind, group] : groups) group.report(report, "cache." + kind + how);
}

/// The values of one part of a parameter, in the order of its file.
inline Values file_order(const Values& values, const zamba::detail::ParameterPart& part) {
  Values ordered(static_cast<std::size_t>(part.rows * part.cols));
  zamba::detail::to_file_order(part, reinterpret_cast<const std::byte*>(values.data() + part.first * part.cols),
                               reinterpret_cast<std::byte*>(ordered.data()),
                               part.cols * static_cast<Index>(sizeof(double)));
  return ordered;
}

/// Compares values(entry) of every parameter with prefix + the names of its parts in the file. guard: the root mean
/// square below which a tensor is measured as if it had that one, as a share of the root mean square of all.
/// bound(entry, error): what an error may be.
template <class ReadValues, class Bound>
void compare_parameters(ReferenceCase& reference, const std::string& prefix, const std::vector<ParameterEntry>& entries,
                        const CheckpointLayout& layout, double guard, ReadValues&& values, Bound&& bound,
                        Group& group) {
  double squares = 0, count = 0;
  for (const std::string& name : reference.names(prefix)) {
    for (const double v : read_values<double>(*reference.find(prefix + name))) squares += v * v, ++count;
  }
  std::set<std::string> known;
  for (const auto& part : zamba::detail::parameter_parts(entries, layout)) {
    const std::string name = prefix + part.tensor->name;
    known.insert(name);
    const TensorEntry* entry = reference.find(name);
    if (!entry) continue;
    const Values wanted = read_values<double>(*entry), got = file_order(values(*part.entry), part);
    if (!zamba::detail::same_shape(entry->shape, part.tensor->shape)) {
      group.add(name + " (of another shape)", std::nan(""), 0);
      continue;
    }
    const double least = guard * std::sqrt(squares / count * static_cast<double>(wanted.size()));
    const double error = relative_error(got, wanted, least);
    group.add(name, error, bound(*part.entry, error));
  }
  for (const std::string& name : reference.names(prefix))
    if (!known.contains(prefix + name)) group.add(prefix + name + " (no such parameter)", std::nan(""), 0);
}

}  // namespace zamba::testing::detail
