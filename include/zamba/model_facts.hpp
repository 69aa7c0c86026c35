// SPDX-License-Identifier: MIT
// ModelFacts: the constants of a model's type as values, for programs that choose the type at run time.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include <zamba/dtype.hpp>
#include <zamba/model.hpp>

namespace zamba {

struct ModelFacts {
  std::string name;            // what its owner calls it
  std::string model_type;      // of its checkpoints; empty where there are none
  DType storage = DType::F32;  // of its weights; of float, where they are no plain numbers
  std::string_view device;     // DeviceTraits::name
  Index vocabulary = 0;
  Index d_model = 0;
  Index layers = 0;
  Index parameters = 0;
  Index active_parameters = 0;  // parameters shared by several layers count once per use
  Index flops_per_token = 0;    // without what attention reads from its cache
  Index weight_bytes = 0;       // of all parameters in memory
  /// Of the state of `batch` sequences with room for `length` positions each.
  Index (*state_bytes)(Index batch, Index length) = nullptr;
  /// Model::workspace_bytes of such a state, with all threads of this machine; null where Net does not run dry.
  Index (*workspace_bytes)(Index batch, Index length) = nullptr;
  /// Model::training_bytes, likewise; null where the device does not train.
  TrainingBytes (*training_bytes)(const TrainingShape& shape) = nullptr;

  template <class Net, class T, class Device = cpu>
  static ModelFacts of(std::string name, std::string model_type = {});
};

template <class Net, class T, class Device>
ModelFacts ModelFacts::of(std::string name, std::string model_type) {
  ModelFacts facts;
  facts.name = std::move(name);
  facts.model_type = std::move(model_type);
  facts.storage = dtype_of<std::conditional_t<Number<weight_t<T>>, weight_t<T>, float>>();
  facts.device = DeviceTraits<Device>::name;
  facts.vocabulary = Net::vocabulary;
  facts.d_model = Net::d_model;
  facts.layers = 1;
  if constexpr (requires { Net::Stack::layers; }) facts.layers = Net::Stack::layers;
  facts.parameters = parameter_count<Net>;
  facts.active_parameters = active_parameter_count<Net>;
  facts.flops_per_token = zamba::flops_per_token<Net>;
  for (const ParameterEntry& entry : detail::list_parameters<Net, T>())
    facts.weight_bytes += static_cast<Index>(entry.bytes);
  facts.state_bytes = &zamba::state_bytes<Net, T>;
  if constexpr (by_operators<Net>)
    facts.workspace_bytes = [](Index batch, Index length) {
      return static_cast<Index>(Model<Net, T, Device>::workspace_bytes({batch, length}));
    };
  if constexpr (by_operators<Net> && trains<Device> && Number<weight_t<T>>)
    facts.training_bytes = [](const TrainingShape& shape) { return Model<Net, T, Device>::training_bytes(shape); };
  return facts;
}

}  // namespace zamba
