// SPDX-License-Identifier: MIT
// CheckpointFormat: a family of a test's own, whose files hold some parameters in several tensors.
#include <zamba/checkpoints/format.hpp>
#include <zamba/checkpoints/mamba.hpp>

#include <doctest/doctest.h>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/testing/check_reference.hpp>

#include <tests/support/cases.hpp>
#include <tests/support/nets.hpp>

using namespace zamba_test;

namespace {

/// in_proj (80, 20) is u_proj (40, 20), then z_proj (40, 20) in layer 0; of 30, 2 and 48 rows in layer 1, the last two
/// in another order.
using SplitNet = Plain;

CheckpointParameter split_parameter(const ParameterEntry& entry) {
  if (entry.name == "layers.0.in_proj.weight")
    return {{{"0.u_proj.weight", {40, 20}}, {"0.z_proj.weight", {40, 20}, {"0.z_copy.weight"}}}};
  if (entry.name == "layers.1.in_proj.weight") {
    return {{{"1.in_proj.first", {30, 20}},
             {.name = "1.in_proj.second", .shape = {2, 1, 20}, .interleaved = true},
             {.name = "1.in_proj.third", .shape = {48, 20}, .interleaved = true}}};
  }
  if (entry.name == "layers.0.in_proj.bias") return {{{"0.u_proj.bias", {40}}, {"0.z_proj.bias", {40}}}};
  return CheckpointTensor{entry.name, entry.shape};
}

std::vector<std::vector<double>> all_values(const Model<SplitNet, double>& model) {
  std::vector<std::vector<double>> values;
  for (const ParameterEntry& entry : model.entries()) values.push_back(model.read(entry));
  return values;
}

}  // namespace

namespace zamba {

template <>
struct CheckpointFormat<SplitNet> {
  static CheckpointLayout layout(const std::vector<ParameterEntry>& entries) {
    CheckpointLayout layout{{{"model_type", "split"}}, nlohmann::json::object(), {}};
    for (const ParameterEntry& entry : entries) layout.parameters.push_back(split_parameter(entry));
    return layout;
  }
};

}  // namespace zamba

TEST_CASE("checkpoint_format: the rows of a parameter in several tensors of the file") {
  const TemporaryFolder folder;
  const auto model = random_model<SplitNet, double>();
  save_huggingface(model, folder.path / "first");
  HeldTensors saved(folder.path / "first" / "model.safetensors");

  const auto rows = model.read(entry_of(model.entries(), "layers.0.in_proj.weight"));
  for (std::size_t i = 0; i < 40 * 20; ++i) {
    REQUIRE(saved["0.u_proj.weight"].element<double>(i) == rows[i]);
    REQUIRE(saved["0.z_proj.weight"].element<double>(i) == rows[40 * 20 + i]);
  }
  const auto bias = model.read(entry_of(model.entries(), "layers.0.in_proj.bias"));
  for (std::size_t i = 0; i < 40; ++i) CHECK(saved["0.z_proj.bias"].element<double>(i) == bias[40 + i]);
  // Rows 2c and 2c + 1 of a part in another order are its rows c and rows / 2 + c.
  const auto others = model.read(entry_of(model.entries(), "layers.1.in_proj.weight"));
  for (std::size_t c = 0; c < 24; ++c)
    for (std::size_t k = 0; k < 20; ++k) {
      REQUIRE(saved["1.in_proj.third"].element<double>(2 * c * 20 + k) == others[(32 + c) * 20 + k]);
      REQUIRE(saved["1.in_proj.third"].element<double>((2 * c + 1) * 20 + k) == others[(32 + 24 + c) * 20 + k]);
    }

  const auto loaded = load_huggingface<SplitNet, double>(folder.path / "first");
  CHECK(all_values(loaded) == all_values(model));
  save_huggingface(loaded, folder.path / "second");
  CHECK(read_text(folder.path / "first" / "model.safetensors") ==
        read_text(folder.path / "second" / "model.safetensors"));
  const auto rounded = load_huggingface<SplitNet, bf16>(folder.path / "first");
  for (const ParameterEntry& entry : model.entries())
    CHECK(rounded.read(entry_of(rounded.entries(), entry.name)) ==
          model.to<bf16>().read(entry_of(rounded.entries(), entry.name)));
}

