// SPDX-License-Identifier: MIT
// Checkpoints are loaded whole or not at all, and hold no number that is not finite.
#include <zamba/train/checkpoint.hpp>

#include <cmath>
#include <functional>
#include <limits>

#include <doctest/doctest.h>

#include "tests/support/nets.hpp"
#include "tests/support/training.hpp"

namespace {

using namespace zamba;
using zamba_test::error_of;
using zamba_test::has;
using zamba_test::Hybrid;
using zamba_test::TemporaryFolder;

template <class T>
std::vector<double> all_of(const Model<Hybrid, T>& model, const AdamW<Hybrid, T, cpu>& optimiser) {
  std::vector<double> all = zamba_test::weights_of(model);
  all.push_back(static_cast<double>(optimiser.steps()));
  for (const auto& part : {optimiser.first_moments(), optimiser.second_moments()})
    all.insert(all.end(), part.data, part.data + part.size());
  for (const ParameterEntry& entry : model.entries())
    for (const double value : zamba_test::masters_of(model, optimiser, entry)) all.push_back(value);
  return all;
}

/// A file with one tensor changed: its values, as float64, and the type it is written in.
void write_changed(const std::filesystem::path& from, const std::filesystem::path& to, const std::string& name,
                   DType dtype, const std::function<void(std::vector<double>&)>& change) {
  const Safetensors file = Safetensors::open(from);
  std::vector<TensorSource> tensors;
  std::vector<double> wide;
  std::vector<float> narrow;
  std::vector<std::int32_t> integers;
  bool found = false;
  for (const TensorEntry& tensor : file.tensors()) {
    tensors.push_back({tensor.name, tensor.dtype, tensor.shape, [&tensor] { return tensor.bytes; }});
    if (tensor.name != name) continue;
    found = true;
    wide = read_values<double>(tensor);
    change(wide);
    narrow.assign(wide.begin(), wide.end());
    integers.assign(wide.size(), 1);
    tensors.back().dtype = dtype;
    tensors.back().bytes = [&, dtype]() -> std::span<const std::byte> {
      if (dtype == DType::F64) return std::as_bytes(std::span(wide));
      if (dtype == DType::I32) return std::as_bytes(std::span(integers));
      return std::as_bytes(std::span(narrow));
    };
  }
  REQUIRE(found);
  write_safetensors(to, tensors, file.metadata());
}

/// A run's checkpoint after some steps, and the file of a test.
template <class T>
struct Run {
  Run() : model(Seed{3}), optimiser(model) {
    auto gradients = model.new_gradients();
    for (Index i = 0; i < gradients.values().size(); ++i)
      gradients.values()[i] = static_cast<compute_t<T>>(0.01) * static_cast<compute_t<T>>(i % 17 - 8);
    for (int i = 0; i < 2; ++i) optimiser.step(model, gradients, 1e-2);
    save_checkpoint(good, model, optimiser);
  }
  TemporaryFolder folder;
  std::filesystem::path good = folder.path / "good", bad = folder.path / "bad";
  Model<Hybrid, T> model;
  AdamW<Hybrid, T, cpu> optimiser;
};

template <class T>
void weights_whole_or_not_at_all(const std::string& kind) {
  const Run<T> run;
  Model<Hybrid, T> other(Seed{8});
  AdamW<Hybrid, T, cpu> optimiser(other);
  const auto before = all_of(other, optimiser);
  const auto message = [&](const std::string& name, DType dtype, const std::function<void(std::vector<double>&)>& f) {
    write_changed(run.good, run.bad, name, dtype, f);
    std::string first;
    for (AdamW<Hybrid, T, cpu>* with : {static_cast<AdamW<Hybrid, T, cpu>*>(nullptr), &optimiser}) {
      first = error_of([&] { load_weights(run.bad, other, with); });
      CHECK(all_of(other, optimiser) == before);
    }
    return first;
  };
  const auto set = [](std::size_t at, double value) {
    return [=](std::vector<double>& values) { values[at] = value; };
  };
  const auto same = [](std::vector<double>&) {};
  const std::string last = other.entries().back().name, first = other.entries().front().name;  // a norm; a matrix
  CHECK(has(message("weights." + last, DType::I32, same),
            "weights." + last + ": wanted F64, F32, F16 or BF16, came I32"));
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL})
    for (const std::string& name : {"weights." + last, kind + first}) {
      const std::string text = message(name, DType::F32, set(5, bad));
      CHECK(has(text, run.bad.string() + " does not fit this model:"));
      CHECK(has(text, name + ": value 5 is NaN or infinite"));
    }
  // Finite where it stands, and infinite as the model would hold it.
  CHECK(has(message(kind + first, DType::F64, set(3, 1e39)), kind + first + ": value 3 is NaN or infinite, as "));
  CHECK(has(message("weights." + last, DType::F64, set(3, -1e39)), "value 3 is NaN or infinite, as F32"));
  // All that is wrong is listed.
  write_changed(run.good, run.folder.path / "once", kind + first, DType::F32, set(0, HUGE_VAL));
  write_changed(run.folder.path / "once", run.bad, "weights." + last, DType::I32, same);
  const std::string both = error_of([&] { load_weights(run.bad, other); });
  CHECK(has(both, kind + first + ": value 0"));
  CHECK(has(both, "weights." + last + ": wanted F64"));
  CHECK(all_of(other, optimiser) == before);
  // And what is good is loaded, from any type of floating point.
  write_changed(run.good, run.bad, kind + first, DType::F64, same);
  load_weights(run.bad, other, &optimiser);
  CHECK(zamba_test::weights_of(other) == zamba_test::weights_of(run.model));
}

