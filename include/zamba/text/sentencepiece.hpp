// SPDX-License-Identifier: MIT
// SentencePiece: a tokenizer.model, by SentencePiece's own library, with the members of Tokenizer.
//
// It is there where <sentencepiece_processor.h> is (Debian: libsentencepiece-dev) and wants -lsentencepiece; anywhere
// else, load and parse do not compile, and say so.
//
// Texts must be UTF-8: the library makes U+FFFD of other bytes. Special tokens are never found in a text.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <zamba/device.hpp>
#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/op.hpp>
#include <zamba/text/replace_all.hpp>
#include <zamba/text/tokenizer.hpp>

#if __has_include(<sentencepiece_processor.h>)
#include <exception>
#include <memory>

#include <sentencepiece_processor.h>

namespace zamba {

class SentencePiece {
 public:
  /// Of a tokenizer.model, or of the folder that holds it.
  static SentencePiece load(const std::filesystem::path& path) {
    const auto file = is_folder(path) ? path / "tokenizer.model" : path;
    const MappedFile mapped(file);
    return parse({reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size()}, file.string());
  }

  /// Of the bytes of the file; `origin` names it in messages.
  static SentencePiece parse(std::string_view bytes, const std::string& origin = "tokenizer.model") {
    SentencePiece result;
    result.library_ = std::make_unique<sentencepiece::SentencePieceProcessor>();
    run(origin, [&] { return result.library_->LoadFromSerializedProto(bytes); });
    require(result.vocabulary() > 0, origin, ": wanted a model of SentencePiece, came one without pieces");
    const auto first = result.encode("a", {.add_special = false});
    result.space_in_front_ = !first.empty() && result.token(first[0]).starts_with(detail::space_mark);
    return result;
  }

  /// add_special: begins with bos() where the model has one, as Llama does.
  std::vector<Token> encode(std::string_view text, EncodeOptions options = {}) const {
    std::vector<int> ids;
    run("SentencePiece: encode", [&] { return library_->Encode(text, &ids); });
    std::vector<Token> tokens(ids.begin(), ids.end());
    if (options.add_special && bos()) tokens.insert(tokens.begin(), *bos());
    return tokens;
  }

  std::string decode(std::span<const Token> tokens, DecodeOptions options = {}) const {
    std::string text;
    Place place = beginning();
    for (const Token token : tokens) append(token, place, text, options);
    return text;
  }

  Index vocabulary() const { return library_->GetPieceSize(); }
  const std::string& token(Token id) const { return library_->IdToPiece(checked(id)); }
  std::optional<Token> id(std::string_view token) const {
    const Token found = library_->PieceToId(token);
    return library_->IsUnknown(found) && token != library_->IdToPiece(found) ? std::nullopt : std::optional(found);
  }
  bool is_special(Token id) const { return library_->IsControl(checked(id)) || library_->IsUnused(id); }

  std::optional<Token> bos() const { return where_named(library_->bos_id()); }
  std::optional<Token> eos() const { return where_named(library_->eos_id()); }
  std::optional<Token> pad() const { return where_named(library_->pad_id()); }
  std::optional<Token> unk() const { return where_named(library_->unk_id()); }

  /// As those of Tokenizer, for TextStream.
  struct Place {
    bool strip = false;  // the space in front of the text is still to be left out
  };
  Place beginning() const { return {space_in_front_}; }
  void append(Token id, Place& place, std::string& text, DecodeOptions options = {}) const {
    std::string piece = token(id);
    unsigned byte = 0;
    if (is_special(id)) {
      if (options.special) text += piece;
      return;
    }
    if (library_->IsUnknown(id)) {
      piece = " \u2047 ";  // as the library writes it
    } else if (library_->IsByte(id) && detail::read_byte_token(piece, byte)) {
      piece = static_cast<char>(byte);
    } else {
      piece = detail::replace_all(piece, detail::space_mark, " ");
      if (place.strip && piece.starts_with(' ')) piece.erase(0, 1);
    }
    place.strip = false;
    text += piece;
  }

 private:
  /// Calls the library, which reports most trouble by a status; a damaged file may end in an exception of its parts.
  template <class F>
  static void run(const std::string& place, F&& call) {
    std::string trouble;
    try {
      const sentencepiece::util::Status status = call();
      if (status.ok()) return;
      trouble = status.message();
    } catch (const std::exception& error) {
      trouble = error.what();
    }
    fail(place, ": ", trouble);
  }
  static std::optional<Token> where_named(int id) { return id < 0 ? std::nullopt : std::optional<Token>(id); }
  Token checked(Token id) const {
    require(id >= 0 && id < vocabulary(), "SentencePiece: token ", id, " is not in the vocabulary of ", vocabulary());
    return id;
  }

  std::unique_ptr<sentencepiece::SentencePieceProcessor> library_;
  bool space_in_front_ = false;  // encode puts a space in front of a text
};

}  // namespace zamba

#else

namespace zamba {

class SentencePiece {
 public:
  template <class Path>
  static SentencePiece load(const Path&) {
    return missing<Path>();
  }
  template <class Text>
  static SentencePiece parse(const Text&, const std::string& = {}) {
    return missing<Text>();
  }

 private:
  template <class T>
  static SentencePiece missing() {
    static_assert(detail::no_version_for<T>,
                  "zamba::SentencePiece needs <sentencepiece_processor.h>, which is not here: Debian has it in "
                  "libsentencepiece-dev");
    return {};
  }
};

}  // namespace zamba

#endif
