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
// Bounds by storage type, with the greatest errors met in the cases zamba and zamba-gqa (7 and 9 layers):
//   double     3e-7 (gradients 1.2e-6): the reference holds float32, and computes its norms in float32. Allowed: 5e-6,
//              gradients 2e-5, losses 1e-5, trained parameters 1e-4
//   float      1.0e-6 (gradients 4.6e-6, losses 1.1e-6, trained parameters 2.3e-6): rounding of float32 in every layer,
//              growing with depth. Allowed: ten times that
//   bf16       1.3e-2 (gradients 6.2e-2, losses 9.8e-3, trained parameters 4.2e-3): every weight is rounded to 8 bits,
//              2^-9 at most. Allowed: three to five times that. A greedy choice between near equals may differ, so the
//              reference's token must be within the logits' bound of the best, along the reference's continuation
// A caller may give other bounds: on CUDA activations are bf16 too, and what that costs depends on the case.
//
// A network may magnify rounding, the reference's too, beyond those bounds. So where a tensor's gradient, a loss of
// training or a trained parameter exceeds its bound, that very result is computed again with every weight moved by a
// rounding of float32, five times over, and six times the greatest movement is allowed: what a case cannot tell is not
// held against the network. In the case zamba2-two-blocks gradients move by up to 1.7e-4, and losses by 2e-7 at first
// and 6e-2 after seven steps, since AdamW's first steps take little but the signs of a gradient. Logits, states and the
// first loss know no such allowance, and no result of the cases zamba, zamba-gqa and zamba2 needs it.
#pragma once

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/zamba.hpp>
#include <zamba/checkpoints/zamba2.hpp>
#include <zamba/context.hpp>
#include <zamba/io/safetensors.hpp>
#include <zamba/model.hpp>
#include <zamba/ops/rms_norm.hpp>
#include <zamba/testing/reference_case.hpp>
#include <zamba/testing/report.hpp>
#include <zamba/train/adamw.hpp>

namespace zamba::testing {

/// What check_reference allows.
struct ReferenceBounds {
  double logits;
  double hidden_states;
  double caches;
  double gradients;  // per tensor
  double losses;
  double parameters;  // after training
  bool greedy_identical;
};

template <class T>
constexpr ReferenceBounds reference_bounds() {
  if constexpr (std::is_same_v<T, double>)
    return {5e-6, 5e-6, 5e-6, 2e-5, 1e-5, 1e-4, true};
  else if constexpr (std::is_same_v<T, float>)
    return {1e-5, 1e-5, 1e-5, 5e-5, 1e-5, 2e-5, true};
  else
    return {5e-2, 5e-2, 5e-2, 2e-1, 3e-2, 2e-2, false};
}

namespace detail {

/// The error of several tensors that is worst for its bound.
class Group {
 public:
  void add(const std::string& name, double error, double bound) {
    ++count_;
    const bool worse = error / bound > worst_ / bound_ || is_nan(error);  // a NaN is worse than any number
    if (count_ > 1 && (is_nan(worst_) || !worse)) return;
    worst_ = error;
    bound_ = bound;
    name_ = name;
  }
  void report(Report& report, const std::string& group) const {
    if (count_ == 0) return;
    report.add(group, worst_, bound_, count_ == 1 ? name_ : "the worst of " + std::to_string(count_) + " is " + name_);
  }

