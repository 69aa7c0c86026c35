// SPDX-License-Identifier: MIT
// check_reference passes on a reference case, and fails on every kind of damage to it.
#include <zamba/testing/check_reference.hpp>

#include <set>

#include <doctest/doctest.h>

#include <tests/support/cases.hpp>

using namespace zamba_test;
using zamba::testing::check_reference;
using zamba::testing::Report;

namespace {

using Names = std::set<std::string>;

Names failed_lines(const Report& report) {
  Names names;
  for (const auto& line : report.lines())
    if (!line.passed()) names.insert(line.name);
  return names;
}

Report after(const std::string& file, const std::function<void(HeldTensors&)>& edit) {
  const CaseCopy copy("zamba");
  copy.edit(file, edit);
  return check_reference<ZambaCase, double>(copy.path());
}

/// Moves one element of a float tensor by a twentieth of the tensor's root mean square.
void nudge(HeldTensors::Tensor& tensor, std::size_t i) {
  const std::size_t count = tensor.bytes.size() / sizeof(float);
  double squares = 0;
  for (std::size_t k = 0; k < count; ++k) squares += tensor.element<float>(k) * tensor.element<float>(k);
  tensor.element<float>(i % count) += static_cast<float>(0.05 * std::sqrt(squares / static_cast<double>(count)));
}

/// The lines that fail once one number of the named tensor of the reference is off.
Names failed_by(const std::string& name, std::size_t i) {
  return failed_lines(after("reference.safetensors", [&](HeldTensors& tensors) { nudge(tensors[name], i); }));
}

Names both_ways(const std::string& name) { return {name + ", extend", name + ", extend in chunks"}; }

}  // namespace

TEST_CASE("check_reference: the case zamba, complete, in double") {
  const Report report = check_reference<ZambaCase, double>(case_path("zamba"));
  INFO(report);
  CHECK(report.passed());
  Names lines;
  for (const auto& line : report.lines()) lines.insert(line.name);
  const Names wanted{"logits",
                     "hidden_states",
                     "logits, extend",
                     "logits, extend in chunks",
                     "cache.conv, extend",
                     "cache.ssm, extend",
                     "cache.key, extend",
                     "cache.value, extend",
                     "cache.conv, extend in chunks",
                     "cache.ssm, extend in chunks",
                     "cache.key, extend in chunks",
                     "cache.value, extend in chunks",
                     "greedy_ids",
                     "loss",
                     "grad",
                     "loss, recomputed",
                     "grad, recomputed",
                     "train.losses",
                     "train.param"};
  CHECK(lines == wanted);
}

TEST_CASE("check_reference: one wrong number in the reference fails the lines of its kind") {
  CHECK(failed_by("logits", 777) == Names{"logits", "logits, extend", "logits, extend in chunks"});
  for (const char* name : {"hidden_states.0", "hidden_states.4", "hidden_states.9"})
    CHECK(failed_by(name, 100) == Names{"hidden_states"});
  CHECK(failed_by("cache.conv.3", 6) == both_ways("cache.conv"));
  CHECK(failed_by("cache.conv.3", 0) == Names{"cache.conv, extend in chunks"});  // the oldest of d_conv inputs
  CHECK(failed_by("cache.ssm.7", 1000) == both_ways("cache.ssm"));
  CHECK(failed_by("cache.key.2", 50) == both_ways("cache.key"));
  CHECK(failed_by("cache.value.7", 51) == both_ways("cache.value"));
  CHECK(failed_by("loss", 0) == Names{"loss", "loss, recomputed"});
  for (const char* name : {"grad.model.embed_tokens.weight", "grad.model.layers.0.mamba.in_proj.weight",
                           "grad.model.layers.7.mamba_decoder.mamba.dt_proj_bias",
                           "grad.model.layers.2.shared_transf.self_attn.k_proj.weight"})
    CHECK(failed_by(name, 40) == Names{"grad", "grad, recomputed"});
  CHECK(failed_by("train.losses", 7) == Names{"train.losses"});
  CHECK(failed_by("train.param.model.layers.1.mamba.in_proj.weight", 3) == Names{"train.param"});
  CHECK(failed_lines(after("reference.safetensors", [](HeldTensors& tensors) {
          auto& ids = tensors["greedy_ids"];
          auto& last = ids.element<std::int64_t>(ids.bytes.size() / 8 - 1);
          last = last == 5 ? 6 : 5;
        })) == Names{"greedy_ids"});
}

