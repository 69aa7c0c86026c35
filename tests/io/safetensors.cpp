// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <zamba/io/safetensors.hpp>
#include <zamba/random.hpp>

namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<std::byte>;
using zamba::DType;
using zamba::Index;
using zamba::Safetensors;
using zamba::TensorSource;

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

/// A file of this header and this many bytes of data, which count up from 0.
Bytes file_of(std::string_view header, std::size_t data_size = 0) {
  const std::uint64_t length = header.size();
  Bytes file(8 + header.size() + data_size);
  std::memcpy(file.data(), &length, 8);
  std::memcpy(file.data() + 8, header.data(), header.size());
  for (std::size_t i = 0; i < data_size; ++i) file[8 + header.size() + i] = static_cast<std::byte>(i);
  return file;
}

/// A source that owns its values.
template <class T>
TensorSource source(std::string name, std::vector<Index> shape, std::vector<T> values) {
  return {std::move(name), zamba::dtype_of<T>(), std::move(shape),
          [values = std::move(values)] { return bytes_of(values); }};
}

/// The message of the zamba::Error that f must throw.
template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const zamba::Error& error) {
    return error.what();
  }
  return "no error";
}

std::string refusal(const Bytes& file) {
  return message_of([&] { Safetensors::parse(file, "the file"); });
}

bool contains(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

/// The nearest bfloat16, ties to even, by arithmetic on values: no bits of the implementation's are used.
double nearest_bf16(double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(value), -126) - 7);
  const double rounded = std::nearbyint(value / unit) * unit;
  return std::abs(rounded) >= 0x1p128 ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

/// One value of type From, written to a file and read as T.
template <class T, class From>
T through(From value) {
  const auto file = zamba::serialize_safetensors({source<From>("x", {}, {value})});
  return zamba::read_values<T>(Safetensors::parse(file, "memory").tensors()[0])[0];
}

}  // namespace

TEST_CASE("safetensors: the fixtures are read, and written again byte by byte") {
  for (const char* name : {"operators.safetensors", "zamba/model.safetensors", "zamba/reference.safetensors",
                           "zamba-gqa/model.safetensors", "zamba-gqa/reference.safetensors"}) {
    CAPTURE(name);
    const auto path = fs::path(ZAMBA_TEST_DATA) / name;
    const auto file = Safetensors::open(path);
    REQUIRE(!file.tensors().empty());
    CHECK(file.origin() == path.string());
    std::vector<TensorSource> sources;
    for (const auto& tensor : file.tensors()) {
      sources.push_back({tensor.name, tensor.dtype, tensor.shape, [&tensor] { return tensor.bytes; }});
      CHECK(file.find(tensor.name) == &tensor);
    }
    const auto written = zamba::serialize_safetensors(sources, file.metadata());
    const zamba::MappedFile original(path);
    CHECK(std::equal(written.begin(), written.end(), original.bytes().begin(), original.bytes().end()));
  }
}

TEST_CASE("safetensors: names, shapes and values of a fixture") {
  const auto file = Safetensors::open(fs::path(ZAMBA_TEST_DATA) / "zamba/model.safetensors");
  CHECK(file.metadata() == zamba::Metadata{{"format", "pt"}});
  CHECK(file.find("model.embed_tokens") == nullptr);
  CHECK(file.find("") == nullptr);
  CHECK(file.find("zzz") == nullptr);
  const auto* embedding = file.find("model.embed_tokens.weight");
  REQUIRE(embedding != nullptr);
  CHECK(embedding->dtype == DType::F32);
  CHECK(embedding->shape == std::vector<Index>{96, 32});
  CHECK(embedding->count() == 96 * 32);
  const auto values = zamba::read_values<double>(*embedding);
  std::vector<double> row(32);
  zamba::read_values(*embedding, 5 * 32, 32, row.data());
  CHECK(std::equal(row.begin(), row.end(), values.begin() + 5 * 32));
  const auto moved = [&] { return Safetensors::open(file.origin()); }();
  CHECK(zamba::read_values<double>(*moved.find("model.embed_tokens.weight")) == values);

  const auto operators = Safetensors::open(fs::path(ZAMBA_TEST_DATA) / "operators.safetensors");
  const auto targets = zamba::read_values<zamba::Token>(*operators.find("cross_entropy.in.targets"));
  CHECK(targets.size() == 24);
}

