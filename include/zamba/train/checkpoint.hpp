// SPDX-License-Identifier: MIT
// The checkpoint of a training run: one safetensors file that holds all that further steps depend on.
//
//   weights.<parameter>          as stored
//   master.<parameter>           float32, what weights that are stored in less are the roundings of
//   first_moments.<parameter>, second_moments.<parameter>
//   metadata                     architecture, steps taken, and texts of the caller's
//
// The file is replaced whole or not at all, and equal runs write equal bytes; a number that is not finite is never
// written. Reading is strict: every tensor in its shape and type, finite, and nothing else, or an Error that lists all
// that differs. All of it is checked before anything is changed: model and optimiser get the whole file or stay as they
// were.
#pragma once

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <zamba/io/problems.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/kernel/finite.hpp>
#include <zamba/train/adamw.hpp>

namespace zamba {

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

namespace detail {

/// One tensor of a checkpoint.
struct CheckpointPart {
  std::string name;
  DType dtype;
  const ParameterEntry* entry;
  std::byte* data;  // in the device's memory; null: masters, which lie in two halves
  std::size_t bytes;
};

template <class Net, class T, class Device>
std::vector<CheckpointPart> checkpoint_parts(Model<Net, T, Device>& model, const AdamW<Net, T, Device>& optimiser) {
  using F = compute_t<T>;
  std::vector<CheckpointPart> parts;
  for (const ParameterEntry& entry : model.entries()) {
    const auto add = [&](const char* kind, F* values) {
      parts.push_back({kind + entry.name, dtype_of<F>(), &entry, reinterpret_cast<std::byte*>(values),
                       static_cast<std::size_t>(entry.size) * sizeof(F)});
    };
    parts.push_back({"weights." + entry.name, entry.precise ? dtype_of<F>() : dtype_of<weight_t<T>>(), &entry,
                     model.data(entry), model.bytes(entry)});
    if (optimiser.splits_weights && !entry.precise) add("master.", nullptr);
    add("first_moments.", optimiser.first_moments().data + entry.offset);
    add("second_moments.", optimiser.second_moments().data + entry.offset);
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
    else if (tensor->dtype != part.dtype || tensor->shape != part.entry->shape)
      problems += "\n  " + part.name + ": wanted " + kind(part.dtype, part.entry->shape) + ", came " +
                  kind(tensor->dtype, tensor->shape);
  }
  for (const TensorEntry& tensor : file.tensors())
    if (!wanted.count(tensor.name)) problems += "\n  " + quote(std::string_view(tensor.name)) + ": surplus";
  require(problems.empty(), file.origin(), " does not fit this run:", problems);
  return matched;
}

/// The place of the first value of a tensor's bytes that is not finite, or their number.
inline Index first_non_finite(DType dtype, std::span<const std::byte> bytes) {
  Index at = 0;
  visit_dtype(dtype, [&]<class Stored>(Stored) {
    const auto count = static_cast<Index>(bytes.size() / sizeof(Stored));
    if constexpr (std::is_same_v<Stored, float> || std::is_same_v<Stored, double> || std::is_same_v<Stored, bf16>)
      at = kernel::first_non_finite<Stored>(bytes.data(), count);
    else
      at = count;  // of no type of a part
  });
  return at;
}

inline std::string not_finite(const std::string& name, Index at) {
  return name + ": value " + std::to_string(at) + " is NaN or infinite";
}

/// Calls f(first, values) with the elements of a tensor as Stored, piece by piece; `room` holds any of the pieces.
template <class Stored, class F>
void for_pieces(const TensorEntry& tensor, std::vector<Stored>& room, F&& f) {
  for (Index first = 0; first < tensor.count(); first += static_cast<Index>(room.size())) {
    const Index count = std::min(static_cast<Index>(room.size()), tensor.count() - first);
    read_values(tensor, first, count, room.data());
    f(first, std::span<const Stored>(room).first(static_cast<std::size_t>(count)));
  }
}

/// A checkpoint that was found to fit a model and its optimiser, value by value.
template <class Net, class T, class Device>
class FittingCheckpoint {
 public:
  FittingCheckpoint(const Safetensors& file, Model<Net, T, Device>& model, AdamW<Net, T, Device>& optimiser)
      : model_(model), optimiser_(optimiser) {
    check_architecture<Net>(file);
    parts_ = checkpoint_parts(model, optimiser);
    tensors_ = match_parts(file, parts_);
    steps_ = metadata_number(file, "optimiser_steps");
    Problems problems;
    for (const TensorEntry* tensor : tensors_) {
      const Index at = first_non_finite(tensor->dtype, tensor->bytes);
      if (at < tensor->count()) problems.add(not_finite(tensor->name, at));
      if (!tensor->name.starts_with("second_moments.")) continue;
      bool negative = false;
      for_pieces(*tensor, room_, [&](Index, std::span<const F> values) {
        negative = negative || std::any_of(values.begin(), values.end(), [](F v) { return v < 0; });
      });
      if (negative) problems.add(tensor->name + ": wanted means of squares, came negative values");
    }
    problems.check(file.origin() + " does not fit this run:");
  }

  /// Masters come after the weights, and round them anew.
  void load() const {
    optimiser_.set_steps(steps_);
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      const CheckpointPart& part = parts_[i];
      if (part.data)
        Memory<Device>::copy_from_host(part.data, tensors_[i]->bytes.data(), part.bytes);
      else if constexpr (AdamW<Net, T, Device>::splits_weights)
        for_pieces(*tensors_[i], room_, [&](Index first, std::span<const F> values) {
          optimiser_.write_masters(model_, *part.entry, first, values);
        });
    }
  }

