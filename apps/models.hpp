// SPDX-License-Identifier: MIT
// The models that the programs have compiled in. models/<family>.hpp lists the sizes of a family, in the type of their
// published weights (another type costs an add more), and defines add_<family><Device>(registry): apps/CMakeLists.txt
// finds it, and makes a unit of it for each device.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include <zamba/checkpoints/registry.hpp>

#include "console.hpp"

namespace zamba_apps {

/// Registers what the program knows. Made of models/compiled.cpp.in; the tests link another definition, of small
/// models.
zamba::Registry compiled_models();

inline void add_dtype_flag(CLI::App& app, std::string& dtype) {
  app.add_option("--dtype", dtype, "storage of the weights: auto (as in the files), f32, bf16")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str();
}

inline std::optional<zamba::DType> storage_of(const std::string& dtype) {
  if (dtype == "auto") return {};
  return dtype == "f32" ? zamba::DType::F32 : zamba::DType::BF16;
}

inline void add_device_flag(CLI::App& app, std::string& device) {
  app.add_option("--device", device, "where it computes: cpu, cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
}

/// Throws unless some model is compiled in for the device.
inline void check_device(const zamba::Registry& registry, const std::string& device) {
  for (const zamba::ModelFacts& facts : registry.models())
    if (facts.device == device) return;
  zamba::fail("--device ", device, ": this program was built without CUDA");
}

/// The flags that choose and load a model.
struct ModelOptions {
  std::string directory, dtype = "auto", device = "cpu";
  int threads = 0;

  void add_to(CLI::App& app) {
    app.add_option("DIR", directory,
                   "folder with config.json, *.safetensors and, unless a byte is a token, tokenizer.json");
    add_dtype_flag(app, dtype);
    add_device_flag(app, device);
    app.add_option("--threads", threads, "threads of the CPU; 0: one a core")
        ->check(CLI::Range(0, 4096))
        ->capture_default_str();
  }

  /// The model, which computes with as many threads as were asked for.
  zamba::AnyModel load(const zamba::Registry& registry, Console& console) const {
    check_device(registry, device);
    zamba::this_thread_context<zamba::cpu>() = zamba::Context<zamba::cpu>(threads);
    const Watch watch(console, "loading");
    return registry.load(directory, {.progress = std::cref(watch)}, storage_of(dtype), device);
  }
};

}  // namespace zamba_apps