TEST_CASE("safetensors: a file made by hand, at every alignment") {
  const std::string header =
      R"( {"__metadata__":{"who":"\u00e9\n"},"b":{"shape":[2],"dtype":"U16","data_offsets":[3,7]},)"
      R"("a":{"data_offsets":[0,3],"dtype":"U8","shape":[3,1]},"none":{"dtype":"F32","shape":[0,7],"data_offsets":[3,3]},)"
      R"("":{"dtype":"I32","shape":[],"data_offsets":[7,11]}}   )";
  const auto exact = file_of(header.substr(1), 11);
  for (std::size_t shift = 0; shift < 8; ++shift) {
    Bytes memory(shift);
    memory.insert(memory.end(), exact.begin(), exact.end());
    const auto file = Safetensors::parse(std::span(memory).subspan(shift), "memory");
    REQUIRE(file.tensors().size() == 4);
    CHECK(file.tensors()[0].name == "a");
    CHECK(file.tensors()[1].name == "none");
    CHECK(file.tensors()[1].count() == 0);
    CHECK(zamba::read_values<float>(file.tensors()[1]).empty());
    CHECK(zamba::read_values<std::uint16_t>(*file.find("b")) == std::vector<std::uint16_t>{0x0403, 0x0605});
    CHECK(zamba::read_values<Index>(*file.find("b")) == std::vector<Index>{0x0403, 0x0605});
    CHECK(zamba::read_values<zamba::Token>(*file.find("")) == std::vector<zamba::Token>{0x0a090807});
    CHECK(file.metadata() == zamba::Metadata{{"who", "\xc3\xa9\n"}});
  }
  CHECK(contains(refusal(file_of(header, 11)), "begin with '{'"));
  CHECK(Safetensors::parse(file_of("{}"), "memory").tensors().empty());
}

