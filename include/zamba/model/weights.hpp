// SPDX-License-Identifier: MIT
// Members of Model: its weights, how they begin, are read, written and known again; included by model.hpp.
#pragma once

#include <zamba/model.hpp>
#include <zamba/model/parts.hpp>

namespace zamba {

template <class Net, class T, class Device>
Model<Net, T, Device>::Model(Uninitialised)
    : entries_(detail::or_out_of_memory("Model", detail::list_parameters<Net, T>)) {
  const ParameterEntry& last = entries_.back();
  const std::size_t all = last.byte_offset + align_up(bytes(last));
  try {
    buffer_ = Buffer<Device>(all);
  } catch (const OutOfMemory&) {
    detail::throw_error<OutOfMemory>("Model: out of memory on ", DeviceTraits<Device>::name, ": the weights are ", all,
                                     " bytes, ", Memory<Device>::free_bytes(), " are free");
  }
  detail::bind_parameters<Net>(views_, [&](std::size_t i) { return buffer_.data() + entries_[i].byte_offset; });
}

template <class Net, class T, class Device>
Model<Net, T, Device>::Model(Seed seed) : Model(Uninitialised{}) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    const auto values = [&] { return detail::initial_values(entries_[i], i, seed); };
    write(entries_[i], detail::or_out_of_memory("Model", values));
  }
}

template <class Net, class T, class Device>
template <class U, class OtherDevice>
Model<Net, U, OtherDevice> Model<Net, T, Device>::to() const {
  Model<Net, U, OtherDevice> other{Uninitialised{}};
  for (std::size_t i = 0; i < entries_.size(); ++i) other.write(other.entries()[i], read(entries_[i]));
  other.set_checkpoint_config(checkpoint_config_);
  return other;
}

template <class Net, class T, class Device>
std::vector<double> Model<Net, T, Device>::read(const ParameterEntry& entry) const {
  return detail::or_out_of_memory("Model::read", [&] {
    std::vector<std::byte> stored(bytes(entry));
    std::vector<double> values(static_cast<std::size_t>(entry.size));
    Memory<Device>::copy_to_host(stored.data(), data(entry), stored.size());
    const auto decode = entry.precise ? &detail::decode_rows<F> : &detail::decode_rows<weight_t<T>>;
    decode(stored.data(), entry.size, entry.cols(), values.data());
    return values;
  });
}

template <class Net, class T, class Device>
void Model<Net, T, Device>::write(const ParameterEntry& entry, std::span<const double> values) {
  require(static_cast<Index>(values.size()) == entry.size, "Model::write: ", entry.name, " has ", entry.size,
          " elements, got ", values.size());
  detail::or_out_of_memory("Model::write", [&] {
    std::vector<std::byte> stored(bytes(entry));
    const auto encode = entry.precise ? &detail::encode_rows<F> : &detail::encode_rows<weight_t<T>>;
    encode(values.data(), entry.size, entry.cols(), stored.data());
    Memory<Device>::copy_from_host(data(entry), stored.data(), stored.size());
  });
}

template <class Net, class T, class Device>
std::uint64_t Model<Net, T, Device>::fingerprint() const {
  std::uint64_t hash = mark_.fingerprint();
  if (hash != 0) return hash;
  for (const ParameterEntry& entry : entries_) hash = detail::hash_sample<Device>(data(entry), bytes(entry), hash);
  hash |= 1;  // 0 says that it is not known
  mark_.set_fingerprint(hash);
  return hash;
}

}  // namespace zamba