 private:
  int count_ = 0;
  double worst_ = 0, bound_ = 1;
  std::string name_;
};

/// Compares the state with cache.*.I of the case.
inline void compare_caches(ReferenceCase& reference, const std::vector<StateValues>& state, Index batch,
                           const std::string& how, double bound, Report& report) {
  const std::map<std::string, std::string> kinds{
      {"conv", "conv"}, {"scan", "ssm"}, {"keys", "key"}, {"values", "value"}};
  std::map<std::string, Group> groups;
  for (const StateValues& ours : state) {
    const std::size_t dot = ours.name.rfind('.');
    const std::string part = ours.name.substr(dot + 1), layer = ours.name.substr(0, dot);
    const auto kind = kinds.find(part);
    if (kind == kinds.end()) continue;
    const std::string name = "cache." + kind->second + layer.substr(layer.rfind('.'));
    if (const TensorEntry* entry = reference.find(name)) {
      const Values wanted = cache_in_our_order(*entry, part, batch, ours.rows, ours.width);
      groups[kind->second].add(name, relative_error(ours.values, wanted), bound);
    }
  }
  for (const auto& [kind, group] : groups) group.report(report, "cache." + kind + how);
}

/// The values of one part of a parameter, in the order of its file.
inline Values file_order(const Values& values, const zamba::detail::ParameterPart& part) {
  Values ordered(static_cast<std::size_t>(part.rows * part.cols));
  zamba::detail::to_file_order(part, reinterpret_cast<const std::byte*>(values.data() + part.first * part.cols),
                               reinterpret_cast<std::byte*>(ordered.data()),
                               part.cols * static_cast<Index>(sizeof(double)));
  return ordered;
}

/// Compares values(entry) of every parameter with prefix + the names of its parts in the file. guard: the root mean
/// square below which a tensor is measured as if it had that one, as a share of the root mean square of all.
/// bound(entry, error): what an error may be.
template <class ReadValues, class Bound>
void compare_parameters(ReferenceCase& reference, const std::string& prefix, const std::vector<ParameterEntry>& entries,
                        const CheckpointLayout& layout, double guard, ReadValues&& values, Bound&& bound,
                        Group& group) {
  double squares = 0, count = 0;
  for (const std::string& name : reference.names(prefix)) {
    for (const double v : read_values<double>(*reference.find(prefix + name))) squares += v * v, ++count;
  }
  std::set<std::string> known;
  for (const auto& part : zamba::detail::parameter_parts(entries, layout)) {
    const std::string name = prefix + part.tensor->name;
    known.insert(name);
    const TensorEntry* entry = reference.find(name);
    if (!entry) continue;
    const Values wanted = read_values<double>(*entry), got = file_order(values(*part.entry), part);
    if (!zamba::detail::same_shape(entry->shape, part.tensor->shape)) {
      group.add(name + " (of another shape)", std::nan(""), 0);
      continue;
    }
    double difference = 0, norm = 0;
    for (std::size_t k = 0; k < wanted.size(); ++k) {
      difference += (got[k] - wanted[k]) * (got[k] - wanted[k]);
      norm += wanted[k] * wanted[k];
    }
    const double least = guard * guard * squares / count * static_cast<double>(wanted.size());
    const double error = std::sqrt(difference / std::max(norm, least));
    group.add(name, error, bound(*part.entry, error));
  }
  for (const std::string& name : reference.names(prefix))
    if (!known.contains(prefix + name)) group.add(prefix + name + " (no such parameter)", std::nan(""), 0);
}

template <class Net, class T, class Device>
class ReferenceCheck {
 public:
  using F = compute_t<T>;
  using A = activation_t<T, Device>;
  using ModelType = Model<Net, T, Device>;
  using StateType = typename ModelType::StateType;

  ReferenceCheck(const std::filesystem::path& directory, const ReferenceBounds& bounds, Report& report)
      : bounds_(bounds),
        report_(report),
        reference_(directory),
        model_(load_huggingface<Net, T, Device>(directory)),
        layout_(CheckpointFormat<Net>::layout(model_.entries())) {
    ids_ = reference_.ids("input_ids", batch_, length_);
    for (const Token id : ids_)
      require(id >= 0 && id < Net::vocabulary, "reference.safetensors: input_ids holds ", id,
              ", outside the vocabulary of ", Net::vocabulary);
  }

  void run() {
    require(reference_.find("logits"), "reference.safetensors: there is no logits");
    forward();
    extend({length_}, "extend");
    extend({1, 3, length_ - 1, length_}, "extend in chunks");
    greedy();
    if constexpr (trains<Device> && Number<weight_t<T>>) {
      gradients(false);
      gradients(true);
      train();
    } else {
      for (const char* prefix : {"loss", "grad.", "train."}) reference_.leave_out(prefix);
    }
    for (const std::string& name : reference_.unused())
      report_.expect(name, false, "is of a kind that is not compared");
  }

 private:
  static Values to_host(const A* data, Index size) {
    std::vector<A> values(static_cast<std::size_t>(size));
    Memory<Device>::copy_to_host(values.data(), data, values.size() * sizeof(A));
    return {values.begin(), values.end()};
  }

  static constexpr bool hidden_states_leave() {
    if constexpr (requires { CheckpointFormat<Net>::hidden_states_leave_layers; })
      return CheckpointFormat<Net>::hidden_states_leave_layers;
    else
      return false;
  }

  double error(const std::string& name, const Values& got) {
    return relative_error(got, read_values<double>(*reference_.find(name)));
  }

