// SPDX-License-Identifier: MIT
// Registry: the types of models that a program has compiled in, and the one that a checkpoint is of.
//
//   zamba::Registry registry;
//   registry.add<zamba::Zamba7B, zamba::bf16>("Zamba-7B-v1");
//   registry.add<zamba::Zamba7B, float>("Zamba-7B-v1");
//   registry.add<zamba::Zamba7B, zamba::bf16, zamba::cuda>("Zamba-7B-v1");   // where nvcc compiles
//   zamba::AnyModel model = registry.load("my-model");
//
// The type is the one that config.json describes. Where several storage types of it are compiled in, it is the wanted
// one, else the one that config.json names, else that of most of the weights, else the first added; of several devices
// it is the wanted one, else that of the first added. If none fits, an Error lists what is compiled in and, for the
// nearest, the keys that differ.
//
// Every add compiles loading, inference and loss of its type: a large program has a unit for each family.
#pragma once

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <zamba/any_model.hpp>
#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/model_facts.hpp>

namespace zamba {

class Registry {
 public:
  /// Under one name there may be several storage types of a network, on several devices.
  template <class Net, class T = float, class Device = cpu>
  Registry& add(const std::string& name);

  /// What is compiled in, in the order of add.
  const std::vector<ModelFacts>& models() const { return models_; }

  /// Which of them the config.json in a folder describes. Reads no weights, but perhaps which types they have.
  /// device: a DeviceTraits::name.
  const ModelFacts& match(const std::filesystem::path& directory, std::optional<DType> storage = {},
                          std::optional<std::string_view> device = {}) const {
    return models_[find(detail::source_of(directory), storage, device)];
  }

  /// The model in a folder, or in memory; everything else is as load_huggingface has it.
  AnyModel load(const std::filesystem::path& directory, const LoadOptions& options = {},
                std::optional<DType> storage = {}, std::optional<std::string_view> device = {}) const {
    return load(detail::source_of(directory), options, storage, device);
  }
  AnyModel load(const CheckpointBytes& checkpoint, const LoadOptions& options = {}, std::optional<DType> storage = {},
                std::optional<std::string_view> device = {}) const {
    return load(detail::source_of(checkpoint), options, storage, device);
  }

 private:
  using Source = detail::CheckpointSource;
  struct Type {
    std::vector<ConfigKey> config;
    AnyModel (*load)(const Source& source, const LoadOptions& options, const ModelFacts& facts);
  };

  AnyModel load(const Source& source, const LoadOptions& options, std::optional<DType> storage,
                std::optional<std::string_view> device) const {
    const std::size_t i = find(source, storage, device);
    return types_[i].load(source, options, models_[i]);
  }
  std::size_t find(const Source& source, std::optional<DType> storage, std::optional<std::string_view> device) const;
  [[noreturn]] void refuse(const Source& source) const;