template <class T>
void resumes_whole_or_not_at_all() {
  const Run<T> run;
  Model<Hybrid, T> other(Seed{8});
  AdamW<Hybrid, T, cpu> optimiser(other);
  const auto before = all_of(other, optimiser);
  const std::string last = other.entries().back().name;
  const auto message = [&](const std::string& name, double value) {
    write_changed(run.good, run.bad, name, DType::F32, [&](std::vector<double>& values) { values[7] = value; });
    const std::string text = error_of([&] { load_checkpoint(Safetensors::open(run.bad), other, optimiser); });
    CHECK(all_of(other, optimiser) == before);
    return text;
  };
  for (const char* kind : {"weights.", "first_moments.", "second_moments."})
    for (const double bad : {std::nan(""), HUGE_VAL})
      CHECK(has(message(kind + last, bad), kind + last + ": value 7 is NaN or infinite"));
  if (!std::is_same_v<T, float>) {
    const std::string master = "master." + other.entries().front().name;
    CHECK(has(message(master, HUGE_VAL), master + ": value 7 is NaN or infinite"));
  }
  CHECK(has(message("second_moments." + last, -1e-3),
            "second_moments." + last + ": wanted means of squares, came negative values"));
  load_checkpoint(Safetensors::open(run.good), other, optimiser);
  save_checkpoint(run.bad, other, optimiser);
  CHECK(zamba_test::read_text(run.bad) == zamba_test::read_text(run.good));
}

}  // namespace

TEST_SUITE("train/checkpoint") {
  TEST_CASE("load_weights: all of a file, or an error and nothing") {
    weights_whole_or_not_at_all<float>("weights.");
    weights_whole_or_not_at_all<bf16>("master.");
  }

  TEST_CASE("load_weights: what is finite in float may not be in bfloat16") {
    const Run<float> run;
    const std::string name = "weights." + run.model.entries().front().name;
    write_changed(run.good, run.bad, name, DType::F32,
                  [](std::vector<double>& values) { values[1] = std::numeric_limits<float>::max(); });
    Model<Hybrid, bf16> narrow(Seed{8});
    const auto before = zamba_test::weights_of(narrow);
    CHECK(has(error_of([&] { load_weights(run.bad, narrow); }), name + ": value 1 is NaN or infinite, as BF16"));
    CHECK(zamba_test::weights_of(narrow) == before);
    Model<Hybrid, float> wide(Seed{8});
    load_weights(run.bad, wide);
    CHECK(wide.read(wide.entries().front())[1] == std::numeric_limits<float>::max());
    load_weights(run.good, narrow);
  }

  TEST_CASE("load_checkpoint: model, moments and steps, or an error and nothing") {
    resumes_whole_or_not_at_all<float>();
    resumes_whole_or_not_at_all<bf16>();
  }

  TEST_CASE("load_checkpoint: bf16 weights are the roundings of their masters, as SplitFloat rounds") {
    const Run<bf16> run;
    const ParameterEntry& entry = run.model.entries().front();
    // Between 1 and its neighbour above, which is the odd one: weights by ties to even are the one below.
    constexpr double tie = 1 + 0x1p-8;
    write_changed(run.good, run.bad, "master." + entry.name, DType::F32,
                  [](std::vector<double>& values) { values[7] = tie; });
    Model<Hybrid, bf16> other(Seed{8});
    AdamW<Hybrid, bf16, cpu> optimiser(other);
    const auto check = [&] {
      CHECK(zamba_test::masters_of(other, optimiser, entry)[7] == tie);
      CHECK(other.read(entry)[7] == 1 + 0x1p-7);
    };
    load_checkpoint(Safetensors::open(run.bad), other, optimiser);
    check();
    load_weights(run.good, other, &optimiser);
    load_weights(run.bad, other, &optimiser);
    check();
  }

  TEST_CASE("a number that is not finite is not saved, and the file before it stays") {
    Run<float> run;
    const std::string before = zamba_test::read_text(run.good);
    const ParameterEntry& entry = run.model.entries()[4];
    const auto weights = run.model.read(entry);
    for (const double bad : {std::nan(""), HUGE_VAL}) {
      auto values = weights;
      values.back() = bad;
      run.model.write(entry, values);
      CHECK(has(error_of([&] { save_checkpoint(run.good, run.model, run.optimiser); }),
                "weights." + entry.name + ": value " + std::to_string(entry.size - 1) + " is NaN or infinite"));
      CHECK(zamba_test::read_text(run.good) == before);
    }
    run.model.write(entry, weights);
    run.optimiser.first_moments()[entry.offset] = HUGE_VALF;
    CHECK_THROWS_AS(save_checkpoint(run.good, run.model, run.optimiser), Error);
    CHECK(zamba_test::read_text(run.good) == before);
  }
}