  /// The whole batch at once, without a state: logits and hidden states.
  void forward() {
    auto& ctx = this_thread_context<Device>();
    ArenaScope scope(ctx.arena());
    const std::vector<Index> offsets = this->offsets();
    const Index tokens = batch_ * length_;
    const Sequences sequences{ctx.readable(offsets.data(), batch_ + 1), nullptr, batch_, tokens, length_};
    const auto s = Net::template forward<A>(ctx, model_.parameters(), ctx.readable(ids_.data(), tokens), sequences,
                                            typename StateType::Views{}, Keep::layer_inputs);
    const auto h = ctx.arena().template tensor<A>(tokens, Net::d_model);
    const auto rstd = ctx.arena().template tensor<F>(tokens);
    const auto logits = ctx.arena().template tensor<A>(tokens, Net::vocabulary);
    rms_norm(ctx, s.x, {}, model_.parameters().final_norm, Net::norm_eps, h, rstd);
    Net::logits(ctx, model_.parameters(), Matrix<const A>(s.x), logits);
    report_.add("logits", error("logits", to_host(logits.data, logits.size())), bounds_.logits, "without a state");

    Group group;
    std::vector<const A*> hidden;
    for (const auto& x : s.stack.x) hidden.push_back(x.data);
    if (hidden_states_leave()) {
      hidden.erase(hidden.begin());
      hidden.push_back(s.x.data);
    }
    hidden.push_back(h.data);
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      const std::string name = "hidden_states." + std::to_string(i);
      if (reference_.find(name)) group.add(name, error(name, to_host(hidden[i], h.size())), bounds_.hidden_states);
    }
    group.report(report_, "hidden_states");
  }

  /// The batch through a state, cut at the given positions: logits of all positions and the state that is left.
  void extend(const std::vector<Index>& ends, const std::string& how) {
    StateType state = model_.new_state({batch_, length_});
    Values all(static_cast<std::size_t>(batch_ * length_ * Net::vocabulary));
    std::vector<StateValues> before_last;
    for (Index begin = 0; const Index end : ends) {
      const Index count = std::min(end, length_) - begin;
      if (count <= 0) continue;
      if (begin > 0 && begin + 1 == length_) before_last = values_of(state);
      const Values logits = append(state, ids_, length_, begin, count, Positions::all);
      for (Index row = 0; row < batch_; ++row)
        std::copy_n(logits.begin() + row * count * Net::vocabulary, count * Net::vocabulary,
                    all.begin() + (row * length_ + begin) * Net::vocabulary);
      begin += count;
    }
    report_.add("logits, " + how, error("logits", all), bounds_.logits);
    std::vector<StateValues> values = values_of(state);
    for (std::size_t i = 0; i < before_last.size(); ++i)
      if (values[i].name.ends_with(".conv")) values[i] = with_oldest(before_last[i], values[i], batch_);
    compare_caches(reference_, values, batch_, ", " + how, bounds_.caches, report_);
  }

  std::vector<StateValues> values_of(const StateType& state) const {
    std::vector<StateValues> values;
    auto views = state.views();
    visit_state<Net>(views, [&](const Name& name, auto& tensor, Index rows, Index width) {
      using Element = std::remove_reference_t<decltype(*tensor.data)>;
      if (rows == per_position) rows = state.length();
      std::vector<Element> part(static_cast<std::size_t>(rows * width));
      StateValues& ours = values.emplace_back(StateValues{name.str(), rows, width, {}});
      for (Index row = 0; row < batch_; ++row) {
        Memory<Device>::copy_to_host(part.data(), tensor[row].data, part.size() * sizeof(Element));
        for (const Element v : part) ours.values.push_back(static_cast<double>(static_cast<F>(v)));
      }
    });
    return values;
  }

  /// Appends `count` tokens to every row, from position `begin` of rows of `length` tokens.
  Values append(StateType& state, const std::vector<Token>& ids, Index length, Index begin, Index count,
                Positions positions) {
    std::vector<Token> tokens;
    for (Index row = 0; row < batch_; ++row)
      tokens.insert(tokens.end(), ids.begin() + row * length + begin, ids.begin() + row * length + begin + count);
    const std::vector<Index> lengths(static_cast<std::size_t>(batch_), count);
    const auto logits = model_.extend(state, {tokens, lengths}, positions);
    return to_host(logits.data, logits.size());
  }

