// SPDX-License-Identifier: MIT
// DType: the element types of safetensors files, their names, sizes, and the C++ types that hold them bit by bit.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include <zamba/number.hpp>

namespace zamba {

static_assert(std::endian::native == std::endian::little, "zamba/dtype.hpp wants a little-endian machine");

/// The element types of a file.
enum class DType { F64, F32, F16, BF16, I64, I32, U32, U16, U8, I8, BOOL };

namespace detail {

struct DTypeInfo {
  std::string_view name;
  std::size_t size;
};

/// In the order of DType.
inline constexpr DTypeInfo dtypes[] = {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4},
                                       {"U32", 4}, {"U16", 2}, {"U8", 1},  {"I8", 1},   {"BOOL", 1}};

}  // namespace detail

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) { return detail::dtypes[static_cast<int>(dtype)].size; }
/// The name in the file.
constexpr std::string_view name_of(DType dtype) { return detail::dtypes[static_cast<int>(dtype)].name; }

/// The element type in which a file keeps values of type T bit by bit.
template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return DType::F64;
  if constexpr (std::is_same_v<T, float>) return DType::F32;
  if constexpr (std::is_same_v<T, f16>) return DType::F16;
  if constexpr (std::is_same_v<T, bf16>) return DType::BF16;
  if constexpr (std::is_same_v<T, std::int64_t>) return DType::I64;
  if constexpr (std::is_same_v<T, std::int32_t>) return DType::I32;
  if constexpr (std::is_same_v<T, std::uint32_t>) return DType::U32;
  if constexpr (std::is_same_v<T, std::uint16_t>) return DType::U16;
  if constexpr (std::is_same_v<T, std::uint8_t>) return DType::U8;
  if constexpr (std::is_same_v<T, std::int8_t>) return DType::I8;
  if constexpr (std::is_same_v<T, bool>) return DType::BOOL;
}

}  // namespace zamba
