// SPDX-License-Identifier: MIT
// State<Net, T, Device>: what sequences leave behind, convolution windows, recurrent states and key/value caches. A
// value.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include <zamba/array.hpp>
#include <zamba/block.hpp>
#include <zamba/buffer.hpp>
#include <zamba/number.hpp>

namespace zamba {

struct StateOptions {
  Index batch = 1;
  Index max_length = 2048;
};

namespace detail {

/// 64-bit FNV-1a over bytes, to be chained.
class Hash {
 public:
  void add(std::string_view bytes) {
    for (const char c : bytes) value_ = (value_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  void add(Index number) { add(std::string_view(reinterpret_cast<const char*>(&number), sizeof number)); }
  std::uint64_t value() const { return value_; }
  static Hash from(std::uint64_t value) {
    Hash hash;
    hash.value_ = value;
    return hash;
  }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

}  // namespace detail

namespace detail {

template <class Net>
std::uint64_t hash_architecture() {
  Hash hash;
  typename Net::template Parameters<char, char> parameters;
  visit_parameters<Net>(parameters, [&](const Name& name, auto&, auto shape, Initializer, Decay) {
    hash.add(name.str());
    for (const Index extent : shape.extent) hash.add(extent);
  });
  typename Net::template State<char, char> state;
  visit_state<Net>(state, [&](const Name& name, auto&, Index rows, Index width) {
    hash.add(name.str());
    hash.add(rows);
    hash.add(width);
  });
  return hash.value();
}

struct CountTensors {
  std::size_t count = 0;
  template <class T>
  constexpr void operator()(const Name&, Tensor<T, 3>&, Index, Index) {
    ++count;
  }
};

template <class Net>
constexpr std::size_t count_state_tensors() {
  typename Net::template State<char, char> state;
  CountTensors counter;
  visit_state<Net>(state, counter);
  return counter.count;
}

}  // namespace detail

/// A hash of the names and shapes of a network's parameters and state: equal for equal architectures.
template <class Net>
std::uint64_t architecture_hash() {
  static const std::uint64_t hash = detail::hash_architecture<Net>();
  return hash;
}

/// Which weights a state was computed with.
struct WeightsId {
  std::uint64_t model = 0;  // a number of the Model in this process, whatever becomes of its weights; 0: not known
  std::uint64_t fingerprint = 0;  // Model::fingerprint(), as the weights were then
};

/// What State::roll_back needs: the parts that further tokens rewrite. Caches only grow, so theirs stay where they are.
struct StateSnapshot {
  std::vector<Index> lengths;
  std::vector<std::uint64_t> history;  // of each row's tokens so far, and of the weights that read them
  std::vector<std::byte> rewritten;
  std::uint64_t layout = 0;  // of architecture and storage type
  WeightsId weights;
};

namespace detail {

/// f(), several calls with one state; where memory does not suffice for all of them, an OutOfMemory, and the state as
/// it was before the first.
template <class StateType, class F>
auto all_or_none(const char* what, StateType& state, F&& f) {
  if constexpr (requires { state.roll_back(state.snapshot()); }) {
    const auto before = state.snapshot();
    try {
      return or_out_of_memory(what, f);
    } catch (const OutOfMemory&) {
      state.roll_back(before);
      throw;
    }
  } else {
    return or_out_of_memory(what, f);
  }
}

}  // namespace detail

/// The states of `batch` sequences, each with room for max_length positions. Rows have lengths of their own. Copying
/// copies the used part of every row; nothing beyond a row's length is ever read. Belongs to one thread.
///
/// A state that holds positions is one of the weights that computed them, which it knows by WeightsId: Model::extend
/// refuses those of others, in memory or from bytes. One without positions is anybody's.
template <class Net, class T, class Device>
class State {
 public:
  using Views = typename Net::template State<cache_t<T>, compute_t<T>>;

  explicit State(StateOptions options) : batch_(options.batch), max_length_(options.max_length) {
    check("new_state", options);
    std::size_t bytes = 0;
    for_each_tensor([&](auto& tensor, Index rows, Index width) { bytes += tensor_bytes(tensor, rows, width); });
    buffer_ = Buffer<Device>(bytes);
    history_ = Buffer<cpu>(static_cast<std::size_t>(batch_ * max_length_) * sizeof(std::uint64_t));
    detail::or_out_of_memory("State", [&] { lengths_.assign(static_cast<std::size_t>(batch_), 0); });
    bind();
  }
  State(const State& other) : State(StateOptions{other.batch_, other.max_length_}) {
    weights_ = other.weights_;
    for (Index row = 0; row < batch_; ++row) copy_row(other, row, row);
  }
  State& operator=(const State& other) {
    if (this != &other) *this = State(other);
    return *this;
  }
  State(State&&) noexcept = default;
  State& operator=(State&&) noexcept = default;

  /// Throws, naming `call`, unless states of these options can be thought of.
  static void check(const char* call, StateOptions options) {
    require(options.batch > 0 && options.max_length > 0, call, ": batch and max_length must be positive, got batch ",
            options.batch, " and max_length ", options.max_length);
    const double rows = static_cast<double>(options.batch), positions = static_cast<double>(options.max_length);
    require(detail::state_bytes<Net, T>(rows, positions) + rows * positions * sizeof(std::uint64_t) < 0x1p60, call,
            ": batch ", options.batch, " and max_length ", options.max_length,
            " would need more memory than can be addressed");
  }

  Index batch() const { return batch_; }
  Index max_length() const { return max_length_; }
  /// Positions that row has seen.
  Index length(Index row = 0) const { return lengths_[checked(row)]; }
  std::span<const Index> lengths() const { return lengths_; }
  /// Whether no row holds a position.
  bool empty() const {
    return std::all_of(lengths_.begin(), lengths_.end(), [](Index length) { return length == 0; });
  }
  std::size_t bytes() const { return buffer_.size(); }
  const std::byte* data() const { return buffer_.data(); }

  /// The weights that computed what the state holds; of those that read the last token, where training changed them.
  WeightsId weights() const { return weights_; }
  /// Model notes its own before it advances a row. Whoever wants to go on with a state of other weights, to see what
  /// comes of it, may give the state those of the model: set_weights(model.weights()).
  void set_weights(WeightsId weights) { weights_ = weights; }

  /// Forgets all rows, or one. Takes no time: a row of length 0 begins from zero.
  void reset() { std::fill(lengths_.begin(), lengths_.end(), 0); }
  void reset(Index row) { lengths_[checked(row)] = 0; }

  /// The states of the given rows, in the given order and as often as given: what a beam search keeps.
  State gather(std::span<const Index> rows) const {
    require(!rows.empty(), "gather: no rows are named, at least one is needed");
    State selected(StateOptions{static_cast<Index>(rows.size()), max_length_});
    selected.weights_ = weights_;
    for (std::size_t i = 0; i < rows.size(); ++i)
      selected.copy_row(*this, static_cast<Index>(checked(rows[i])), static_cast<Index>(i));
    return selected;
  }

  using Snapshot = StateSnapshot;

  Snapshot snapshot() const {
    Snapshot s;
    detail::or_out_of_memory("snapshot", [&] {
      s.lengths = lengths_;
      s.history.reserve(lengths_.size());
      s.rewritten.resize(rewritten_bytes());
    });
    s.layout = layout();
    s.weights = weights_;
    for (Index row = 0; row < batch_; ++row) s.history.push_back(history_at(row, detail::item(lengths_, row)));
    std::size_t at = 0;
    for_each_rewritten([&](auto* data, std::size_t bytes) {
      Memory<Device>::copy_to_host(s.rewritten.data() + at, data, bytes);
      at += bytes;
    });
    return s;
  }

  /// Returns to a snapshot of this state. Throws, and changes nothing, for one of a state of another type or batch, and
  /// where a row does not hold the snapshot's tokens as its beginning any more, read by the same weights.
  void roll_back(const Snapshot& s) {
    require(s.lengths.size() == lengths_.size(), "roll_back: the snapshot holds ", s.lengths.size(),
            " rows, the state ", lengths_.size());
    require(s.layout == layout(), "roll_back: the snapshot is of a state of another architecture or storage type");
    require(s.history.size() == s.lengths.size() && s.rewritten.size() == rewritten_bytes(),
            "roll_back: the snapshot is damaged: it holds ", s.rewritten.size(), " bytes and hashes of ",
            s.history.size(), " rows, wanted ", rewritten_bytes(), " and ", s.lengths.size());
    for (std::size_t i = 0; i < lengths_.size(); ++i) {
      const Index row = static_cast<Index>(i), length = s.lengths[i];
      if (length >= 0 && length <= lengths_[i] && history_at(row, length) == s.history[i]) continue;
      require(s.weights.fingerprint == weights_.fingerprint,
              "roll_back: the snapshot is of a state that other weights computed");
      fail("roll_back: row ", row, " no longer begins with the ", length, " tokens of the snapshot");
    }
    std::size_t at = 0;
    for_each_rewritten([&](auto* data, std::size_t bytes) {
      Memory<Device>::copy_from_host(data, s.rewritten.data() + at, bytes);
      at += bytes;
    });
    lengths_ = s.lengths;
    weights_ = s.weights;
  }

  /// The used part of all rows, with the hash of the architecture and the fingerprint of the weights.
  std::vector<std::byte> to_bytes() const;
  /// The inverse; throws for bytes of another architecture, storage type or length, and for truncated ones. Whether
  /// they are of a model's weights its extend() says, or Model::state_from_bytes at once.
  static State from_bytes(std::span<const std::byte> bytes);

  /// The views that blocks work on.
  const Views& views() const { return views_; }

  /// Room for logits of n rows, kept between calls.
  Matrix<activation_t<T, Device>> logits(Index n) {
    using A = activation_t<T, Device>;
    const std::size_t bytes = static_cast<std::size_t>(n * Net::vocabulary) * sizeof(A);
    if (logits_.size() < bytes) logits_ = Buffer<Device>(bytes);
    return {reinterpret_cast<A*>(logits_.data()), n, Net::vocabulary};
  }
  /// All elements zero, for gradients.
  void zero() { Memory<Device>::zero(buffer_.data(), buffer_.size()); }

  /// Notes that `tokens` were appended to a row. For Model, which calls it after the computation.
  void advance(Index row, std::span<const Token> tokens) {
    detail::Hash hash = detail::Hash::from(history_at(row, detail::item(lengths_, row)));
    for (const Token token : tokens) {
      hash.add(static_cast<Index>(weights_.fingerprint) ^ Index{token});
      history(row)[detail::item(lengths_, row)++] = hash.value();
    }
  }

 private:
  struct Header {
    char magic[8];
    std::uint64_t architecture, fingerprint;
    Index element_size, batch, max_length;
    std::uint64_t sizes;  // a hash of batch, max_length and lengths, so that a damaged size is not believed
  };
  static constexpr char magic[9] = "zamba-s2";

  static std::uint64_t hash_of_sizes(Index batch, Index max_length, std::span<const Index> lengths) {
    detail::Hash hash;
    hash.add(batch);
    hash.add(max_length);
    for (const Index length : lengths) hash.add(length);
    return hash.value();
  }

  static std::uint64_t layout() { return architecture_hash<Net>() ^ sizeof(cache_t<T>); }

  std::size_t checked(Index row) const {
    require(row >= 0 && row < batch_, "State: row ", row, " of a batch of ", batch_);
    return static_cast<std::size_t>(row);
  }
  /// (max_length) of a row: a hash of each prefix, and of the weights that read its tokens.
  std::uint64_t* history(Index row) const {
    return reinterpret_cast<std::uint64_t*>(history_.data()) + row * max_length_;
  }
  std::uint64_t history_at(Index row, Index length) const {
    return length == 0 ? detail::Hash().value() : history(row)[length - 1];
  }

  template <class F>
  void for_each_tensor(F&& f) const {
    visit_state<Net>(const_cast<Views&>(views_),
                     [&](const Name&, auto& tensor, Index rows, Index width) { f(tensor, rows, width); });
  }
  /// f(pointer, bytes) for what further tokens rewrite.
  template <class F>
  void for_each_rewritten(F&& f) const {
    for_each_tensor([&](auto& tensor, Index rows, Index width) {
      if (rows != per_position) f(tensor.data, sizeof(*tensor.data) * static_cast<std::size_t>(batch_ * rows * width));
    });
  }
  std::size_t rewritten_bytes() const {
    std::size_t all = 0;
    for_each_rewritten([&](auto*, std::size_t bytes) { all += bytes; });
    return all;
  }
  template <class Tensor>
  std::size_t tensor_bytes(const Tensor& tensor, Index rows, Index width) const {
    return align_up(sizeof(*tensor.data) *
                    static_cast<std::size_t>(batch_ * (rows == per_position ? max_length_ : rows) * width));
  }
  void bind() {
    std::byte* at = buffer_.data();
    for_each_tensor([&](auto& tensor, Index rows, Index width) {
      using Element = std::remove_reference_t<decltype(*tensor.data)>;
      tensor = {reinterpret_cast<Element*>(at), batch_, rows == per_position ? max_length_ : rows, width};
      at += tensor_bytes(tensor, rows, width);
    });
  }

  /// f(pointer, bytes) for the used part of a row, tensor by tensor.
  template <class F>
  void for_each_part(Index row, F&& f) const {
    for_each_tensor([&](auto& tensor, Index rows, Index width) {
      const Index used = rows == per_position              ? detail::item(lengths_, row)
                         : detail::item(lengths_, row) > 0 ? rows
                                                           : 0;
      f(tensor[row].data, sizeof(*tensor.data) * static_cast<std::size_t>(used * width));
    });
  }
  void copy_row(const State& from, Index source, Index target) {
    detail::item(lengths_, target) = detail::item(from.lengths_, source);
    std::copy_n(from.history(source), detail::item(lengths_, target), history(target));
    std::array<const void*, detail::count_state_tensors<Net>()> parts;
    std::size_t part = 0;
    from.for_each_part(source, [&](const void* data, std::size_t) { parts[part++] = data; });
    part = 0;
    for_each_part(target, [&](void* data, std::size_t bytes) { Memory<Device>::copy(data, parts[part++], bytes); });
  }

  Index batch_, max_length_;
  std::vector<Index> lengths_;
  WeightsId weights_;
  Buffer<cpu> history_;
  Buffer<Device> buffer_, logits_;
  Views views_;
};

template <class Net, class T, class Device>
std::vector<std::byte> State<Net, T, Device>::to_bytes() const {
  Header header{{},
                architecture_hash<Net>(),
                weights_.fingerprint,
                static_cast<Index>(sizeof(cache_t<T>)),
                batch_,
                max_length_,
                hash_of_sizes(batch_, max_length_, lengths_)};
  std::memcpy(header.magic, magic, sizeof header.magic);
  std::size_t size = sizeof header + lengths_.size() * sizeof(Index);
  for (Index row = 0; row < batch_; ++row) {
    size += static_cast<std::size_t>(detail::item(lengths_, row)) * sizeof(std::uint64_t);
    for_each_part(row, [&](const void*, std::size_t part) { size += part; });
  }
  std::vector<std::byte> bytes;
  detail::or_out_of_memory("to_bytes", [&] { bytes.reserve(size); });
  const auto append = [&](const void* data, std::size_t count) {
    bytes.resize(bytes.size() + count);
    if (count) std::memcpy(bytes.data() + bytes.size() - count, data, count);
  };
  append(&header, sizeof header);
  append(lengths_.data(), lengths_.size() * sizeof(Index));
  for (Index row = 0; row < batch_; ++row) {
    append(history(row), static_cast<std::size_t>(detail::item(lengths_, row)) * sizeof(std::uint64_t));
    for_each_part(row, [&](const void* data, std::size_t count) {
      const std::size_t at = bytes.size();
      bytes.resize(at + count);
      if (count) Memory<Device>::copy_to_host(bytes.data() + at, data, count);
    });
  }
  return bytes;
}

template <class Net, class T, class Device>
State<Net, T, Device> State<Net, T, Device>::from_bytes(std::span<const std::byte> bytes) {
  std::size_t at = 0;
  const auto take = [&](std::size_t size) {
    require(size <= bytes.size() - at, "State::from_bytes: truncated, ", at + size, " bytes wanted, ", bytes.size(),
            " given");
    at += size;
    return bytes.data() + at - size;
  };
  Header header;
  std::memcpy(&header, take(sizeof header), sizeof header);
  require(std::memcmp(header.magic, magic, sizeof header.magic) == 0,
          "State::from_bytes: these are not the bytes of a state");
  require(header.architecture == architecture_hash<Net>(),
          "State::from_bytes: the state belongs to an architecture of hash ", header.architecture, ", this one's is ",
          architecture_hash<Net>());
  require(header.element_size == sizeof(cache_t<T>), "State::from_bytes: the caches hold elements of ",
          header.element_size, " bytes, this state's of ", sizeof(cache_t<T>));
  require(header.batch > 0 && header.max_length > 0 && header.batch <= static_cast<Index>(bytes.size() / sizeof(Index)),
          "State::from_bytes: impossible batch ", header.batch, " or max_length ", header.max_length);
  std::vector<Index> lengths;
  detail::or_out_of_memory("State::from_bytes", [&] { lengths.resize(static_cast<std::size_t>(header.batch)); });
  std::memcpy(lengths.data(), take(lengths.size() * sizeof(Index)), lengths.size() * sizeof(Index));
  require(header.sizes == hash_of_sizes(header.batch, header.max_length, lengths),
          "State::from_bytes: the sizes are damaged");
  for (const Index length : lengths)
    require(length >= 0 && length <= header.max_length, "State::from_bytes: a row of length ", length,
            " in a state of max_length ", header.max_length);
  State state(StateOptions{header.batch, header.max_length});
  state.lengths_ = std::move(lengths);
  state.weights_ = {0, header.fingerprint};
  for (Index row = 0; row < state.batch_; ++row) {
    const std::size_t history = static_cast<std::size_t>(detail::item(state.lengths_, row)) * sizeof(std::uint64_t);
    std::memcpy(state.history(row), take(history), history);
    state.for_each_part(row,
                        [&](void* data, std::size_t size) { Memory<Device>::copy_from_host(data, take(size), size); });
  }
  require(at == bytes.size(), "State::from_bytes: ", bytes.size() - at, " bytes left over");
  return state;
}

}  // namespace zamba
