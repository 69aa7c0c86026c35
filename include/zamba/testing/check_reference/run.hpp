// SPDX-License-Identifier: MIT
// What the parts of check_reference share: the model, the case, its prompt, and where results go.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/model.hpp>
#include <zamba/testing/reference_bounds.hpp>
#include <zamba/testing/reference_case.hpp>
#include <zamba/testing/report.hpp>

namespace zamba::testing::detail {

template <class Net, class T, class Device>
struct ReferenceRun {
  using A = activation_t<T, Device>;

  ReferenceRun(const std::filesystem::path& directory, const ReferenceBounds& bounds_, Report& report_)
      : bounds(bounds_),
        report(report_),
        reference(directory),
        model(load_huggingface<Net, T, Device>(directory)),
        layout(CheckpointFormat<Net>::layout(model.entries())) {
    ids = reference.ids("input_ids", batch, length);
    for (const Token id : ids)
      require(id >= 0 && id < Net::vocabulary, "reference.safetensors: input_ids holds ", id,
              ", outside the vocabulary of ", Net::vocabulary);
    require(reference.find("logits"), "reference.safetensors: there is no logits");
  }

  static Values to_host(const A* data, Index size) {
    std::vector<A> values(static_cast<std::size_t>(size));
    Memory<Device>::copy_to_host(values.data(), data, values.size() * sizeof(A));
    return {values.begin(), values.end()};
  }

  double error(const std::string& name, const Values& got) {
    return relative_error(got, read_values<double>(*reference.find(name)));
  }

  /// Where the rows begin.
  std::vector<Index> offsets() const {
    std::vector<Index> offsets;
    for (Index row = 0; row <= batch; ++row) offsets.push_back(row * length);
    return offsets;
  }

  ReferenceBounds bounds;
  Report& report;
  ReferenceCase reference;
  Model<Net, T, Device> model;
  CheckpointLayout layout;
  Index batch = 0, length = 0;
  std::vector<Token> ids;
};

}  // namespace zamba::testing::detail
