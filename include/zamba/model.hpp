// SPDX-License-Identifier: MIT
// Model<Net, T, Device>: an architecture with weights on a device, stored as T: a number, or Types<W, A, C>, which says
// those of activations and caches too.
//
// A const Model may be used by several threads at once; each computes with a Context of its own, and a State, like a
// Context, belongs to one thread. Members are defined below the class, so that `extern template class zamba::Model<Net,
// T, cuda>;` leaves their code to the translation unit that instantiates the model.
#pragma once

#include <array>
#include <atomic>
#include <concepts>
#include <functional>
#include <initializer_list>
#include <iomanip>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <zamba/language_model.hpp>
#include <zamba/parameter_table.hpp>
#include <zamba/pattern_stack.hpp>
#include <zamba/state.hpp>
#include <zamba/training_bytes.hpp>

namespace zamba {

namespace detail {

/// The number of a Model in this process, and the fingerprint of its weights while it is known. Threads that share a
/// model may find it out at the same time: they find the same.
class WeightsMark {
 public:
  WeightsMark() : model_(next_++) {}
  WeightsMark(WeightsMark&& other) noexcept : model_(other.model_), fingerprint_(other.fingerprint()) {}
  WeightsMark& operator=(WeightsMark&& other) noexcept {
    model_ = other.model_;
    fingerprint_ = other.fingerprint();
    return *this;
  }

  std::uint64_t model() const { return model_; }
  std::uint64_t fingerprint() const { return fingerprint_.load(std::memory_order_relaxed); }  // 0: not known
  void set_fingerprint(std::uint64_t value) const { fingerprint_.store(value, std::memory_order_relaxed); }

 private:
  inline static std::atomic<std::uint64_t> next_{1};

  std::uint64_t model_;
  mutable std::atomic<std::uint64_t> fingerprint_{0};
};

}  // namespace detail

/// Tokens for the rows of a state: all of row 0, then all of row 1, ...; lengths absent: everything belongs to one row.
struct Tokens {
  std::span<const Token> tokens;
  std::span<const Index> lengths = {};

  Tokens(std::span<const Token> one_row) : tokens(one_row) {}
  Tokens(const std::vector<Token>& one_row) : tokens(one_row) {}
  Tokens(std::initializer_list<Token> one_row) : tokens(one_row.begin(), one_row.size()) {}
  Tokens(const Token& one_token) : tokens(&one_token, 1) {}
  Tokens(std::span<const Token> all, std::span<const Index> lengths_of_rows) : tokens(all), lengths(lengths_of_rows) {}
};

/// Which logits extend returns: (rows, V) after each row's last token, or (tokens, V) after every token.
enum class Positions { last, all };

/// Packed documents for training: document k is [offsets[k], offsets[k + 1]); nothing crosses a boundary.
struct TrainingBatch {
  std::span<const Token> tokens;
  std::span<const Token> targets;  // the wanted next token at each position; negative: no loss there
  std::span<const Index> offsets;  // from 0 to tokens.size()
};

struct GenerationOptions;  // generate/generator.hpp

/// callback(row, token) for every new token; false ends the row. Empty: every row runs on.
using TokenFunction = std::function<bool(Index, Token)>;

/// Says that a model's weights are left undefined, for whoever writes them all next.
struct Uninitialised {};

template <class Net, class T = float, class Device = cpu>
class Model {
  static_assert(runs_on<Net, Device>,
                "zamba::Model: a block of this network does not say that it runs on this device: it computes by "
                "operators only and says 'static constexpr bool by_operators = true', or has kernels of its own and "
                "says 'template <class Device> static constexpr bool runs_on'");
  static_assert(detail::types_fit<T, Device>(),
                "zamba::Model: T is double, float, bf16, or Types<W, A, C>: with activations A of float or double on "
                "the CPU, of bf16 too on CUDA, and caches C of double where A is double, else of float or bf16; a "
                "weight type that is no plain number is a W");

