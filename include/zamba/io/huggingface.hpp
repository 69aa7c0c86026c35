// SPDX-License-Identifier: MIT
// Models from and to the Hugging Face layout: a folder with config.json and model.safetensors.
//
//   auto model = zamba::load_huggingface<zamba::Zamba7B, zamba::bf16>("Zamba-7B-v1");
//   zamba::save_huggingface(model, "my-model");
//
// Loading is strict. config.json must describe the type, and the file must hold every parameter in its shape, finite,
// and nothing else; an Error lists all that does not fit, and the model stays as it was. The file is mapped, so beside
// the model at most one tensor is in memory. Values are converted once, to nearest; where the types are equal they are
// copied bit by bit.
// Saving writes weights in the model's storage type and parameters kept in higher precision in theirs.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <zamba/io/checkpoint_format.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/model.hpp>
#include <zamba/models/llama_checkpoint.hpp>
#include <zamba/models/mamba_checkpoint.hpp>
#include <zamba/models/zamba_checkpoint.hpp>

namespace zamba {

struct LoadOptions {
  bool allow_non_finite = false;  // take NaN and infinite weights as they are
};

namespace detail {

/// The tensors of a checkpoint, wherever in its files they are.
class CheckpointFiles {
 public:
  explicit CheckpointFiles(const std::vector<std::filesystem::path>& paths) {
    for (const auto& path : paths) files_.push_back(Safetensors::open(path));
    for (const Safetensors& file : files_)
      for (const TensorEntry& tensor : file.tensors())
        require(names_.insert(tensor.name).second, file.origin(), ": tensor ", quote(tensor.name),
                " is in another file of this checkpoint too");
  }

  const TensorEntry* find(const std::string& name) const {
    for (const Safetensors& file : files_)
      if (const TensorEntry* found = file.find(name)) return found;
    return nullptr;
  }
  const std::set<std::string>& names() const { return names_; }

 private:
  std::vector<Safetensors> files_;
  std::set<std::string> names_;
};

/// The files that hold the tensors of a checkpoint.
inline std::vector<std::filesystem::path> checkpoint_files(const std::filesystem::path& directory) {
  return {directory / "model.safetensors"};
}

inline nlohmann::json read_config(const std::filesystem::path& directory) {
  require(std::filesystem::is_directory(directory), "load_huggingface: '", directory.string(), "' is not a folder");
  const MappedFile file(directory / "config.json");
  const std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  return parse_config(text, (directory / "config.json").string());
}

/// "(96, 4)".
inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "(";
  for (const Index extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + ")";
}

inline bool same_shape(std::vector<Index> a, std::vector<Index> b) {
  std::erase(a, 1);
  std::erase(b, 1);
  return a == b;
}

/// How many values of a tensor are NaN or infinite as a model would store them.
template <class Stored>
Index count_non_finite(const TensorEntry& tensor) {
  constexpr Index piece = 1 << 14;
  std::vector<Stored> values(static_cast<std::size_t>(std::min(piece, tensor.count())));
  Index count = 0;
  for (Index first = 0; first < tensor.count(); first += piece) {
    const Index n = std::min(piece, tensor.count() - first);
    read_values(tensor, first, n, values.data());
    for (Index i = 0; i < n; ++i) count += !std::isfinite(static_cast<compute_t<Stored>>(values[i]));
  }
  return count;
}

inline Index count_non_finite(const TensorEntry& tensor, DType stored) {
  if (stored == DType::F64) return count_non_finite<double>(tensor);
  return stored == DType::F32 ? count_non_finite<float>(tensor) : count_non_finite<bf16>(tensor);
}

inline bool is_weight_type(DType dtype) {
  return dtype == DType::F64 || dtype == DType::F32 || dtype == DType::F16 || dtype == DType::BF16;
}

/// What is wrong with one tensor of a file, or nothing.
inline std::string problem_of(const TensorEntry& tensor, const CheckpointTensor& wanted) {
  if (!is_weight_type(tensor.dtype)) return "wanted F64, F32, F16 or BF16, came " + std::string(name_of(tensor.dtype));
  if (!same_shape(tensor.shape, wanted.shape))
    return "wanted shape " + shape_text(wanted.shape) + ", came " + shape_text(tensor.shape);
  return {};
}

/// The tensor of each part. Throws one Error with everything that is missing, surplus, of another shape or type, not
/// finite, or differs between copies. `stored` gives the type in which the model keeps a parameter.
template <class StoredType>
std::vector<const TensorEntry*> match_tensors(const CheckpointFiles& files, const std::vector<ParameterPart>& parts,
                                              StoredType&& stored, const LoadOptions& options,
                                              const std::string& origin) {
  std::vector<const TensorEntry*> matched;
  std::set<std::string> surplus = files.names();
  std::string problems;
  const auto complain = [&](const std::string& name, const std::string& problem) {
    problems += "\n  " + name + ": " + problem;
  };
  for (const ParameterPart& part : parts) {
    const CheckpointTensor& wanted = *part.tensor;
    const TensorEntry* tensor = matched.emplace_back(files.find(wanted.name));
    surplus.erase(wanted.name);
    if (!tensor) {
      complain(wanted.name, "missing, wanted with shape " + shape_text(wanted.shape));
    } else if (const auto problem = problem_of(*tensor, wanted); !problem.empty()) {
      complain(wanted.name, problem);
    } else if (!options.allow_non_finite) {
      if (const Index count = count_non_finite(*tensor, stored(*part.entry)); count > 0)
        complain(wanted.name, std::to_string(count) + " of " + std::to_string(tensor->count()) +
                                  " values are NaN or infinite, wanted none");
    }
    for (const std::string& name : wanted.copies) {
      surplus.erase(name);
      const TensorEntry* copy = files.find(name);
      if (copy && tensor &&
          (copy->dtype != tensor->dtype || !same_shape(copy->shape, tensor->shape) ||
           !std::equal(copy->bytes.begin(), copy->bytes.end(), tensor->bytes.begin(), tensor->bytes.end())))
        complain(name, "wanted the same values as in " + wanted.name + ", of which it is a copy, came others");
    }
  }
  for (const std::string& name : surplus) complain(quote(name), "surplus, the model has no such parameter");
  require(problems.empty(), origin, " does not fit this model:", problems);
  return matched;
}

/// Writes the values of a tensor to the memory of its rows, converted and with the rows in our order.
template <class Stored, class Device>
void load_values(const TensorEntry& tensor, const ParameterPart& part, std::byte* to) {
  const auto& [place, entry, before, rows, cols] = part;
  if (tensor.dtype == dtype_of<Stored>() && !place->interleaved) {
    Memory<Device>::copy_from_host(to, tensor.bytes.data(), tensor.bytes.size());
    return;
  }
  const Index at_once = std::max<Index>(1, (1 << 16) / cols);
  std::vector<Stored> staged(static_cast<std::size_t>(std::min(rows, at_once) * cols));
  for (Index first = 0; first < rows; first += at_once) {
    const Index count = std::min(at_once, rows - first);
    for (Index row = 0; row < count; ++row)
      read_values(tensor, place->file_row(first + row, rows) * cols, cols, staged.data() + row * cols);
    Memory<Device>::copy_from_host(to + first * cols * static_cast<Index>(sizeof(Stored)), staged.data(),
                                   static_cast<std::size_t>(count * cols) * sizeof(Stored));
  }
}

/// The rows of a part, `row_bytes` each, from our order to that of the file.
inline void to_file_order(const ParameterPart& part, const std::byte* from, std::byte* to, Index row_bytes) {
  for (Index row = 0; row < part.rows; ++row)
    std::memcpy(to + part.tensor->file_row(row, part.rows) * row_bytes, from + row * row_bytes,
                static_cast<std::size_t>(row_bytes));
}

}  // namespace detail

/// Replaces the weights of a model by those of a checkpoint: all of them, or, with an Error, none.
template <class Net, class T, class Device>
void load_huggingface(Model<Net, T, Device>& model, const std::filesystem::path& directory, LoadOptions options = {}) {
  using F = compute_t<T>;
  const CheckpointLayout layout = CheckpointFormat<Net>::layout(model.entries());
  const auto parts = detail::parameter_parts(model.entries(), layout);
  detail::check_config(detail::read_config(directory), layout.config, (directory / "config.json").string());
  const detail::CheckpointFiles files(detail::checkpoint_files(directory));
  const auto stored = [](const ParameterEntry& entry) { return entry.precise ? dtype_of<F>() : dtype_of<T>(); };
  const auto tensors =
      detail::match_tensors(files, parts, stored, options, "the checkpoint in '" + directory.string() + "'");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto& [tensor, entry, first, rows, cols] = parts[i];
    std::byte* to = model.data(*entry) + first * cols * static_cast<Index>(size_of(stored(*entry)));
    if (entry->precise)
      detail::load_values<F, Device>(*tensors[i], parts[i], to);
    else
      detail::load_values<T, Device>(*tensors[i], parts[i], to);
  }
}