  /// The greedy continuation, token by token through the state.
  void greedy() {
    if (!reference_.find("greedy_ids")) return;
    Index batch = 0, length = 0;
    const std::vector<Token> wanted = reference_.ids("greedy_ids", batch, length);
    require(batch == batch_ && length > length_, "reference.safetensors: greedy_ids must continue input_ids");
    std::vector<Token> ids = wanted;
    for (Index row = 0; row < batch_; ++row)
      std::copy_n(ids_.begin() + row * length_, length_, ids.begin() + row * length);
    StateType state = model_.new_state({batch_, length});
    Values logits = append(state, ids, length, 0, length_, Positions::last);
    double shortfall = 0;
    Index different = 0;
    for (Index at = length_; at < length; ++at) {
      for (Index row = 0; row < batch_; ++row) {
        const auto first = logits.begin() + row * Net::vocabulary,
                   best = std::max_element(first, first + Net::vocabulary);
        Token& id = ids[static_cast<std::size_t>(row * length + at)];
        const double norm = std::sqrt(std::inner_product(first, first + Net::vocabulary, first, 0.0));
        const bool valid = id >= 0 && id < Net::vocabulary;
        shortfall = std::max(shortfall, valid ? (*best - *(first + id)) / norm : 1.0);
        different += id != static_cast<Token>(best - first);
        if (bounds_.greedy_identical) id = static_cast<Token>(best - first);
      }
      logits = append(state, ids, length, at, 1, Positions::last);
    }
    const auto wrong =
        std::inner_product(ids.begin(), ids.end(), wanted.begin(), Index{0}, std::plus<>(), std::not_equal_to<>());
    if (bounds_.greedy_identical)
      report_.add("greedy_ids", static_cast<double>(wrong), 0, "tokens that differ");
    else
      report_.add("greedy_ids", wrong > 0 ? std::numeric_limits<double>::infinity() : shortfall, bounds_.logits,
                  "what the reference's choice lacks to the best logit; " + std::to_string(different) + " of " +
                      std::to_string(batch_ * (length - length_)) + " tokens differ");
  }

  std::vector<Index> offsets() const {
    std::vector<Index> offsets;
    for (Index row = 0; row <= batch_; ++row) offsets.push_back(row * length_);
    return offsets;
  }

  /// The mean loss of the batch, and its gradients added to `gradients`.
  double loss_and_gradients(const ModelType& model, typename ModelType::GradientsType& gradients, bool recompute) {
    std::vector<Token> targets(ids_.begin() + 1, ids_.end());
    targets.push_back(-1);
    for (Index row = 0; row < batch_; ++row) targets[static_cast<std::size_t>((row + 1) * length_ - 1)] = -1;
    const std::vector<Index> offsets = this->offsets();
    const TrainingBatch batch{ids_, targets, offsets};
    typename ModelType::GradientOptions options;
    options.recompute = recompute;
    return model.loss_and_gradients(this_thread_context<Device>(), batch, gradients, options).mean();
  }

  static Values to_host(const typename ModelType::GradientsType& gradients) {
    std::vector<F> values(static_cast<std::size_t>(gradients.values().size()));
    Memory<Device>::copy_to_host(values.data(), gradients.values().data, values.size() * sizeof(F));
    return {values.begin(), values.end()};
  }

  void gradients(bool recompute) {
    auto gradients = model_.new_gradients();
    const double loss = loss_and_gradients(model_, gradients, recompute);
    const std::string how = recompute ? ", recomputed" : "";
    if (reference_.find("loss")) report_.add("loss" + how, error("loss", {loss}), bounds_.losses);
    const Values values = to_host(gradients);
    Group group;
    compare_parameters(
        reference_, "grad.", model_.entries(), layout_, gradient_guard,
        [&](const ParameterEntry& entry) {
          return Values(values.begin() + entry.offset, values.begin() + entry.offset + entry.size);
        },
        [&](const ParameterEntry& entry, double error) {
          return allowed(bounds_.gradients, error, &Training::gradients, entry.offset, entry.size);
        },
        group);
    group.report(report_, "grad" + how);
  }

  /// What steps of AdamW on the batch give; gradients and parameters at the offsets of their entries.
  struct Training {
    Values gradients;  // before the first step
    Values losses, parameters;
  };