 private:
  using F = compute_t<T>;

  Model<Net, T, Device>& model_;
  AdamW<Net, T, Device>& optimiser_;
  mutable std::vector<F> room_ = std::vector<F>(1 << 16);
  std::vector<CheckpointPart> parts_;
  std::vector<const TensorEntry*> tensors_;
  Index steps_ = 0;
};

}  // namespace detail

/// Writes model and optimiser; `metadata` goes along. Throws for a value that is not finite, naming it, and leaves what
/// was at `path`.
template <class Net, class T, class Device>
void save_checkpoint(const std::filesystem::path& path, Model<Net, T, Device>& model,
                     const AdamW<Net, T, Device>& optimiser, Metadata metadata = {}) {
  metadata["architecture"] = detail::architecture_text<Net>();
  metadata["optimiser_steps"] = std::to_string(optimiser.steps());
  std::vector<TensorSource> sources;
  std::vector<std::byte> staged;
  for (const detail::CheckpointPart& part : detail::checkpoint_parts(model, optimiser))
    sources.push_back({part.name, part.dtype, part.entry->shape, [&, part]() -> std::span<const std::byte> {
                         staged.resize(part.bytes);
                         if (part.data)
                           Memory<Device>::copy_to_host(staged.data(), part.data, part.bytes);
                         else if constexpr (AdamW<Net, T, Device>::splits_weights)
                           optimiser.read_masters(model, *part.entry, 0,
                                                  {reinterpret_cast<float*>(staged.data()), staged.size() / 4});
                         const Index at = detail::first_non_finite(part.dtype, staged);
                         if (at < static_cast<Index>(part.bytes / size_of(part.dtype)))
                           fail(detail::not_finite(part.name, at));
                         return staged;
                       }});
  write_safetensors(path, sources, metadata);
}

/// Puts model and optimiser where save_checkpoint found them.
template <class Net, class T, class Device>
void load_checkpoint(const Safetensors& file, Model<Net, T, Device>& model, AdamW<Net, T, Device>& optimiser) {
  detail::FittingCheckpoint<Net, T, Device>(file, model, optimiser).load();
}

namespace detail {

/// What keeps a tensor from being read as Stored into a parameter, or nothing.
template <class Stored>
std::string problem_of(const TensorEntry& tensor, const ParameterEntry& entry, std::vector<Stored>& room) {
  if (tensor.shape != entry.shape)
    return tensor.name + ": wanted shape " + text_of(entry.shape) + ", came " + text_of(tensor.shape);
  if (tensor.dtype != DType::F64 && tensor.dtype != DType::F32 && tensor.dtype != DType::F16 &&
      tensor.dtype != DType::BF16)
    return tensor.name + ": wanted F64, F32, F16 or BF16, came " + std::string(name_of(tensor.dtype));
  Index bad = tensor.count();
  for_pieces(tensor, room, [&](Index first, std::span<const Stored> values) {
    const auto count = static_cast<Index>(values.size());
    const Index at = kernel::first_non_finite<Stored>(values.data(), count);
    if (at < count) bad = std::min(bad, first + at);
  });
  return bad < tensor.count() ? not_finite(tensor.name, bad) + ", as " + std::string(name_of(dtype_of<Stored>())) : "";
}

}  // namespace detail

/// The weights of a run's checkpoint, of whatever storage type, for a model of the same architecture. Where the file
/// has master copies those are read, rounded to the model's storage type; `optimiser`, where given, gets them whole.
/// Its moments and steps are not read. Throws, with everything that is missing, of another shape, or not finite as the
/// model would store it, before anything is changed.
template <class Net, class T, class Device>
void load_weights(const std::filesystem::path& path, Model<Net, T, Device>& model,
                  AdamW<Net, T, Device>* optimiser = nullptr) {
  using F = compute_t<T>;
  using W = weight_t<T>;
  static_assert(Number<W>,
                "zamba::load_weights: a run's weights are plain numbers, and this model's are none: load them into a "
                "model of float or bf16 and convert it with to<Types<W, A, C>>()");
  const Safetensors file = Safetensors::open(path);
  detail::check_architecture<Net>(file);
  std::vector<W> room(1 << 16);
  std::vector<F> precise_room(1 << 16);
  std::vector<const TensorEntry*> tensors;
  detail::Problems problems;
  for (const ParameterEntry& entry : model.entries()) {
    const TensorEntry* master = file.find("master." + entry.name);
    const TensorEntry* tensor = tensors.emplace_back(master ? master : file.find("weights." + entry.name));
    const std::string problem = !tensor         ? "weights." + entry.name + ": missing"
                                : entry.precise ? detail::problem_of(*tensor, entry, precise_room)
                                                : detail::problem_of(*tensor, entry, room);
    if (!problem.empty()) problems.add(problem);
  }
  problems.check(file.origin() + " does not fit this model:");
  // From here on nothing throws.
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ParameterEntry& entry = model.entries()[i];
    const auto copy_to = [](auto* to) {
      return [to](Index first, auto values) {
        Memory<Device>::copy_from_host(to + first, values.data(), values.size_bytes());
      };
    };
    if (entry.precise)
      detail::for_pieces(*tensors[i], precise_room, copy_to(reinterpret_cast<F*>(model.data(entry))));
    else
      detail::for_pieces(*tensors[i], room, copy_to(reinterpret_cast<W*>(model.data(entry))));
    if constexpr (AdamW<Net, T, Device>::splits_weights)
      if (optimiser && !entry.precise)
        detail::for_pieces(*tensors[i], precise_room, [&](Index first, std::span<const F> values) {
          optimiser->write_masters(model, entry, first, values);
        });
  }
}

}  // namespace zamba
