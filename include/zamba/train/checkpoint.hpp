// SPDX-License-Identifier: MIT
// The checkpoint of a training run: one safetensors file that holds all that further steps depend on.
//
//   weights.<parameter>          as stored
//   master.<parameter>           float32, of weights stored in less
//   first_moments.<parameter>, second_moments.<parameter>
//   metadata                     architecture, steps taken, and texts of the caller's
//
// The file is replaced whole or not at all, and equal runs write equal bytes. Reading it is strict: every tensor in its
// shape and type and nothing else, or an Error that lists all that differs, with model and optimiser left as they were.
#pragma once

#include <charconv>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <zamba/io/safetensors.hpp>
#include <zamba/train/adamw.hpp>

namespace zamba {

namespace detail {

/// One tensor of a checkpoint, in the device's memory.
struct CheckpointPart {
  std::string name;
  DType dtype;
  std::vector<Index> shape;
  std::byte* data;
  std::size_t bytes;
};

template <class Net, class T, class Device>
std::vector<CheckpointPart> checkpoint_parts(Model<Net, T, Device>& model, const AdamW<Net, T, Device>& optimiser) {
  using F = compute_t<T>;
  std::vector<CheckpointPart> parts;
  for (const ParameterEntry& entry : model.entries()) {
    const auto add = [&](const char* kind, Vector<F> values) {
      parts.push_back({kind + entry.name, dtype_of<F>(), entry.shape,
                       reinterpret_cast<std::byte*>(values.data + entry.offset),
                       static_cast<std::size_t>(entry.size) * sizeof(F)});
    };
    parts.push_back({"weights." + entry.name, entry.precise ? dtype_of<F>() : dtype_of<T>(), entry.shape,
                     model.data(entry), model.bytes(entry)});
    if (optimiser.master() && !entry.precise) add("master.", optimiser.master());
    add("first_moments.", optimiser.first_moments());
    add("second_moments.", optimiser.second_moments());
  }
  return parts;
}

template <class Net>
std::string architecture_text() {
  char digits[17] = {};
  std::to_chars(digits, digits + 16, architecture_hash<Net>(), 16);
  return digits;
}

template <class Net>
void check_architecture(const Safetensors& file) {
  const auto found = file.metadata().find("architecture");
  require(found != file.metadata().end(), file.origin(), ": not a checkpoint of a training run: its metadata has no ",
          "'architecture'");
  require(found->second == architecture_text<Net>(), file.origin(), ": the checkpoint is of an architecture of hash ",
          quote(std::string_view(found->second)), ", this model's is '", architecture_text<Net>(), "'");
}

inline std::string text_of(const std::vector<Index>& shape) {
  std::string text = "(";
  for (const Index extent : shape) text.append(text.size() > 1 ? ", " : "").append(std::to_string(extent));
  return text.append(")");
}

/// The tensor of each part. Throws with everything that is missing, surplus, or of another type or shape.
inline std::vector<const TensorEntry*> match_parts(const Safetensors& file, const std::vector<CheckpointPart>& parts) {
  std::vector<const TensorEntry*> matched;
  std::set<std::string_view> wanted;
  std::string problems;
  for (const CheckpointPart& part : parts) {
    wanted.insert(part.name);
    const TensorEntry* tensor = matched.emplace_back(file.find(part.name));
    const auto kind = [](DType dtype, const std::vector<Index>& shape) {
      return std::string(name_of(dtype)) + " " + text_of(shape);
    };
    if (!tensor)
      problems += "\n  " + part.name + ": missing";
    else if (tensor->dtype != part.dtype || tensor->shape != part.shape)
      problems += "\n  " + part.name + ": wanted " + kind(part.dtype, part.shape) + ", came " +
                  kind(tensor->dtype, tensor->shape);
  }
  for (const TensorEntry& tensor : file.tensors())
    if (!wanted.count(tensor.name)) problems += "\n  " + quote(std::string_view(tensor.name)) + ": surplus";
  require(problems.empty(), file.origin(), " does not fit this run:", problems);
  return matched;
}

}  // namespace detail

/// Writes model and optimiser; `metadata` goes along.
template <class Net, class T, class Device>
void save_checkpoint(const std::filesystem::path& path, Model<Net, T, Device>& model,
                     const AdamW<Net, T, Device>& optimiser, Metadata metadata = {}) {
  metadata["architecture"] = detail::architecture_text<Net>();
  metadata["optimiser_steps"] = std::to_string(optimiser.steps());
  std::vector<TensorSource> sources;
  std::vector<std::byte> staged;
  for (const detail::CheckpointPart& part : detail::checkpoint_parts(model, optimiser))
    sources.push_back({part.name, part.dtype, part.shape, [part, &staged]() -> std::span<const std::byte> {
                         staged.resize(part.bytes);
                         Memory<Device>::copy_to_host(staged.data(), part.data, part.bytes);
                         return staged;
                       }});
  write_safetensors(path, sources, metadata);
}

/// The integer under a key of a checkpoint's metadata.
inline Index metadata_number(const Safetensors& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  require(found != file.metadata().end(), file.origin(), ": the metadata has no '", key, "'");
  const std::string& text = found->second;
  Index number = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  require(error == std::errc() && end == text.data() + text.size() && number >= 0, file.origin(), ": '", key,
          "' must be an integer, 0 or more, came ", detail::quote(std::string_view(text)));
  return number;
}

/// Puts model and optimiser where save_checkpoint found them.
template <class Net, class T, class Device>
void load_checkpoint(const Safetensors& file, Model<Net, T, Device>& model, AdamW<Net, T, Device>& optimiser) {
  detail::check_architecture<Net>(file);
  const std::vector<detail::CheckpointPart> parts = detail::checkpoint_parts(model, optimiser);
  const std::vector<const TensorEntry*> tensors = detail::match_parts(file, parts);
  const Index steps = metadata_number(file, "optimiser_steps");
  for (std::size_t i = 0; i < parts.size(); ++i)
    Memory<Device>::copy_from_host(parts[i].data, tensors[i]->bytes.data(), parts[i].bytes);
  optimiser.set_steps(steps);
}

/// The weights of a run's checkpoint, of whatever storage type, for a model of the same architecture. Where the file
/// has master copies those are read, rounded to the model's storage type; `optimiser`, where given, gets them whole.
template <class Net, class T, class Device>
void load_weights(const std::filesystem::path& path, Model<Net, T, Device>& model,
                  AdamW<Net, T, Device>* optimiser = nullptr) {
  using F = compute_t<T>;
  const Safetensors file = Safetensors::open(path);
  detail::check_architecture<Net>(file);
  std::vector<const TensorEntry*> tensors;
  for (const ParameterEntry& entry : model.entries()) {
    const TensorEntry* master = file.find("master." + entry.name);
    tensors.push_back(master ? master : file.find("weights." + entry.name));
    require(tensors.back() && tensors.back()->shape == entry.shape, file.origin(), ": 'weights.", entry.name,
            "' is missing or not of shape ", detail::text_of(entry.shape));
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ParameterEntry& entry = model.entries()[i];
    model.write(entry, read_values<double>(*tensors[i]));
    if (!optimiser || !optimiser->master() || entry.precise) continue;
    const std::vector<F> values = read_values<F>(*tensors[i]);
    Memory<Device>::copy_from_host(optimiser->master().data + entry.offset, values.data(), values.size() * sizeof(F));
  }
}

}  // namespace zamba