TEST_CASE("check_reference: a network that magnifies rounding is held to what its case can tell") {
  const auto failed_by = [](const std::string& name, std::size_t i) {
    const CaseCopy copy("zamba2-two-blocks");
    copy.edit("reference.safetensors", [&](HeldTensors& tensors) { nudge(tensors[name], i); });
    return failed_lines(check_reference<Zamba2TwoBlocksCase, double>(copy.path()));
  };
  // The gradient that moves most, by 2e-4, and one that does not move.
  for (const char* name : {"grad.model.layers.2.mamba.dt_bias", "grad.model.final_layernorm.weight"})
    CHECK(failed_by(name, 1) == Names{"grad", "grad, recomputed"});
  for (const std::size_t step : {0, 1, 2, 3, 4}) {
    CAPTURE(step);
    CHECK(failed_by("train.losses", step) == Names{"train.losses"});
  }
  CHECK(failed_by("logits", 777) == Names{"logits", "logits, extend", "logits, extend in chunks"});
}

TEST_CASE("check_reference: a NaN in the reference never passes") {
  for (const char* name : {"logits", "cache.ssm.0", "grad.model.final_layernorm.weight", "train.losses"}) {
    const Report report =
        after("reference.safetensors", [&](HeldTensors& tensors) { tensors[name].element<float>(0) = std::nanf(""); });
    CHECK(!report.passed());
  }
}

TEST_CASE("check_reference: one wrong weight fails nearly every line") {
  for (const char* name :
       {"model.layers.4.mamba.in_proj.weight", "model.layers.2.shared_transf.self_attn.q_proj.weight",
        "model.layers.8.mamba.conv1d.bias"}) {
    const Report report = after("model.safetensors", [&](HeldTensors& tensors) { nudge(tensors[name], 9); });
    const auto failed = failed_lines(report);
    for (const std::string& line : Names{"logits", "hidden_states", "logits, extend", "grad", "train.losses"}) {
      CAPTURE(line);
      CHECK(failed.contains(line));
    }
  }
}

TEST_CASE("check_reference: halves of in_proj that are not interleaved are noticed") {
  const auto halves = [](HeldTensors::Tensor& tensor) {
    const std::size_t row = 32 * sizeof(float), D = 64;
    auto bytes = tensor.bytes;
    for (std::size_t r = 0; r < 2 * D; ++r)
      std::copy_n(tensor.bytes.begin() + static_cast<Index>((r < D ? 2 * r : 2 * (r - D) + 1) * row), row,
                  bytes.begin() + static_cast<Index>(r * row));
    tensor.bytes = bytes;
  };
  CHECK(failed_lines(after("reference.safetensors", [&](HeldTensors& tensors) {
          halves(tensors["grad.model.layers.5.mamba.in_proj.weight"]);
        })) == Names{"grad", "grad, recomputed"});
}

TEST_CASE("check_reference: what cannot be compared fails") {
  const auto reference = [](const std::function<void(HeldTensors&)>& edit) {
    return failed_lines(after("reference.safetensors", edit));
  };
  const Names unusable{"the case can be used"};
  CHECK(reference([](HeldTensors& tensors) { tensors.erase("logits"); }) == unusable);
  CHECK(reference([](HeldTensors& tensors) { tensors.erase("input_ids"); }) == unusable);
  CHECK(reference([](HeldTensors& tensors) { tensors["input_ids"].element<std::int64_t>(3) = 96; }) == unusable);
  CHECK(reference([](HeldTensors& tensors) { tensors["logits"].name = "logit"; }) == unusable);
  CHECK(reference([](HeldTensors& tensors) { tensors.add_copy("cache.ssm.3", "cache.ssm.9"); }) ==
        Names{"cache.ssm.9"});
  CHECK(reference([](HeldTensors& tensors) { tensors.add_copy("loss", "perplexity"); }) == Names{"perplexity"});
  CHECK(reference([](HeldTensors& tensors) {
          tensors.add_copy("grad.model.final_layernorm.weight", "grad.model.layers.9.input_layernorm.weight");
        }) == Names{"grad", "grad, recomputed"});
  CHECK(reference([](HeldTensors& tensors) {
          auto& cache = tensors["cache.ssm.3"];
          std::swap(cache.shape[2], cache.shape[3]);
        }) == both_ways("cache.ssm"));

  CHECK(failed_lines(check_reference<ZambaCase, double>("/no/such/case")) == unusable);
  CHECK(failed_lines(check_reference<ZambaCase, double>(case_path("zamba-gqa"))) == unusable);
}

TEST_CASE("check_reference: a case without some tensors skips their lines") {
  const Report report = after("reference.safetensors", [](HeldTensors& tensors) {
    std::erase_if(tensors.tensors, [](const auto& tensor) {
      return tensor.name != "input_ids" && tensor.name != "logits" && tensor.name != "cache.ssm.4";
    });
  });
  CHECK(report.passed());
  CHECK(report.lines().size() == 5);
}