 public:
  using F = compute_t<T>;
  using A = activation_t<T, Device>;
  using StateType = State<Net, T, Device>;
  using DeviceType = Device;
  using StateGradients = State<Net, F, Device>;
  using GradientsType = Gradients<Net, T, Device>;
  using Views = typename Net::template Parameters<const weight_t<T>, const F>;

  /// Weights drawn as each block's listing says.
  explicit Model(Seed seed);
  explicit Model(Uninitialised);
  Model(Model&&) noexcept = default;
  Model& operator=(Model&&) noexcept = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  /// The same weights in another storage type, on another device.
  template <class U, class OtherDevice = Device>
  Model<Net, U, OtherDevice> to() const;

  static constexpr Index vocabulary() { return Net::vocabulary; }

  /// Throws OutOfMemory, which names the weights, the state and the workspace, where the device has no room.
  StateType new_state(StateOptions options = {}) const;
  /// State::from_bytes, which throws for a state of other weights too.
  StateType state_from_bytes(std::span<const std::byte> bytes) const;
  GradientsType new_gradients() const { return GradientsType(entries_); }
  /// Zero gradients of a state like this one, to be filled as that of the final state and read as that of the initial
  /// one.
  StateGradients new_state_gradients(const StateType& state) const;

  /// Appends tokens to the rows of a state and returns logits: prefill, a further chunk, or one token. The view stays
  /// valid until the next call with the same state or context. Throws, and changes nothing, for an empty prompt, a
  /// token outside the vocabulary, lengths that do not add up, a row that would exceed max_length, a state that other
  /// weights computed, or want of memory (OutOfMemory). With Positions::last a row that got no tokens gets NaN.
  Matrix<const A> extend(Context<Device>& ctx, StateType& state, const Tokens& tokens,
                         Positions positions = Positions::last) const;
  Matrix<const A> extend(StateType& state, const Tokens& tokens, Positions positions = Positions::last) const;

  /// Bytes that extend() takes on the device beside the weights and a state of these options, at most, whatever it is
  /// given: scratch, and the logits after each row's last token (Positions::all: a row of logits more for every other
  /// token). On CUDA what cuBLAS and the driver take for themselves comes on top. threads: of the CPU's context; 0:
  /// all.
  static std::size_t workspace_bytes(StateOptions options, int threads = 0) requires by_operators<Net>;

  /// generate() of generate/generator.hpp, which calls it, where the device draws the tokens.
  std::vector<std::vector<Token>> generate(Context<Device>& ctx, StateType& state,
                                           std::span<const std::vector<Token>> prompts,
                                           const GenerationOptions& options,
                                           const TokenFunction& callback) const requires draws<Device>;
  std::vector<std::vector<Token>> generate(StateType& state, std::span<const std::vector<Token>> prompts,
                                           const GenerationOptions& options,
                                           const TokenFunction& callback) const requires draws<Device>;

  /// Sum of the next-token losses of a batch. `state`, where given, has one row a document and is continued. It may be
  /// one that this model computed before its weights were trained further, as where it is carried from step to step; of
  /// another model it is refused. Where a call throws, the state is as it was.
  LossSum loss(Context<Device>& ctx, const TrainingBatch& batch,
               StateType* state = nullptr) const requires trains<Device>;
  LossSum loss(const TrainingBatch& batch, StateType* state = nullptr) const requires trains<Device>;

  /// What training with AdamW takes, with micro-batches of a shape. threads: of the CPU's context; 0: all. Throws where
  /// rows or length are not positive.
  static TrainingBytes training_bytes(const TrainingShape& shape,
                                      int threads = 0) requires(trains<Device>&& by_operators<Net>);