  std::vector<ModelFacts> models_;
  std::vector<Type> types_;  // beside models_
};

namespace detail {

/// The storage type that config.json names for its weights, if it is one.
inline std::optional<DType> config_dtype(const CheckpointSource& source) {
  const nlohmann::json& config = source.config;
  for (const char* key : {"dtype", "torch_dtype"}) {
    const auto at = config.find(key);
    if (at == config.end()) continue;
    for (const auto& [name, dtype] : {std::pair("float64", DType::F64), std::pair("float32", DType::F32),
                                      std::pair("bfloat16", DType::BF16), std::pair("float16", DType::F16)})
      if (*at == name || *at == std::string("torch.") + name) return dtype;
  }
  return {};
}

/// The type of most bytes of a checkpoint's tensors, if they can be read.
inline std::optional<DType> tensors_dtype(const CheckpointSource& source) {
  std::map<DType, std::size_t> bytes;
  try {
    const ShardedSafetensors files = source.open();
    for (const std::string& name : files.names()) {
      const TensorEntry& tensor = *files.find(name);
      bytes[tensor.dtype] += tensor.bytes.size();
    }
  } catch (const Error&) {
    return {};  // loading will say what is wrong
  }
  const auto most =
      std::max_element(bytes.begin(), bytes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return most == bytes.end() ? std::nullopt : std::optional(most->first);
}

/// " on cuda"; nothing for the CPU.
inline std::string on_device(std::string_view device) {
  return device == DeviceTraits<cpu>::name ? std::string() : " on " + std::string(device);
}

/// "Zamba-7B-v1 in BF16 (model_type zamba)", or "in BF16 on cuda".
inline std::string model_text(const ModelFacts& facts) {
  return facts.name + " in " + std::string(name_of(facts.storage)) + on_device(facts.device) + " (model_type " +
         facts.model_type + ")";
}

}  // namespace detail

template <class Net, class T, class Device>
Registry& Registry::add(const std::string& name) {
  CheckpointLayout layout = CheckpointFormat<Net>::layout(detail::list_parameters<Net, T>());
  std::string model_type;
  for (const ConfigKey& key : layout.config)
    if (key.key == "model_type") model_type = key.wanted.template get<std::string>();
  const ModelFacts added = ModelFacts::of<Net, T, Device>(name, model_type);
  for (const ModelFacts& other : models_)
    require(other.name != name || other.storage != added.storage || other.device != added.device,
            "Registry: ", detail::model_text(other), " is there already");
  models_.push_back(added);
  types_.push_back({std::move(layout.config), [](const Source& source, const auto& options, const auto& facts) {
                      return AnyModel(detail::load_model<Net, T, Device>(source, options), facts.name,
                                      facts.model_type);
                    }});
  return *this;
}

inline std::size_t Registry::find(const Source& source, std::optional<DType> storage,
                                  std::optional<std::string_view> device) const {
  const nlohmann::json& config = source.config;
  std::vector<std::size_t> fitting;
  std::string present;  // of these, for messages
  for (std::size_t i = 0; i < types_.size(); ++i) {
    if (!detail::config_differences(config, types_[i].config).empty()) continue;
    fitting.push_back(i);
    present += "\n  " + detail::model_text(models_[i]);
  }
  if (fitting.empty()) refuse(source);
  if (device) {
    std::erase_if(fitting, [&](std::size_t i) { return models_[i].device != *device; });
    require(!fitting.empty(), source.config_origin, " is wanted on ", *device, ", but compiled in are:", present);
  }
  const auto stored_as = [&](DType type) {
    return std::find_if(fitting.begin(), fitting.end(), [&](std::size_t i) { return models_[i].storage == type; });
  };
  if (storage) {
    const auto at = stored_as(*storage);
    require(at != fitting.end(), source.config_origin, " is wanted in ", name_of(*storage),
            detail::on_device(device.value_or(DeviceTraits<cpu>::name)), ", but compiled in are:", present);
    return *at;
  }
  if (fitting.size() == 1) return fitting[0];
  for (const auto& dtype : {&detail::config_dtype, &detail::tensors_dtype}) {
    const std::optional<DType> found = dtype(source);
    if (const auto at = found ? stored_as(*found) : fitting.end(); at != fitting.end()) return *at;
  }
  return fitting[0];
}

inline void Registry::refuse(const Source& source) const {
  const nlohmann::json& config = source.config;
  const std::string& origin = source.config_origin;
  require(!models_.empty(), origin, ": no model is compiled in");
  std::string present, differences;
  std::size_t nearest = 0;
  std::pair<bool, std::size_t> least{true, std::string::npos};
  for (std::size_t i = 0; i < types_.size(); ++i) {
    present += "\n  " + detail::model_text(models_[i]);
    const auto differing = detail::config_differences(config, types_[i].config);
    const bool other_family = std::any_of(differing.begin(), differing.end(),
                                          [](const std::string& line) { return line.starts_with("model_type:"); });
    const std::pair distance(other_family, differing.size());
    if (distance < least) least = distance, nearest = i;
  }
  for (const std::string& difference : detail::config_differences(config, types_[nearest].config))
    differences += "\n  " + difference;
  fail(origin, " describes none of the models that are compiled in:", present, "\nThe nearest is ",
       detail::model_text(models_[nearest]), ", but:", differences);
}

}  // namespace zamba
