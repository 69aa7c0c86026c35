// SPDX-License-Identifier: MIT
// Models from and to the Hugging Face layout: a folder with config.json and model.safetensors, or shards and their
// index (sharded_safetensors.hpp); or the same files in memory.
//
//   auto model = zamba::load_huggingface<zamba::Zamba7B, zamba::bf16>("Zamba-7B-v1");
//   zamba::save_huggingface(model, "my-model", {.max_shard_bytes = 5'000'000'000});
//
// Loading is strict. config.json must describe the type, and the files must hold every parameter in its shape, finite,
// and nothing else. An Error lists all keys that differ, else all tensors that do not fit, else all values that do not.
// Values are converted once, to nearest; where the types are equal they are copied bit by bit. Files are mapped, read
// once, and let go of piece by piece, so a load takes the memory of the model and little more.
// Saving writes weights in the model's storage type, or as float where that is no plain number, and parameters kept in
// higher precision in theirs. Tensors,
// config.json and other texts of the folder are replaced at one moment: a load while a save runs, or after one that was
// killed, has all of the old model or all of the new one (sharded_safetensors.hpp says how, and on which file systems).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <zamba/checkpoints/format.hpp>
#include <zamba/checkpoints/huggingface/folder.hpp>
#include <zamba/checkpoints/weight_reader.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/json.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/io/sharded_safetensors.hpp>
#include <zamba/model.hpp>