  struct GradientOptions {
    double scale = 0;        // of the summed loss; 0: 1 / (number of targets), the mean
    bool recompute = false;  // keep only what enters each layer, whatever `keep` says
    StateType* state = nullptr;
    StateGradients* d_state = nullptr;  // in: of the final state; out: of the initial state
    Keep keep = Keep::everything;       // of the forward pass: less memory and more time, the same numbers
    double z_loss = 0;  // of the square of the log-normaliser of each target's logits, added to its loss
  };
  /// The loss, and its gradients added to `gradients`, where a call that throws may have added some already. The state
  /// may be of any weights, as in loss(): it is an input like the tokens, and a run has it from the step before.
  LossSum loss_and_gradients(Context<Device>& ctx, const TrainingBatch& batch, GradientsType& gradients,
                             const GradientOptions& options) const requires trains<Device>;
  LossSum loss_and_gradients(const TrainingBatch& batch, GradientsType& gradients) const requires trains<Device>;
  /// The same, queued: the loss is added to *total, in memory of the device, and nothing is waited for.
  void loss_and_gradients(Context<Device>& ctx, const TrainingBatch& batch, GradientsType& gradients,
                          const GradientOptions& options, LossSum* total) const requires trains<Device>;

  /// A hash of the weights as they are stored, the same in every process and on every device: of parameters of up to
  /// 16 KiB all bytes, of larger ones 256 pieces of 64 bytes. It is computed where it is first wanted after a change: a
  /// call of write(), or of data() on a model that is not const, so pointers are asked for anew before weights are
  /// changed again.
  std::uint64_t fingerprint() const;
  /// What a state that this model computes is marked with.
  WeightsId weights() const { return {mark_.model(), fingerprint()}; }

  const Views& parameters() const { return views_; }
  const std::vector<ParameterEntry>& entries() const { return entries_; }
  /// The text of the config.json that came with these weights; empty: there was none. Saving writes it again, so what
  /// no type says stays: the ids that begin and end a text, the length a model was trained for.
  const std::string& checkpoint_config() const { return checkpoint_config_; }
  void set_checkpoint_config(std::string text) { checkpoint_config_ = std::move(text); }
  /// The elements of one parameter, as double, in row-major order; and their replacement (rounded to the stored type).
  std::vector<double> read(const ParameterEntry& entry) const;
  void write(const ParameterEntry& entry, std::span<const double> values);
  /// The bytes of one parameter, stored as weight_t<T> or, where entry.precise, compute_t<T>.
  std::byte* data(const ParameterEntry& entry) {
    mark_.set_fingerprint(0);
    return buffer_.data() + entry.byte_offset;
  }
  const std::byte* data(const ParameterEntry& entry) const { return buffer_.data() + entry.byte_offset; }
  std::size_t bytes(const ParameterEntry& entry) const { return entry.bytes; }

 private:
  Matrix<const A> step(Context<Device>& ctx, StateType& state, std::span<const Token> tokens) const;
  template <class Compute>
  void keeping_state(Context<Device>& ctx, StateType& state, Compute&& compute) const;
  Matrix<A> make_room(Context<Device>& ctx, StateType& state, std::size_t scratch, Index logits) const;
  [[noreturn]] void fail_for_memory(const char* call, StateOptions options, std::size_t workspace) const;
  void check(const StateType& state, const Tokens& tokens) const;
  void check(const TrainingBatch& batch, const StateType* state, const StateGradients* d_state) const;
  void check_weights(const char* call, const StateType& state) const;

  std::vector<ParameterEntry> entries_;
  std::string checkpoint_config_;
  Buffer<Device> buffer_;
  Views views_;
  detail::WeightsMark mark_;
};

/// What generation asks of a model: every Model has it, and AnyModel, whose type is chosen at run time. Logits are
/// where DeviceType says.
template <class M>
concept InferenceModel = requires(const M& model, typename M::StateType& state, const Tokens& tokens,
                                  Positions positions) {
  typename M::DeviceType;
  { model.vocabulary() } -> std::convertible_to<Index>;
  { model.new_state(StateOptions{}) } -> std::same_as<typename M::StateType>;
  { *model.extend(state, tokens, positions).data } -> std::convertible_to<double>;
};

/// One that computes losses too, which perplexity asks for: AnyModel, and a Model on a device that trains.
template <class M>
concept LossModel = InferenceModel<M> &&
    requires(const M& model, typename M::StateType& state, const TrainingBatch& batch) {
  { model.loss(batch, &state) } -> std::same_as<LossSum>;
};

}  // namespace zamba

#include <zamba/model/inference.hpp>
#include <zamba/model/training.hpp>
#include <zamba/model/weights.hpp>