TEST_CASE("safetensors: every element type goes through a file and back") {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<double> f64{1.5, -0.0, 1e-310, inf};
  const std::vector<float> f32{1.5f, -0.0f, 1e-45f, -inf};
  const std::vector<zamba::f16> f16{{0x3c00}, {0x7e01}, {0x0001}};
  const std::vector<zamba::bf16> bf16{zamba::bf16(1.5f), zamba::bf16(-3.0f)};
  const std::vector<Index> i64{std::numeric_limits<Index>::min(), 7};
  const std::vector<zamba::Token> i32{-1, 31999};
  const std::vector<std::uint32_t> u32{0, 4'294'967'295u};
  const std::vector<std::uint16_t> u16{0, 65535};
  const std::vector<std::uint8_t> u8{0, 255, 7};
  const std::vector<std::int8_t> i8{-128, 127};
  const std::vector<TensorSource> sources{source("u8", {3}, u8),
                                          source("i8", {2}, i8),
                                          source("u16", {2}, u16),
                                          source("bf16", {2, 1}, bf16),
                                          source("f16", {3, 1}, f16),
                                          source("f32", {2, 2}, f32),
                                          source("f64", {4}, f64),
                                          source("i64", {1, 2}, i64),
                                          source("i32", {2, 1}, i32),
                                          source("u32", {1, 1, 2}, u32),
                                          {"flags", DType::BOOL, {3}, [&] { return bytes_of(u8); }},
                                          {"empty", DType::F32, {2, 0}, [] { return std::span<const std::byte>(); }}};
  const zamba::Metadata metadata{{"a \"key\"", "line\nline"}, {"\xc3\xa9", ""}};
  const auto memory = zamba::serialize_safetensors(sources, metadata);
  const auto path = fs::temp_directory_path() / ("zamba-safetensors-" + std::to_string(::getpid()));
  zamba::write_safetensors(path, sources, metadata);
  const auto file = Safetensors::open(path);
  const zamba::MappedFile mapped(path);
  fs::remove(path);
  CHECK(std::equal(memory.begin(), memory.end(), mapped.bytes().begin(), mapped.bytes().end()));
  CHECK(file.metadata() == metadata);

  // Larger elements come first, otherwise in the given order; every tensor is aligned to its element.
  std::string order;
  for (const auto& tensor : file.tensors()) {
    order += tensor.name + " ";
    const auto offset = static_cast<std::size_t>(tensor.bytes.data() - file.tensors()[0].bytes.data());
    CHECK(offset % zamba::size_of(tensor.dtype) == 0);
  }
  CHECK(order == "f64 i64 f32 i32 u32 empty u16 bf16 f16 u8 i8 flags ");
  REQUIRE(file.tensors().size() == sources.size());
  for (const auto& tensor : sources) {
    CAPTURE(tensor.name);
    const auto* entry = file.find(tensor.name);
    REQUIRE(entry != nullptr);
    CHECK(entry->dtype == tensor.dtype);
    CHECK(entry->shape == tensor.shape);
    const auto wanted = tensor.bytes();
    CHECK(std::equal(entry->bytes.begin(), entry->bytes.end(), wanted.begin(), wanted.end()));
  }
  CHECK(zamba::read_values<double>(*file.find("f64")) == f64);
  CHECK(zamba::read_values<float>(*file.find("f32")) == f32);
  CHECK(zamba::read_values<Index>(*file.find("i64")) == i64);
  CHECK(zamba::read_values<zamba::Token>(*file.find("i32")) == i32);
  CHECK(zamba::read_values<Index>(*file.find("u32")) == std::vector<Index>{0, 4'294'967'295});
  CHECK(zamba::read_values<zamba::Token>(*file.find("u16")) == std::vector<zamba::Token>{0, 65535});
  CHECK(zamba::read_values<zamba::Token>(*file.find("i8")) == std::vector<zamba::Token>{-128, 127});
  CHECK(zamba::read_values<zamba::Token>(*file.find("flags")) == std::vector<zamba::Token>{0, 1, 1});
}

TEST_CASE("safetensors: tensors with elements of one size keep the given order") {
  const auto memory = zamba::serialize_safetensors(
      {source<float>("z", {1}, {1}), source<float>("a", {1}, {2}), source<float>("m", {1}, {3})});
  const auto file = Safetensors::parse(memory, "memory");
  CHECK(file.tensors()[0].name == "z");
  CHECK(file.tensors()[1].name == "a");
  CHECK(file.tensors()[2].name == "m");
  const auto data = static_cast<std::size_t>(file.tensors()[0].bytes.data() - memory.data());
  CHECK(data % 8 == 0);
}

TEST_CASE("safetensors: what must not be written") {
  const auto refused = [](std::vector<TensorSource> sources, const zamba::Metadata& metadata = {}) {
    return message_of([&] { zamba::serialize_safetensors(sources, metadata); });
  };
  CHECK(contains(refused({source<float>("x", {1}, {1}), source<float>("x", {1}, {2})}), "two tensors are named 'x'"));
  CHECK(contains(refused({source<float>("__metadata__", {1}, {1})}), "two tensors are named '__metadata__'"));
  CHECK(contains(refused({source<float>("x", {3}, {1, 2})}), "tensor 'x' wants 12 bytes, came 8"));
  CHECK(contains(refused({source<float>("x", {-1}, {})}), "tensor 'x' has an impossible extent, -1"));
  CHECK(contains(refused({source<float>("x", {Index{1} << 62, 2}, {})}), "tensor 'x' has an impossible extent"));
  CHECK(contains(refused({source<float>("\xff", {1}, {1})}), "must be UTF-8"));
  CHECK(contains(refused({}, {{"key", "\xff"}}), "must be UTF-8"));

  const auto path = fs::temp_directory_path() / ("zamba-safetensors-" + std::to_string(::getpid()));
  zamba::write_safetensors(path, {source<float>("x", {1}, {1})});
  const auto message = message_of([&] { zamba::write_safetensors(path, {source<float>("x", {2}, {1})}); });
  CHECK(contains(message, "cannot write '" + path.string() + "': safetensors: tensor 'x' wants 8 bytes, came 4"));
  CHECK(zamba::read_values<float>(Safetensors::open(path).tensors()[0]) == std::vector<float>{1});
  fs::remove(path);
}

TEST_CASE("safetensors: malformed files are refused with a message that names file, tensor, wanted and came") {
  const std::string good = R"("x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  REQUIRE(refusal(file_of("{" + good + "}", 8)) == "no error");
  const auto refused = [](std::string_view header, std::size_t data_size, std::string_view message) {
    const auto came = refusal(file_of(header, data_size));
    CAPTURE(header.substr(0, 200));
    CAPTURE(came);
    CHECK(contains(came, "zamba: the file: "));
    CHECK(contains(came, message));
    CHECK(came.size() < 400);
  };
  const auto shape = [&](std::string_view text, std::string_view message) {
    refused(R"({"x":{"dtype":"F32","shape":)" + std::string(text) + R"(,"data_offsets":[0,8]}})", 8, message);
  };
  const auto offsets = [&](std::string_view text, std::size_t data_size, std::string_view message) {
    refused(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":)" + std::string(text) + "}}", data_size, message);
  };
  std::string ones = "[1";
  for (int i = 1; i < 33; ++i) ones += ",1";
  refused("", 0, "the header must be a JSON object and begin with '{'");
  refused("[]", 0, "the header must be a JSON object and begin with '{'");
  refused("{", 0, "the header is not valid JSON");
  refused("{}x", 0, "the header is not valid JSON");
  refused("{} {}", 0, "the header is not valid JSON");
  refused(std::string("{}\0{", 4), 0, "the header is not valid JSON: it holds a zero byte");
  refused("{" + good + ",}", 8, "the header is not valid JSON");
  refused("{\"\xff\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "the header is not valid JSON");
  refused(R"({"\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8, "the header is not valid JSON");
  refused(R"({"x":1})", 0, "tensor 'x' must be an object, came 1");
  refused(R"({"x":[]})", 0, "tensor 'x' must be an object, came an array");
  refused(R"({"x":null})", 0, "tensor 'x' must be an object, came a null");
  refused(R"({"x":{}})", 0, "tensor 'x' must have dtype, shape and data_offsets");
  refused(R"({"x":{"dtype":"F32","shape":[2]}})", 8, "tensor 'x' must have dtype, shape and data_offsets");
  refused(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":0}})", 8, "tensor 'x': 'more' is unknown");
  refused(R"({"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8, "'dtype' occurs twice");
  refused(R"({"x":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}})", 8, "'shape' occurs twice");
  refused("{" + good + "," + good + "}", 8, "tensor 'x' begins at byte 0 of the data, wanted 8: it overlaps");
  refused(
      R"({"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})",
      0, "tensor 'x' occurs twice");
  refused(R"({"x":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}})", 8, "BOOL, came 'F33'");
  refused(R"({"x":{"dtype":4,"shape":[2],"data_offsets":[0,8]}})", 8, "tensor 'x': 'dtype' must be one of F64, F32");
  refused(R"({"x":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}})", 8, "BOOL, came an array");
  shape("2", "'shape' must be an array of at most 32 integers, 0 or more, came 2");
  shape("\"2\"", "'shape' must be an array of at most 32 integers, 0 or more, came a string");
  shape("[2.0]", "'shape' must be an array of at most 32 integers, 0 or more, came a fraction");
  shape("[2e0]", "'shape' must be an array of at most 32 integers, 0 or more, came a fraction");
  shape("[-2]", "'shape' must be an array of at most 32 integers, 0 or more, came -2");
  shape("[\"2\"]", "'shape' must be an array of at most 32 integers, 0 or more, came a string");
  shape("[true]", "'shape' must be an array of at most 32 integers, 0 or more, came a boolean");
  shape("[[2]]", "'shape' must be an array of at most 32 integers, 0 or more, came an array");
  shape("[{}]", "'shape' must be an array of at most 32 integers, 0 or more, came an object");
  shape("[18446744073709551616]",
        "'shape' must be an array of at most 32 integers, 0 or more, came a fraction, or an integer beyond 64 bits");
  shape("[18446744073709551615]", "tensor 'x': the shape's size in bytes exceeds 2^63 - 1");
  shape("[4611686018427387904,4]", "tensor 'x': the shape's size in bytes exceeds 2^63 - 1");
  shape("[4294967296,4294967296,0]", "tensor 'x': the shape's size in bytes exceeds 2^63 - 1");
  shape(ones + "]", "'shape' must be an array of at most 32 integers, 0 or more, came more");
  shape("[1e999]", "the header is not valid JSON");
  shape("[3]", "tensor 'x': shape and F32 want 12 bytes, data_offsets [0, 8] hold 8");
  shape("[]", "tensor 'x': shape and F32 want 4 bytes, data_offsets [0, 8] hold 8");
  offsets("[0]", 8, "tensor 'x': 'data_offsets' must be two integers, came 1");
  offsets("[0,8,8]", 8, "'data_offsets' must be an array of two integers, 0 or more, came more");
  offsets("[-8,0]", 8, "'data_offsets' must be an array of two integers, 0 or more, came -8");
  offsets("[0,8.5]", 8, "'data_offsets' must be an array of two integers, 0 or more, came a fraction");
  offsets("[8,0]", 8, "tensor 'x': data_offsets [8, 0] end before they begin");
  offsets("[0,16]", 8, "tensor 'x': data_offsets [0, 16] reach beyond the 8 bytes of data in the file");
  offsets("[18446744073709551608,18446744073709551615]", 8, "reach beyond the 8 bytes of data");
  offsets("[8,16]", 16, "tensor 'x' begins at byte 8 of the data, wanted 0: it leaves a gap");
  offsets("[0,8]", 9, "the tensors end at byte 8 of the data, the file has 9 bytes of data");
  refused("{}", 1, "the tensors end at byte 0 of the data, the file has 1 bytes of data");
  refused("{" + good + R"(,"y":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}})", 10, "tensor 'y' begins at byte 6");
  refused("{" + good + R"(,"y":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}})", 8, "wanted 8: it overlaps");
  refused(R"({"__metadata__":1})", 0, "__metadata__ must be an object, came 1");
  refused(R"({"__metadata__":{"a":1}})", 0, "__metadata__: 'a' must be a string, came 1");
  refused(R"({"__metadata__":{"a":{}}})", 0, "__metadata__: 'a' must be a string, came an object");
  refused(R"({"__metadata__":{"a":["b"]}})", 0, "__metadata__: 'a' must be a string, came an array");
  refused(R"({"__metadata__":{"a":"b","a":"b"}})", 0, "__metadata__: 'a' occurs twice");
  refused(R"({"__metadata__":{},"__metadata__":{}})", 0, "__metadata__ occurs twice");
  refused(R"({"x":)" + std::string(1'000'000, '['), 0, "tensor 'x' must be an object, came an array");
  refused(R"({"x":{"shape":)" + std::string(1'000'000, '['), 0,
          "'shape' must be an array of at most 32 integers, 0 or more, came an array");
  refused(R"({"a)" + std::string(1'000'000, 'a') + R"(":1})", 0, "aaa...' must be an object");
}

TEST_CASE("safetensors: the header's length field") {
  const auto with_length = [](std::uint64_t length, std::size_t size) {
    Bytes file(size, std::byte{'{'});
    const auto field = std::as_bytes(std::span(&length, 1));
    std::copy_n(field.begin(), std::min<std::size_t>(8, size), file.begin());
    return refusal(file);
  };
  CHECK(contains(with_length(0, 0), "the file: a safetensors file has at least 8 bytes, came 0"));
  CHECK(contains(with_length(0, 7), "at least 8 bytes, came 7"));
  CHECK(contains(with_length(0, 8), "must be a JSON object"));
  CHECK(contains(with_length(1, 8), "length field says 1 bytes, the file has 0 after it"));
  CHECK(contains(with_length(93, 100), "length field says 93 bytes, the file has 92 after it"));
  CHECK(contains(with_length(100'000'001, 100), "may have 100000000 bytes, its length field says 100000001"));
  CHECK(contains(with_length(~std::uint64_t{0}, 100), "its length field says 18446744073709551615"));
  const auto missing = (fs::path(ZAMBA_TEST_DATA) / "missing.safetensors").string();
  CHECK(contains(message_of([&] { Safetensors::open(missing); }), missing));
}

TEST_CASE("read_values: ranges and kinds") {
  const auto memory = zamba::serialize_safetensors({source<float>("f", {4}, {0, 1, 2, 3}),
                                                    source<Index>("i", {3}, {1, -1, Index{1} << 31}),
                                                    source<std::int8_t>("b", {1}, {-1})});
  const auto file = Safetensors::parse(memory, "memory");
  float values[4] = {-1, -1, -1, -1};
  zamba::read_values(*file.find("f"), 1, 2, values);
  CHECK(std::vector<float>(values, values + 4) == std::vector<float>{1, 2, -1, -1});
  zamba::read_values(*file.find("f"), 4, 0, values);
  const auto message = [&](const char* name, Index first, Index count, auto type) {
    decltype(type) to[4];
    return message_of([&] { zamba::read_values(*file.find(name), first, count, to); });
  };
  CHECK(contains(message("f", 1, 4, 0.0f), "tensor 'f' has 4 elements, wanted 4 from 1"));
  CHECK(contains(message("f", -1, 1, 0.0f), "wanted 1 from -1"));
  CHECK(contains(message("f", 0, -1, 0.0f), "wanted -1 from 0"));
  CHECK(contains(message("f", 2, std::numeric_limits<Index>::max(), 0.0f), "from 2"));
  CHECK(contains(message("f", 0, 1, zamba::Token()), "tensor 'f' holds F32, wanted integers"));
  CHECK(contains(message("i", 0, 1, 0.0), "tensor 'i' holds I64, wanted floating point"));
  CHECK(message("i", 0, 2, zamba::Token()) == "no error");
  CHECK(contains(message("i", 0, 3, zamba::Token()),
                 "tensor 'i': element 2 is 2147483648, wanted -2147483648 to 2147483647"));
  CHECK(contains(message("i", 1, 1, std::uint8_t()), "tensor 'i': element 1 is -1, wanted 0 to 255"));
  CHECK(contains(message("b", 0, 1, std::uint8_t()), "tensor 'b': element 0 is -1, wanted 0 to 255"));
}

TEST_CASE("read_values: every half-precision value, against sign * mantissa * 2^exponent") {
  std::vector<zamba::f16> all(65536);
  for (unsigned i = 0; i < 65536; ++i) all[i].bits = static_cast<std::uint16_t>(i);
  const auto memory = zamba::serialize_safetensors({source("x", {65536}, all)});
  const auto file = Safetensors::parse(memory, "memory");
  const auto doubles = zamba::read_values<double>(file.tensors()[0]);
  const auto floats = zamba::read_values<float>(file.tensors()[0]);
  const auto bf16s = zamba::read_values<zamba::bf16>(file.tensors()[0]);
  int wrong_doubles = 0, wrong_floats = 0, wrong_bf16s = 0;
  for (int i = 0; i < 65536; ++i) {
    const int exponent = i / 1024 % 32, mantissa = i % 1024;
    double wanted = exponent == 31 ? (mantissa ? NAN : INFINITY)
                    : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                   : std::ldexp(mantissa, -24);
    if (i >= 32768) wanted = -wanted;
    const auto at = static_cast<std::size_t>(i);
    wrong_doubles += !same(doubles[at], wanted);
    wrong_floats += !same(floats[at], wanted);
    wrong_bf16s += !same(bf16s[at], nearest_bf16(wanted));
  }
  CHECK(wrong_doubles == 0);
  CHECK(wrong_floats == 0);
  CHECK(wrong_bf16s == 0);
}

TEST_CASE("read_values: every bfloat16 value is exact as float and double, and copied bit by bit") {
  std::vector<zamba::bf16> all(65536);
  for (unsigned i = 0; i < 65536; ++i) all[i].bits = static_cast<std::uint16_t>(i);
  const auto memory = zamba::serialize_safetensors({source("x", {65536}, all)});
  const auto file = Safetensors::parse(memory, "memory");
  const auto doubles = zamba::read_values<double>(file.tensors()[0]);
  const auto floats = zamba::read_values<float>(file.tensors()[0]);
  const auto bf16s = zamba::read_values<zamba::bf16>(file.tensors()[0]);
  int wrong = 0;
  for (int i = 0; i < 65536; ++i) {
    const int exponent = i / 128 % 256, mantissa = i % 128;
    double wanted = exponent == 255 ? (mantissa ? NAN : INFINITY)
                    : exponent      ? std::ldexp(128 + mantissa, exponent - 134)
                                    : std::ldexp(mantissa, -133);
    if (i >= 32768) wanted = -wanted;
    const auto at = static_cast<std::size_t>(i);
    wrong += !same(doubles[at], wanted) || !same(floats[at], wanted) || bf16s[at].bits != i;
  }
  CHECK(wrong == 0);
}

TEST_CASE("read_values: bfloat16 rounds once, to nearest, ties to even") {
  // 1 + 2^-8 lies half way between 1 and 1 + 2^-7; the next odd tie rounds up.
  CHECK(through<zamba::bf16>(1.0f + 0x1p-8f).bits == 0x3f80);
  CHECK(through<zamba::bf16>(1.0f + 0x3p-8f).bits == 0x3f82);
  CHECK(through<zamba::bf16>(std::nextafter(1.0f + 0x1p-8f, 2.0f)).bits == 0x3f81);
  CHECK(through<zamba::bf16>(std::nextafter(1.0f + 0x3p-8f, 1.0f)).bits == 0x3f81);
  // A double just beside a tie: through float it would become the tie.
  CHECK(through<zamba::bf16>(1.0 + 0x1p-8 + 0x1p-50).bits == 0x3f81);
  CHECK(through<zamba::bf16>(-(1.0 + 0x1p-8 + 0x1p-50)).bits == 0xbf81);
  CHECK(through<zamba::bf16>(1.0 + 0x3p-8 - 0x1p-50).bits == 0x3f81);
  CHECK(through<zamba::bf16>(1.0 + 0x1p-8).bits == 0x3f80);
  // Around the largest and the smallest.
  CHECK(through<zamba::bf16>(std::numeric_limits<float>::max()).bits == 0x7f80);
  CHECK(through<zamba::bf16>(1e300).bits == 0x7f80);
  CHECK(through<zamba::bf16>(-1e300).bits == 0xff80);
  CHECK(through<zamba::bf16>(1e-300).bits == 0x0000);
  CHECK(through<zamba::bf16>(-1e-300).bits == 0x8000);
  CHECK(through<zamba::bf16>(0x1p-134).bits == 0x0000);
  CHECK(through<zamba::bf16>(0x1p-134 + 0x1p-170).bits == 0x0001);
  for (const double nan : {std::nan(""), -std::nan("1")}) {
    CHECK(std::isnan(through<zamba::bf16>(nan)));
    CHECK(std::isnan(through<zamba::bf16>(static_cast<float>(nan))));
    CHECK(std::isnan(through<float>(nan)));
  }
  CHECK(std::isnan(through<zamba::bf16>(std::bit_cast<float>(0x7f800001u))));
  CHECK(through<float>(1e300) == std::numeric_limits<float>::infinity());
  CHECK(through<float>(1.0 + 0x1p-24) == 1.0f);
  CHECK(through<float>(1.0 + 0x3p-24) == 1.0f + 0x1p-22f);

  // Random bits as float and double, at the scale of bfloat16's own range and beyond.
  zamba::Random random(zamba::Seed{5});
  std::vector<float> floats(20'000);
  std::vector<double> doubles(20'000);
  for (auto& value : floats) value = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
  for (std::size_t i = 0; i < doubles.size(); ++i) {
    // Half of them beside a tie of bfloat16, by as little as the last bit of a double.
    const double tie =
        std::ldexp(256 + static_cast<double>(random.below(128)) * 2 + 1, static_cast<int>(random.below(270)) - 145);
    const double step = random.below(2) ? 1e300 : 0.0;
    doubles[i] =
        i % 2 ? std::nextafter(tie, step) : std::ldexp(random.normal(), static_cast<int>(random.below(300)) - 150);
  }
  const auto memory = zamba::serialize_safetensors({source("d", {20'000}, doubles), source("f", {20'000}, floats)});
  const auto file = Safetensors::parse(memory, "memory");
  const auto from_doubles = zamba::read_values<zamba::bf16>(*file.find("d"));
  const auto from_floats = zamba::read_values<zamba::bf16>(*file.find("f"));
  int wrong = 0;
  for (std::size_t i = 0; i < doubles.size(); ++i) {
    wrong += !same(from_doubles[i], nearest_bf16(doubles[i]));
    wrong += !same(from_floats[i], nearest_bf16(floats[i]));
  }
  CHECK(wrong == 0);
}

namespace {

/// Memory that ends at a page that cannot be read: one byte read beyond ends the program, without any sanitizer.
class Guarded {
 public:
  explicit Guarded(std::size_t capacity)
      : page_(static_cast<std::size_t>(::sysconf(_SC_PAGESIZE))), size_((capacity / page_ + 1) * page_) {
    void* memory = ::mmap(nullptr, size_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    start_ = static_cast<std::byte*>(memory);
    REQUIRE(::mprotect(start_ + size_, page_, PROT_NONE) == 0);
  }
  ~Guarded() { ::munmap(start_, size_ + page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  /// The bytes, moved against the page.
  std::span<const std::byte> hold(const Bytes& bytes) {
    REQUIRE(bytes.size() <= size_);
    std::byte* to = start_ + size_ - bytes.size();
    std::copy(bytes.begin(), bytes.end(), to);
    return {to, bytes.size()};
  }

 private:
  std::size_t page_, size_;
  std::byte* start_;
};

std::uint64_t header_length(const Bytes& file) {
  std::uint64_t length = 0;
  if (file.size() >= 8) std::memcpy(&length, file.data(), 8);
  return length;
}

/// One random change: bits, lengths, copies of parts, and edits of the header that keep it JSON.
void mutate(Bytes& file, const Bytes& other, zamba::Random& random) {
  const auto below = [&](std::size_t count) {
    return static_cast<std::size_t>(random.below(static_cast<Index>(std::max<std::size_t>(count, 1))));
  };
  const auto at = [&](std::size_t i) { return file.begin() + static_cast<std::ptrdiff_t>(i); };
  const std::size_t header_end =
      std::min<std::size_t>(file.size(), 8 + std::min<std::size_t>(header_length(file), 1 << 20));
  switch (below(8)) {
    case 0:  // flip a bit of the header or of any byte
      if (!file.empty()) file[below(below(2) ? file.size() : header_end)] ^= std::byte{1} << below(8);
      break;
    case 1:  // truncate
      file.resize(below(file.size() + 1));
      break;
    case 2: {  // insert random bytes
      const Bytes some(1 + below(9), static_cast<std::byte>(below(256)));
      file.insert(at(below(file.size() + 1)), some.begin(), some.end());
      break;
    }
    case 3: {  // splice a part of the other file over this one's
      const std::size_t from = below(other.size()), count = below(std::min<std::size_t>(other.size() - from, 80));
      const std::size_t to = below(file.size());
      for (std::size_t i = 0; i < count && to + i < file.size(); ++i) file[to + i] = other[from + i];
      break;
    }
    case 4: {  // repeat or remove a part of the header, with the length field corrected
      if (header_end <= 8) break;
      const std::size_t from = 8 + below(header_end - 8), count = below(std::min<std::size_t>(header_end - from, 60));
      std::uint64_t length = header_length(file);
      if (below(2)) {
        const Bytes part(at(from), at(from + count));
        file.insert(at(8 + below(header_end - 8)), part.begin(), part.end());
        length += count;
      } else {
        file.erase(at(from), at(from + count));
        length -= count;
      }
      std::memcpy(file.data(), &length, 8);
      break;
    }
    case 5:
    case 6: {  // put another integer in the place of one in the header, with the length field corrected
      std::vector<std::size_t> digits;
      for (std::size_t i = 8; i < header_end; ++i)
        if (file[i] >= std::byte{'0'} && file[i] <= std::byte{'9'}) digits.push_back(i);
      if (digits.empty()) break;
      const std::size_t from = digits[below(digits.size())];
      std::size_t to = from;
      while (to < header_end && file[to] >= std::byte{'0'} && file[to] <= std::byte{'9'}) ++to;
      const char* const numbers[] = {"0",
                                     "1",
                                     "2",
                                     "4",
                                     "8",
                                     "12",
                                     "-1",
                                     "24",
                                     "4294967296",
                                     "9223372036854775807",
                                     "9223372036854775808",
                                     "18446744073709551615",
                                     "18446744073709551616",
                                     "1e3",
                                     "0.5",
                                     "[1]",
                                     "{}",
                                     "null",
                                     "\"8\"",
                                     "1,1"};
      const std::string number = numbers[below(std::size(numbers))];
      file.erase(at(from), at(to));
      const auto text = std::as_bytes(std::span(number));
      file.insert(at(from), text.begin(), text.end());
      const std::uint64_t length = header_length(file) + number.size() - (to - from);
      std::memcpy(file.data(), &length, 8);
      break;
    }
    default: {  // another length field: near, or anything
      if (file.size() < 8) break;
      std::uint64_t length = below(2) ? header_length(file) + below(17) - 8 : random.bits() >> below(64);
      std::memcpy(file.data(), &length, 8);
    }
  }
}

}  // namespace

TEST_CASE("safetensors: 20,000 mutations of two files are refused or stay inside the bytes") {
  const Bytes seeds[] = {
      zamba::serialize_safetensors(
          {source("model.weight", {8, 16}, std::vector<float>(128, 1.0f)), source<Index>("ids", {2}, {7, 8}),
           source<std::uint8_t>("flags", {5}, {1, 0, 1, 0, 1}), source<float>("none", {0, 4}, {})},
          {{"format", "pt"}, {"\xc3\xa9", "\n"}}),
      zamba::serialize_safetensors({source<zamba::bf16>("a", {2, 2}, std::vector<zamba::bf16>(4)),
                                    source<zamba::bf16>("b", {3}, std::vector<zamba::bf16>(3)),
                                    source<zamba::f16>("c", {}, {zamba::f16{1}})})};
  Guarded memory(1 << 16);
  zamba::Random random(zamba::Seed{20'000});
  int accepted = 0, refused = 0, outside = 0, unclear = 0;
  unsigned sum = 0;
  for (int i = 0; i < 20'000; ++i) {
    Bytes file = seeds[i % 2];
    for (Index changes = 1 + random.below(2); changes > 0; --changes) mutate(file, seeds[(i + 1) % 2], random);
    const auto bytes = memory.hold(file);
    try {
      const auto parsed = Safetensors::parse(bytes, "mutated");
      ++accepted;
      for (const auto& tensor : parsed.tensors()) {
        outside += tensor.bytes.data() < bytes.data() ||
                   tensor.bytes.data() + tensor.bytes.size() > bytes.data() + bytes.size();
        Index count = 1;
        for (const Index extent : tensor.shape) count *= extent;
        outside += count != tensor.count() || parsed.find(tensor.name) != &tensor;
        for (const auto byte : tensor.bytes) sum += static_cast<unsigned>(byte);
      }
    } catch (const zamba::Error& error) {
      ++refused;
      unclear += !contains(error.what(), "zamba: mutated: ");
    }
  }
  CHECK(outside == 0);
  CHECK(unclear == 0);
  // Both ways are well travelled: else the mutations would prove little.
  CHECK(accepted > 1'000);
  CHECK(refused > 10'000);
  CHECK(sum > 0);
}