  Training train(ModelType model, std::size_t steps) {
    AdamW<Net, T, Device> optimiser(model,
                                    {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip_norm = 1});
    auto gradients = model.new_gradients();
    Training result;
    for (std::size_t step = 0; step < std::max<std::size_t>(steps, 1); ++step) {
      gradients.zero();
      result.losses.push_back(loss_and_gradients(model, gradients, false));
      if (step == 0) result.gradients = to_host(gradients);
      optimiser.step(model, gradients, 1e-3);
    }
    result.parameters.resize(result.gradients.size());
    for (const ParameterEntry& entry : model.entries()) {
      const Values values = model.read(entry);
      std::copy(values.begin(), values.end(), result.parameters.begin() + entry.offset);
    }
    return result;
  }

  void train() {
    const TensorEntry* entry = reference_.find("train.losses");
    if (!entry) return;
    const Values wanted = read_values<double>(*entry);
    const Training got = train(model_.template to<T>(), wanted.size());
    Group losses, parameters;
    for (std::size_t step = 0; step < wanted.size(); ++step) {
      const double error = relative_error(Values{got.losses[step]}, Values{wanted[step]});
      losses.add("step " + std::to_string(step), error,
                 allowed(bounds_.losses, error, &Training::losses, static_cast<Index>(step), 1));
    }
    losses.report(report_, "train.losses");
    compare_parameters(
        reference_, "train.param.", model_.entries(), layout_, 0,
        [&](const ParameterEntry& parameter) {
          const auto first = got.parameters.begin() + parameter.offset;
          return Values(first, first + parameter.size);
        },
        [&](const ParameterEntry& parameter, double error) {
          return allowed(bounds_.parameters, error, &Training::parameters, parameter.offset, parameter.size);
        },
        parameters);
    parameters.report(report_, "train.param");
  }

  /// The bound of an error in elements [first, first + count) of a part of training: `bound`, or, where that does not
  /// do, what a rounding of all weights leaves open.
  double allowed(double bound, double error, Values Training::*part, Index first, Index count) {
    if (error <= bound) return bound;
    const auto elements = [&](const Training& training) {
      return std::span((training.*part).data() + first, static_cast<std::size_t>(count));
    };
    if (rounded_.empty())
      for (std::uint64_t shake = 0; shake <= shakes; ++shake) rounded_.push_back(train(shaken(shake), train_steps()));
    for (std::size_t shake = 1; shake < rounded_.size(); ++shake)
      bound = std::max(bound, 6 * relative_error(elements(rounded_[shake]), elements(rounded_[0])));
    return bound;
  }

  std::size_t train_steps() {
    const TensorEntry* entry = reference_.find("train.losses");
    return entry ? static_cast<std::size_t>(entry->count()) : 0;
  }

  /// The model with every weight moved by a rounding of float32, in one way or another; as it is for shake 0.
  ModelType shaken(std::uint64_t shake) const {
    ModelType model = model_.template to<T>();
    for (std::size_t i = 0; i < model.entries().size() && shake > 0; ++i) {
      Random random(Seed{shake}, i);
      Values values = model.read(model.entries()[i]);
      for (double& value : values) value *= 1 + 0x1p-24 * random.normal();
      model.write(model.entries()[i], values);
    }
    return model;
  }

  /// A gradient that is far smaller than the others is what is left of larger terms, whose rounding it carries: below
  /// this share of the root mean square of all, the error is measured against that.
  static constexpr double gradient_guard = 1e-4;
  /// Ways of rounding: a tensor of few elements may stay where it is by chance.
  static constexpr std::uint64_t shakes = 5;

  ReferenceBounds bounds_;
  Report& report_;
  ReferenceCase reference_;
  ModelType model_;
  CheckpointLayout layout_;
  Index batch_ = 0, length_ = 0;
  std::vector<Token> ids_;
  std::vector<Training> rounded_;  // of model_ and of the shaken ones, where it was asked for
};

}  // namespace detail

/// Compares Net, stored as T on Device, with the case in `directory`, within the given bounds. A case that cannot be
/// read, or does not fit the type, is a failed line of the report, too.
template <class Net, class T = double, class Device = cpu>
Report check_reference(const std::filesystem::path& directory, const ReferenceBounds& bounds = reference_bounds<T>()) {
  Report report("reference case '" + directory.string() + "'");
  try {
    detail::ReferenceCheck<Net, T, Device>(directory, bounds, report).run();
  } catch (const Error& error) {
    report.expect("the case can be used", false, error.what());
  }
  return report;
}

}  // namespace zamba::testing
