// SPDX-License-Identifier: MIT
// AnyModel: a Model whose type is chosen at run time, and AnyState, its state.
//
//   zamba::AnyModel model = registry.load("my-model");       // checkpoints/registry.hpp; or AnyModel(Model<Net>(...),
//                                                            // "mine")
//   zamba::AnyState state = model.new_state({.batch = 1, .max_length = 4096});
//   auto logits = model.extend(state, prompt);
//
// Every call is one virtual call more than the Model's own, and computes with the calling thread's context: how many
// threads that has is set by this_thread_context<cpu>() = Context<cpu>(threads). Like a Model, a const AnyModel may be
// used by several threads, and a state belongs to one.
// Logits are floats that the host can read: those of a float or bf16 model on the CPU are read in place, others are
// rounded and copied.
//
// A model on CUDA is held where nvcc compiles, or where it is declared `extern template`.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <zamba/generate/generator.hpp>
#include <zamba/host_logits.hpp>
#include <zamba/model.hpp>
#include <zamba/model_facts.hpp>

namespace zamba {

namespace detail {

/// What AnyState calls.
struct StateInterface {
  using Pointer = std::unique_ptr<StateInterface>;

  virtual ~StateInterface() = default;
  virtual Pointer clone() const = 0;
  virtual Pointer gather(std::span<const Index> rows) const = 0;
  virtual Index batch() const = 0;
  virtual Index max_length() const = 0;
  virtual std::span<const Index> lengths() const = 0;
  virtual Index length(Index row) const = 0;
  virtual std::size_t bytes() const = 0;
  virtual void reset() = 0;
  virtual void reset(Index row) = 0;
  virtual StateSnapshot snapshot() const = 0;
  virtual void roll_back(const StateSnapshot& snapshot) = 0;
  virtual std::vector<std::byte> to_bytes() const = 0;
};

/// A: of the model's logits.
template <class StateType, class A>
struct HeldState final : StateInterface {
  explicit HeldState(StateType held) : state(std::move(held)) {}

  static Pointer hold(StateType state) {
    return or_out_of_memory("AnyState", [&] { return std::make_unique<HeldState>(std::move(state)); });
  }
  Pointer clone() const override { return hold(state); }
  Pointer gather(std::span<const Index> rows) const override { return hold(state.gather(rows)); }
  Index batch() const override { return state.batch(); }
  Index max_length() const override { return state.max_length(); }
  std::span<const Index> lengths() const override { return state.lengths(); }
  Index length(Index row) const override { return state.length(row); }
  std::size_t bytes() const override { return state.bytes(); }
  void reset() override { state.reset(); }
  void reset(Index row) override { state.reset(row); }
  StateSnapshot snapshot() const override { return state.snapshot(); }
  void roll_back(const StateSnapshot& snapshot) override { state.roll_back(snapshot); }
  std::vector<std::byte> to_bytes() const override { return state.to_bytes(); }

  StateType state;
  std::vector<float> logits;  // where the model's own are not floats on the host
  std::vector<A> copied;      // where they are not on the host
};

}  // namespace detail

/// A State of any model: a value, with the members of State.
class AnyState {
 public:
  AnyState(const AnyState& other) : state_(other.state_->clone()) {}
  AnyState& operator=(const AnyState& other) {
    if (this != &other) state_ = other.state_->clone();
    return *this;
  }
  AnyState(AnyState&&) noexcept = default;
  AnyState& operator=(AnyState&&) noexcept = default;

  Index batch() const { return state_->batch(); }
  Index max_length() const { return state_->max_length(); }
  Index length(Index row = 0) const { return state_->length(row); }
  std::span<const Index> lengths() const { return state_->lengths(); }
  std::size_t bytes() const { return state_->bytes(); }
  void reset() { state_->reset(); }
  void reset(Index row) { state_->reset(row); }
  AnyState gather(std::span<const Index> rows) const { return AnyState(state_->gather(rows)); }

  using Snapshot = StateSnapshot;
  Snapshot snapshot() const { return state_->snapshot(); }
  void roll_back(const Snapshot& snapshot) { state_->roll_back(snapshot); }
  std::vector<std::byte> to_bytes() const { return state_->to_bytes(); }

 private:
  friend class AnyModel;
  explicit AnyState(detail::StateInterface::Pointer state) : state_(std::move(state)) {}

  detail::StateInterface::Pointer state_;
};

namespace detail {

/// What AnyModel calls.
struct ModelInterface {
  virtual ~ModelInterface() = default;
  virtual StateInterface::Pointer new_state(StateOptions options) const = 0;
  virtual StateInterface::Pointer state_from_bytes(std::span<const std::byte> bytes) const = 0;
  virtual Matrix<const float> extend(StateInterface& state, const Tokens& tokens, Positions positions) const = 0;
  virtual std::vector<std::vector<Token>> generate(StateInterface& state, std::span<const std::vector<Token>> prompts,
                                                   const GenerationOptions& options,
                                                   const TokenFunction& callback) const = 0;
  virtual LossSum loss(const TrainingBatch& batch, StateInterface* state) const = 0;
  virtual const std::string& checkpoint_config() const = 0;
};

template <class Net, class T, class Device>
struct HeldModel final : ModelInterface {
  using ModelType = Model<Net, T, Device>;
  using A = typename ModelType::A;
  using Held = HeldState<typename ModelType::StateType, A>;
  static constexpr bool in_place = std::is_same_v<A, float> && DeviceTraits<Device>::host_reads;

