// SPDX-License-Identifier: MIT
// The networks of the reference cases in tests/data, and copies of the cases that a test may damage.
#pragma once

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <zamba/blocks/mamba2_block.hpp>
#include <zamba/blocks/mamba_block.hpp>
#include <zamba/blocks/shared_attention.hpp>
#include <zamba/blocks/transformer_block.hpp>
#include <zamba/error.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/language_model.hpp>
#include <zamba/parameter_table.hpp>
#include <zamba/pattern_stack.hpp>

#include <tests/support/temporary_folder.hpp>

namespace zamba_test {

using namespace zamba;

using ZambaCase =
    LanguageModel<96, PatternStack<"mmhmmmmhm", MambaBlock<MambaConfig{.d_model = 32, .d_state = 16, .n_heads = 2}>,
                                   SharedAttention<SharedAttentionConfig{.d_model = 32, .n_heads = 4, .d_ff = 64}>>>;

using ZambaGqaCase = LanguageModel<
    80, PatternStack<"mmhmhmm", MambaBlock<MambaConfig{.d_model = 48, .d_state = 8, .dt_rank = 5, .n_heads = 1}>,
                     SharedAttention<SharedAttentionConfig{.d_model = 48, .n_heads = 6, .n_kv_heads = 2, .d_ff = 80}>>>;

using MambaCase = LanguageModel<96, UniformStack<4, MambaBlock<MambaConfig{.d_model = 32}>>>;

using Mamba2Case =
    LanguageModel<96, UniformStack<4, Mamba2Block<Mamba2Config{.d_model = 32, .d_state = 16, .n_heads = 8}>>>;

using Mamba2GroupsCase =
    LanguageModel<96,
                  UniformStack<4, Mamba2Block<Mamba2Config{.d_model = 32, .d_state = 16, .n_heads = 8, .n_groups = 2}>>,
                  Head::own>;

using LlamaCase =
    LanguageModel<96,
                  UniformStack<4, TransformerBlock<TransformerConfig{
                                      .d_model = 32, .n_heads = 4, .n_kv_heads = 2, .d_ff = 64, .norm_eps = 1e-6}>>>;

using Zamba2Case =
    LanguageModel<96, PatternStack<"mmhmhm", Mamba2Block<Mamba2Config{.d_model = 32, .d_state = 16, .n_heads = 8}>,
                                   SharedAttention<SharedAttentionConfig{
                                       .d_model = 32, .n_heads = 4, .d_ff = 64, .mlp_adapter_rank = 4}>>>;

using Zamba2TwoBlocksCase = LanguageModel<
    96, PatternStack<
            "mhmhmhmmh", Mamba2Block<Mamba2Config{.d_model = 32, .d_state = 16, .n_heads = 4, .n_groups = 2}>,
            SharedAttention<SharedAttentionConfig{
                .d_model = 32, .n_heads = 4, .d_ff = 48, .rope = true, .mlp_adapter_rank = 4, .qkv_adapter_rank = 4}>,
            2>>;

inline std::filesystem::path case_path(const std::string& name) {
  return std::filesystem::path(ZAMBA_TEST_DATA) / name;
}

/// What f throws, or nothing.
inline std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

/// The parameter of this name.
inline const ParameterEntry& entry_of(const std::vector<ParameterEntry>& entries, const std::string& name) {
  const auto at = std::find_if(entries.begin(), entries.end(), [&](const auto& entry) { return entry.name == name; });
  require(at != entries.end(), "no parameter ", name);
  return *at;
}

/// The tensors of a file, held in memory.
class HeldTensors {
 public:
  struct Tensor {
    std::string name;
    DType dtype;
    std::vector<Index> shape;
    std::vector<std::byte> bytes;

    bool operator==(const Tensor&) const = default;
    template <class T>
    T& element(std::size_t i) {
      return reinterpret_cast<T*>(bytes.data())[i];
    }
  };

  explicit HeldTensors(const std::filesystem::path& path) {
    const Safetensors file = Safetensors::open(path);
    for (const TensorEntry& entry : file.tensors())
      tensors.push_back({entry.name, entry.dtype, entry.shape, {entry.bytes.begin(), entry.bytes.end()}});
    std::sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
  }

  void write(const std::filesystem::path& path) const {
    std::vector<TensorSource> sources;
    for (const Tensor& tensor : tensors)
      sources.push_back(
          {tensor.name, tensor.dtype, tensor.shape, [&tensor] { return std::span<const std::byte>(tensor.bytes); }});
    write_safetensors(path, sources, {{"format", "pt"}});
  }

  Tensor& operator[](const std::string& name) {
    const auto at = std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.name == name; });
    require(at != tensors.end(), "no tensor ", name);
    return *at;
  }
  void erase(const std::string& name) {
    std::erase_if(tensors, [&](const Tensor& tensor) { return tensor.name == name; });
  }
  void add_copy(const std::string& name, const std::string& copy) {
    Tensor tensor = (*this)[name];
    tensor.name = copy;
    tensors.push_back(std::move(tensor));
  }

  std::vector<Tensor> tensors;
};

/// A copy of a case, for the time of a scope.
class CaseCopy {
 public:
  explicit CaseCopy(const std::string& name) {
    for (const auto& file : std::filesystem::directory_iterator(case_path(name))) {
      std::filesystem::copy(file.path(), path() / file.path().filename());
      std::filesystem::permissions(path() / file.path().filename(), std::filesystem::perms::owner_all);
    }
  }
  const std::filesystem::path& path() const { return folder_.path; }

  /// Rewrites "model.safetensors" or "reference.safetensors" as `edit` leaves it.
  void edit(const std::string& file, const std::function<void(HeldTensors&)>& edit) const {
    HeldTensors tensors(path() / file);
    edit(tensors);
    tensors.write(path() / file);
  }

 private:
  TemporaryFolder folder_;
};

}  // namespace zamba_test
