// SPDX-License-Identifier: MIT
// check_reference<Net, T, Device>(directory): a model against everything that a reference case holds.
//
//   config.json, model.safetensors    the checkpoint, loaded as by load_huggingface
//   reference.safetensors             numbers of an independent implementation, in float32:
//     input_ids (B, L), logits (B, L, V), hidden_states.I (B, L, d), cache.{conv,ssm,key,value}.I, greedy_ids (B, L +
//     n), loss, grad.PARAM, train.losses, train.param.PARAM
//
// PARAM is the name in model.safetensors. hidden_states.I is what enters layer I, or leaves it where the family's
// CheckpointFormat has hidden_states_leave_layers; the last one is the final norm's output. Caches are layer I's state
// after input_ids; the loss is the mean over B (L - 1) next tokens; training is AdamW at a learning rate of 1e-3, betas
// 0.9 and 0.95, eps 1e-8, decay 0.1 where the listing says so, gradients clipped to norm 1.
//
// A tensor that the case lacks is not compared, but logits must be there; one that nothing here compares fails the
// check, and so does a NaN. Errors are relative, by norm, the worst tensor of each group. On a device that does not
// train, losses, gradients and trained parameters are left out.
//
// What is allowed, and why: testing/reference_bounds.hpp. Where a network magnifies rounding, the reference's too, what
// is held against it in training is less: testing/check_reference/training.hpp.
#pragma once

#include <filesystem>
#include <string>

#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/checkpoints/zamba2.hpp>
#include <zamba/error.hpp>
#include <zamba/testing/check_reference/inference.hpp>
#include <zamba/testing/check_reference/run.hpp>
#include <zamba/testing/check_reference/training.hpp>
#include <zamba/testing/reference_bounds.hpp>
#include <zamba/testing/report.hpp>

namespace zamba::testing {

/// Compares Net, stored as T on Device, with the case in `directory`, within the given bounds. A case that cannot be
/// read, or does not fit the type, is a failed line of the report, too.
template <class Net, class T = double, class Device = cpu>
Report check_reference(const std::filesystem::path& directory, const ReferenceBounds& bounds = reference_bounds<T>()) {
  Report report("reference case '" + directory.string() + "'");
  try {
    detail::ReferenceRun<Net, T, Device> run(directory, bounds, report);
    detail::InferenceCheck<Net, T, Device>(run).run();
    if constexpr (trains<Device> && Number<weight_t<T>>) {
      detail::TrainingCheck<Net, T, Device>(run).run();
    } else {
      for (const char* prefix : {"loss", "grad.", "train."}) run.reference.leave_out(prefix);
    }
    for (const std::string& name : run.reference.unused())
      report.expect(name, false, "is of a kind that is not compared");
  } catch (const Error& error) {
    report.expect("the case can be used", false, error.what());
  }
  return report;
}

}  // namespace zamba::testing