  explicit HeldModel(ModelType held) : model(std::move(held)) {}

  StateInterface::Pointer new_state(StateOptions options) const override {
    return Held::hold(model.new_state(options));
  }
  StateInterface::Pointer state_from_bytes(std::span<const std::byte> bytes) const override {
    return Held::hold(model.state_from_bytes(bytes));
  }
  Matrix<const float> extend(StateInterface& state, const Tokens& tokens, Positions positions) const override {
    Held& held = own(state);
    if constexpr (in_place) {
      return model.extend(held.state, tokens, positions);
    } else {
      const auto rows = positions == Positions::all ? tokens.tokens.size() : held.state.lengths().size();
      const auto count = rows * static_cast<std::size_t>(ModelType::vocabulary());
      or_out_of_memory("extend", [&] {  // before the state changes
        held.logits.reserve(count);
        if (!DeviceTraits<Device>::host_reads) held.copied.reserve(count);
      });
      const auto logits = model.extend(held.state, tokens, positions);
      widen_to_host<Device>(logits.data, count, held.copied, held.logits);
      return {held.logits.data(), logits.rows(), logits.cols()};
    }
  }
  std::vector<std::vector<Token>> generate(StateInterface& state, std::span<const std::vector<Token>> prompts,
                                           const GenerationOptions& options,
                                           const TokenFunction& callback) const override {
    if constexpr (draws<Device>)
      return model.generate(own(state).state, prompts, options, callback);
    else
      fail("AnyModel: ", DeviceTraits<Device>::name, " does not draw tokens");
  }
  LossSum loss(const TrainingBatch& batch, StateInterface* state) const override {
    if constexpr (trains<Device>)
      return model.loss(batch, state ? &own(*state).state : nullptr);
    else
      fail("AnyModel: loss: not every operator has a backward pass on ", DeviceTraits<Device>::name,
           ", so models do not train there");
  }
  const std::string& checkpoint_config() const override { return model.checkpoint_config(); }

  static Held& own(StateInterface& state) {
    const auto held = dynamic_cast<Held*>(&state);
    require(held, "AnyModel: the state belongs to a model of another type");
    return *held;
  }

  ModelType model;
};

}  // namespace detail

class AnyModel {
 public:
  using StateType = AnyState;
  using DeviceType = cpu;  // where extend's logits are

  template <class Net, class T, class Device>
  AnyModel(Model<Net, T, Device> model, std::string name, std::string model_type = {})
      : facts_(ModelFacts::of<Net, T, Device>(std::move(name), std::move(model_type))),
        trains_(zamba::trains<Device>),
        draws_(zamba::draws<Device>),
        model_(std::make_unique<detail::HeldModel<Net, T, Device>>(std::move(model))) {}

  const ModelFacts& facts() const { return facts_; }
  Index vocabulary() const { return facts_.vocabulary; }
  /// As Model::checkpoint_config.
  const std::string& checkpoint_config() const { return model_->checkpoint_config(); }

  AnyState new_state(StateOptions options = {}) const { return AnyState(model_->new_state(options)); }
  /// The inverse of AnyState::to_bytes; throws for a state of other weights too.
  AnyState state_from_bytes(std::span<const std::byte> bytes) const {
    return AnyState(model_->state_from_bytes(bytes));
  }

  /// As Model::extend. Throws for a state of a model of another type or of other weights.
  Matrix<const float> extend(AnyState& state, const Tokens& tokens, Positions positions = Positions::last) const {
    return model_->extend(*state.state_, tokens, positions);
  }
  /// Whether the device draws tokens by itself: then zamba::generate leaves all to it, by the member below.
  bool draws() const { return draws_; }
  std::vector<std::vector<Token>> generate(AnyState& state, std::span<const std::vector<Token>> prompts,
                                           const GenerationOptions& options, const TokenFunction& callback) const {
    return model_->generate(*state.state_, prompts, options, callback);
  }
  /// Whether the device trains: else loss() is an Error.
  bool trains() const { return trains_; }
  /// As Model::loss.
  LossSum loss(const TrainingBatch& batch, AnyState* state = nullptr) const {
    return model_->loss(batch, state ? state->state_.get() : nullptr);
  }

 private:
  ModelFacts facts_;
  bool trains_, draws_;
  std::unique_ptr<const detail::ModelInterface> model_;
};

static_assert(LossModel<AnyModel>);

}  // namespace zamba