TEST_CASE("checkpoint_format: a part that does not fit is named, and the model stays as it was") {
  const TemporaryFolder folder;
  auto model = random_model<SplitNet, double>();
  save_huggingface(model, folder.path);
  const auto path = folder.path / "model.safetensors";
  HeldTensors tensors(path);
  tensors.add_copy("0.z_proj.weight", "0.z_copy.weight");
  tensors.write(path);
  CHECK(message_of([&] { load_huggingface(model, folder.path); }) == "");

  const auto before = all_values(model);
  auto& copy = tensors["0.z_copy.weight"].element<double>(3);
  const double right = std::exchange(copy, copy + 1);
  tensors.write(path);
  CHECK(contains(message_of([&] { load_huggingface(model, folder.path); }),
                 "0.z_copy.weight: wanted the same values as in 0.z_proj.weight"));
  copy = right;
  tensors["0.u_proj.bias"].shape = {20};
  tensors["0.u_proj.bias"].bytes.resize(20 * sizeof(double));
  tensors.erase("0.u_proj.weight");
  tensors["1.in_proj.second"].name = "1.in_proj.fourth";
  tensors.write(path);
  const std::string message = message_of([&] { load_huggingface(model, folder.path); });
  CAPTURE(message);
  CHECK(contains(message, "0.u_proj.weight: missing, wanted with shape (40, 20)"));
  CHECK(contains(message, "0.u_proj.bias: wanted shape (40), came (20)"));
  CHECK(contains(message, "1.in_proj.second: missing, wanted with shape (2, 1, 20)"));
  CHECK(contains(message, "'1.in_proj.fourth': surplus"));
  CHECK(std::count(message.begin(), message.end(), '\n') == 4);
  CHECK(all_values(model) == before);
}

TEST_CASE("checkpoint_format: gradients of a reference case are compared part by part") {
  const auto model = random_model<SplitNet, double>();
  const std::vector<Token> tokens = random_tokens(8);
  std::vector<Token> targets(tokens.begin() + 1, tokens.end());
  targets.push_back(-1);
  const std::vector<Index> offsets{0, 8};
  auto gradients = model.new_gradients();
  model.loss_and_gradients({tokens, targets, offsets}, gradients);

  // A case of gradients only: its logits are ones, which fail in lines of their own.
  const TemporaryFolder folder;
  save_huggingface(model, folder.path);
  HeldTensors reference(folder.path / "model.safetensors");
  for (auto& tensor : reference.tensors) tensor.name = "grad." + tensor.name;
  const auto layout = CheckpointFormat<SplitNet>::layout(model.entries());
  for (const auto& part : detail::parameter_parts(model.entries(), layout)) {
    const double* first = gradients.values().data + part.entry->offset + part.first * part.cols;
    detail::to_file_order(part, reinterpret_cast<const std::byte*>(first),
                          reference["grad." + part.tensor->name].bytes.data(), part.cols * Index{sizeof(double)});
  }
  auto& ids = reference.tensors.emplace_back(HeldTensors::Tensor{"input_ids", DType::I64, {1, 8}, {}});
  ids.bytes.resize(8 * sizeof(std::int64_t));
  for (std::size_t i = 0; i < 8; ++i) ids.element<std::int64_t>(i) = tokens[i];
  auto& logits = reference.tensors.emplace_back(HeldTensors::Tensor{"logits", DType::F64, {1, 8, vocabulary}, {}});
  logits.bytes.resize(8 * vocabulary * sizeof(double));
  for (std::size_t i = 0; i < 8 * vocabulary; ++i) logits.element<double>(i) = 1;
  const auto line = [&] {
    reference.write(folder.path / "reference.safetensors");
    const auto report = zamba::testing::check_reference<SplitNet>(folder.path);
    const auto& lines = report.lines();
    const auto at = std::find_if(lines.begin(), lines.end(), [](const auto& entry) { return entry.name == "grad"; });
    REQUIRE(at != lines.end());
    return *at;
  };
  CHECK(line().passed());
  for (const char* part : {"0.u_proj.weight", "0.z_proj.bias", "1.in_proj.third"}) {
    auto& value = reference[std::string("grad.") + part].element<double>(7);
    const double right = std::exchange(value, value + 1);
    CHECK_FALSE(line().passed());
    CHECK(contains(line().note, part));
    value = right;
  }
}

TEST_CASE("checkpoint_format: a layout whose parts are not the parameter is refused") {
  const auto entries = detail::list_parameters<SplitNet, float>();
  auto layout = CheckpointFormat<SplitNet>::layout(entries);
  const auto message = [&] { return message_of([&] { detail::parameter_parts(entries, layout); }); };
  CHECK(message() == "");
  const auto at = static_cast<std::size_t>(&entry_of(entries, "layers.0.in_proj.weight") - entries.data());
  auto& parts = layout.parameters[at].parts;
  parts[1].shape = {41, 20};
  CHECK(contains(message(), "layers.0.in_proj.weight has 80 rows, its parts hold 81"));
  parts[1].shape = {39, 21};
  CHECK(contains(message(), "0.z_proj.weight must hold whole rows of 20 elements"));
  parts[1] = {.name = "odd", .shape = {40, 20}};
  parts[0] = {.name = "odd", .shape = {39, 20}, .interleaved = true};
  CHECK(contains(message(), "odd is interleaved, which wants an even number of rows, came 39"));
  layout.parameters.pop_back();
  CHECK(contains(message(), "parameters wanted, came"));
}