namespace zamba {

struct LoadOptions {
  bool allow_non_finite = false;  // take NaN and infinite weights as they are
  /// Called with the bytes that are done and all of them, at the beginning, every few megabytes, and at the end.
  /// Loading ends with an Error where it returns false.
  std::function<bool(std::uint64_t done, std::uint64_t total)> progress = {};
};

struct SaveOptions {
  std::uint64_t max_shard_bytes = 0;  // of the tensors in one file; 0: all in one
  std::string config = {};            // keys of config.json to write instead: R"({"eos_token_id": [5, 6]})"
  /// Texts of the folder to be replaced together with the model, by name, as {"generation_config.json", "{}"}.
  std::map<std::string, std::string> texts = {};
};

/// A checkpoint in memory of the caller's. Names are for messages.
struct CheckpointBytes {
  NamedBytes config;
  std::vector<NamedBytes> safetensors;
};

namespace detail {

/// A checkpoint whose config has been read, and whose tensors have not.
struct CheckpointSource {
  std::string origin, config_origin;  // for messages
  std::string config_text;
  nlohmann::json config;
  std::function<ShardedSafetensors()> open;
};

inline std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// `config` as it stands in the file of that name.
inline CheckpointSource source_of(std::string origin, std::string config_origin, std::string_view config,
                                  std::function<ShardedSafetensors()> open) {
  nlohmann::json parsed = parse_config(config, config_origin);
  return {std::move(origin), std::move(config_origin), std::string(config), std::move(parsed), std::move(open)};
}

/// Config and tensors of one moment. Where there are no tensors that can be read, the config is there alone, and `open`
/// says what is wrong.
inline CheckpointSource source_of(const std::filesystem::path& directory) {
  require(is_folder(directory), "load_huggingface: '", directory.string(), "' is not a folder");
  check_has_config(directory);
  std::optional<ShardedSafetensors> files;
  std::exception_ptr problem;
  try {
    files = ShardedSafetensors::open(directory, {"config.json"});
  } catch (const Error&) {
    problem = std::current_exception();
  }
  const std::string* config = files ? files->text("config.json") : nullptr;
  const std::filesystem::path config_file = directory / "config.json";
  return source_of("the checkpoint in '" + directory.string() + "'", config_file.string(),
                   config ? *config : std::string(MappedFile(config_file).text()), [directory, files, problem] {
                     if (files) return *files;
                     check_has_safetensors(directory);
                     std::rethrow_exception(problem);
                   });
}

inline CheckpointSource source_of(const CheckpointBytes& checkpoint) {
  return source_of("the checkpoint in memory", checkpoint.config.name, text_of(checkpoint.config.bytes),
                   [files = std::span(checkpoint.safetensors)] { return ShardedSafetensors::parse(files); });
}

template <class Net, class T, class Device>
Model<Net, T, Device> load_model(const CheckpointSource& source, const LoadOptions& options) {
  using F = compute_t<T>;
  const auto entries = list_parameters<Net, T>();
  const CheckpointLayout layout = CheckpointFormat<Net>::layout(entries);
  check_config(source.config, layout.config, source.config_origin);
  const ShardedSafetensors files = source.open();
  const auto matched = match_tensors(files, parameter_parts(entries, layout), layout.derived, source.origin);

  Model<Net, T, Device> model{Uninitialised{}};
  WeightReader reader(files, matched, options.progress, source.origin);
  Problems problems;
  for (const MatchedPart& match : matched) {
    const ParameterEntry& entry = *match.part.entry;
    std::byte* to = model.data(entry) + match.part.first * entry.row_bytes();
    const Index non_finite = entry.precise ? reader.template read<F, Device>(match, to)
                                           : reader.template read<weight_t<T>, Device>(match, to);
    if (non_finite > 0 && !options.allow_non_finite)
      problems.add(match.tensor->name + ": " + std::to_string(non_finite) + " of " +
                   std::to_string(match.tensor->count()) + " values are NaN or infinite, wanted none");
    for (const TensorEntry* copy : match.copies)
      if (!reader.same(*copy, *match.tensor)) problems.add(not_a_copy(*copy, *match.tensor));
  }
  problems.check(source.origin + " does not fit this model:");
  model.set_checkpoint_config(source.config_text);
  return model;
}

/// `size` weights in rows of `cols`, as they are stored, to numbers of type Saved in their place.
template <class W, class Saved>
void to_numbers(std::vector<std::byte>& weights, Index size, Index cols) {
  std::vector<double> values(static_cast<std::size_t>(size));
  decode_rows<W>(weights.data(), size, cols, values.data());
  weights.resize(weight_bytes<Saved>(size, cols));
  encode_rows<Saved>(values.data(), size, cols, weights.data());
}

/// The rows of a part, `row_bytes` each, from our order to that of the file.
inline void to_file_order(const ParameterPart& part, const std::byte* from, std::byte* to, Index row_bytes) {
  for (Index row = 0; row < part.rows; ++row)
    std::memcpy(to + part.tensor->file_row(row, part.rows) * row_bytes, from + row * row_bytes,
                static_cast<std::size_t>(row_bytes));
}

}  // namespace detail

/// A model with the weights of a checkpoint.
template <class Net, class T = float, class Device = cpu>
Model<Net, T, Device> load_huggingface(const std::filesystem::path& directory, const LoadOptions& options = {}) {
  return detail::load_model<Net, T, Device>(detail::source_of(directory), options);
}
template <class Net, class T = float, class Device = cpu>
Model<Net, T, Device> load_huggingface(const CheckpointBytes& checkpoint, const LoadOptions& options = {}) {
  return detail::load_model<Net, T, Device>(detail::source_of(checkpoint), options);
}

/// Replaces a model by one with the weights of a checkpoint or, with an Error, leaves it as it was. Both are in memory
/// meanwhile.
template <class Net, class T, class Device>
void load_huggingface(Model<Net, T, Device>& model, const std::filesystem::path& directory,
                      const LoadOptions& options = {}) {
  model = load_huggingface<Net, T, Device>(directory, options);
}
template <class Net, class T, class Device>
void load_huggingface(Model<Net, T, Device>& model, const CheckpointBytes& checkpoint,
                      const LoadOptions& options = {}) {
  model = load_huggingface<Net, T, Device>(checkpoint, options);
}

/// Replaces config.json, the tensors and options.texts at one moment, or leaves the old ones; makes the folder if there
/// is none. Waits for another save into the same folder. config.json is the one the model came with
/// (Model::checkpoint_config), but for the type of the weights and the options' keys. Equal models give equal bytes.
template <class Net, class T, class Device>
void save_huggingface(const Model<Net, T, Device>& model, const std::filesystem::path& directory,
                      const SaveOptions& options = {}) {
  using F = compute_t<T>;
  using W = weight_t<T>;
  using Saved = std::conditional_t<Number<W>, W, F>;
  const CheckpointLayout layout = CheckpointFormat<Net>::layout(model.entries());
  const auto parts = detail::parameter_parts(model.entries(), layout);
  constexpr std::string_view dtype = std::is_same_v<Saved, double>  ? "float64"
                                     : std::is_same_v<Saved, float> ? "float32"
                                                                    : "bfloat16";
  const std::string config = detail::config_text(layout, dtype, model.checkpoint_config(), options.config);
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  require(!error, "save_huggingface: cannot make the folder '", directory.string(), "': ", error.message());

  std::vector<std::byte> staged, reordered;  // one tensor at a time
  std::vector<TensorSource> sources;
  for (const detail::ParameterPart& part : parts) {
    const DType type = part.entry->precise ? dtype_of<F>() : dtype_of<Saved>();
    const auto bytes = [&, part, type] {
      const ParameterEntry& entry = *part.entry;
      staged.resize(static_cast<std::size_t>(part.rows * entry.row_bytes()));
      Memory<Device>::copy_to_host(staged.data(), model.data(entry) + part.first * entry.row_bytes(), staged.size());
      if constexpr (!std::is_same_v<W, Saved>)
        if (!entry.precise) detail::to_numbers<W, Saved>(staged, part.rows * part.cols, entry.cols());
      if (!part.tensor->interleaved) return std::span<const std::byte>(staged);
      const Index row_bytes = part.cols * static_cast<Index>(size_of(type));
      reordered.resize(staged.size());
      detail::to_file_order(part, staged.data(), reordered.data(), row_bytes);
      return std::span<const std::byte>(reordered);
    };
    sources.push_back({part.tensor->name, type, part.tensor->shape, bytes});
    if (part.tensor->save_copies)
      for (const std::string& copy : part.tensor->copies) sources.push_back({copy, type, part.tensor->shape, bytes});
  }
  std::map<std::string, std::string> texts = options.texts;
  texts["config.json"] = config;
  write_sharded_safetensors(directory, sources, {{"format", "pt"}}, options.max_shard_bytes, texts);
}

}  // namespace zamba