/// A model with the weights of a checkpoint.
template <class Net, class T = float, class Device = cpu>
Model<Net, T, Device> load_huggingface(const std::filesystem::path& directory, LoadOptions options = {}) {
  Model<Net, T, Device> model{Uninitialised{}};
  load_huggingface(model, directory, options);
  return model;
}

/// Writes config.json and model.safetensors, each beside the old file and renamed over it; makes the folder if there is
/// none. Equal models give equal bytes.
template <class Net, class T, class Device>
void save_huggingface(const Model<Net, T, Device>& model, const std::filesystem::path& directory) {
  using F = compute_t<T>;
  const CheckpointLayout layout = CheckpointFormat<Net>::layout(model.entries());
  const auto parts = detail::parameter_parts(model.entries(), layout);
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  require(!error, "save_huggingface: cannot make the folder '", directory.string(), "': ", error.message());

  std::vector<std::byte> staged, reordered;  // one tensor at a time
  std::vector<TensorSource> sources;
  for (const detail::ParameterPart& part : parts) {
    const DType dtype = part.entry->precise ? dtype_of<F>() : dtype_of<T>();
    sources.push_back({part.tensor->name, dtype, part.tensor->shape, [&, part, dtype] {
                         const Index row_bytes = part.cols * static_cast<Index>(size_of(dtype));
                         staged.resize(static_cast<std::size_t>(part.rows * row_bytes));
                         Memory<Device>::copy_to_host(staged.data(), model.data(*part.entry) + part.first * row_bytes,
                                                      staged.size());
                         if (!part.tensor->interleaved) return std::span<const std::byte>(staged);
                         reordered.resize(staged.size());
                         detail::to_file_order(part, staged.data(), reordered.data(), row_bytes);
                         return std::span<const std::byte>(reordered);
                       }});
  }
  write_safetensors(directory / "model.safetensors", sources, {{"format", "pt"}});
  constexpr std::string_view dtype = std::is_same_v<T, double>  ? "float64"
                                     : std::is_same_v<T, float> ? "float32"
                                                                : "bfloat16";
  replace_file(directory / "config.json", [&](FileWriter& out) { out.write(detail::config_text(layout, dtype)); });
}

}  // namespace zamba
