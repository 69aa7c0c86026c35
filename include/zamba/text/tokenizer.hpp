// SPDX-License-Identifier: MIT
// Tokenizer: the tokenizer.json of a model in the Hugging Face layout, byte-pair encoding in two forms.
//
//   Llama, Mistral, Zamba   spaces are written as U+2581; a character without a token is its bytes, <0x00> to <0xFF>
//   GPT-2, GPT-NeoX, Mamba  words by the pattern of GPT-2, bytes written as characters
//
// It does what the file says, part by part (huggingface.co/docs/tokenizers, "Pipeline"):
//
//   text -> added tokens cut out -> normalizer -> added tokens cut out -> pre-tokenizer -> merges -> post-processor
//
//   normalizer      Prepend, Replace of a text, NFC, Sequence, none
//   pre_tokenizer   Metaspace, ByteLevel, none
//   model           BPE with byte_fallback, unk_token, fuse_unk, ignore_merges
//   post_processor  TemplateProcessing, ByteLevel, none
//   decoder         Sequence of Replace, ByteFallback, Fuse and Strip; ByteLevel; Metaspace; none
//
// Anything else is refused by an Error that names it. `truncation` and `padding` are not applied.
//
// Ids equal those of the package `tokenizers`. Texts may be any bytes: those that are not UTF-8 are kept, through bytes
// or byte_fallback. decode(encode(text)) is the text, but for what the file itself loses: NFC; U+2581, which becomes a
// space; the names of added tokens within the text, and spaces beside them; where Metaspace puts a space in front, a
// space that was there; and what its vocabulary cannot write, in whose place something else stands (Unknown).
//
// A text of n bytes takes O(n log n), whatever the file says: its steps may make 64 times as much of a text, no more.
// A const Tokenizer may be used by several threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <zamba/device.hpp>
#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/io/json.hpp>
#include <zamba/io/json_part.hpp>
#include <zamba/io/problems.hpp>
#include <zamba/text/tokenizer/added_tokens.hpp>
#include <zamba/text/tokenizer/bpe.hpp>
#include <zamba/text/tokenizer/decoder.hpp>
#include <zamba/text/tokenizer/normalizer.hpp>

namespace zamba {

/// What becomes of a character, of ByteLevel of a byte, that the vocabulary has no token for.
enum class Unknown {
  replace,  // the file's unk_token stands for it; without one U+FFFD, or where that has no tokens either, '?'
  refuse,   // an Error that says which byte, and where
};

struct EncodeOptions {
  bool add_special = true;   // what the post-processor puts around the text: the token that begins a document, say
  bool find_special = true;  // false: "</s>" in a text is text, as that of strangers should be
  Unknown unknown = Unknown::replace;
};

struct DecodeOptions {
  bool special = false;  // special tokens as their names; otherwise they are left out
};

class Tokenizer {
 public:
  /// Of a tokenizer.json, or of the folder that holds it. A tokenizer_config.json beside it names special tokens.
  static Tokenizer load(const std::filesystem::path& path);
  /// Of the texts of both files; `origin` names the first one in messages.
  static Tokenizer parse(std::string_view text, const std::string& origin = "tokenizer.json",
                         std::string_view config = "{}");

  /// Where nothing can stand for what the vocabulary has no token for, an Error as by Unknown::refuse.
  std::vector<Token> encode(std::string_view text, EncodeOptions options = {}) const;
  std::string decode(std::span<const Token> tokens, DecodeOptions options = {}) const;

  /// One more than the highest id. A model's vocabulary may be padded beyond it: such ids are refused by decode.
  Index vocabulary() const { return static_cast<Index>(entries_.size()); }
  /// Whether an id is that of a token: ids may be left out, and a model's vocabulary may be larger.
  bool has(Token id) const { return id >= 0 && id < vocabulary() && entries_[static_cast<std::size_t>(id)].known; }
  /// The token as the file writes it, "\u2581the" say. An id that no token has is an Error.
  const std::string& token(Token id) const { return entry(id).token; }
  /// The inverse of token().
  std::optional<Token> id(std::string_view token) const;
  bool is_special(Token id) const { return entry(id).special; }

  /// The tokens that begin a document, end it, and fill a batch, where tokenizer_config.json names them, or where
  /// special tokens have the customary names <s>, </s> and <pad>.
  std::optional<Token> bos() const { return bos_; }
  std::optional<Token> eos() const { return eos_; }
  std::optional<Token> pad() const { return pad_; }
  /// What stands for a character without a token.
  std::optional<Token> unk() const { return model_.unk(); }

  /// Where a token stands in a text: decoding one after the other begins at beginning(), or, after a prompt, at
  /// Place().
  using Place = detail::Decoder::Place;
  Place beginning() const { return decoder_.beginning(); }
  /// Appends what a token stands for, perhaps a part of a character, and moves the place behind it.
  void append(Token id, Place& place, std::string& text, DecodeOptions options = {}) const;

 private:
  struct Entry {
    std::string token, text;  // as in the file, and what it stands for
    bool known = false, special = false;
  };

  const Entry& entry(Token id) const {
    require(has(id), "Tokenizer: token ", id, " is not in the vocabulary of ", vocabulary());
    return entries_[static_cast<std::size_t>(id)];
  }
  [[noreturn]] void refuse_unknown(const std::string& character, std::string_view text, std::size_t begin) const;
  void put(const std::string& token, Token id);
  void read_added(const detail::JsonPart& tokens);
  void read_template(const detail::JsonPart& processor);
  void read_config(const detail::JsonPart& config);

  detail::Bpe model_;
  detail::Normalizer normalizer_;
  detail::PreTokenizer pre_tokenizer_;
  detail::Decoder decoder_;
  detail::AddedTokens added_raw_, added_normalized_;
  detail::TokenIds added_ids_;
  std::vector<Entry> entries_;         // by id
  std::vector<Token> before_, after_;  // the post-processor's
  std::optional<Token> bos_, eos_, pad_;
};

// ---- Reading ----

inline Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  const auto file = is_folder(path) ? path / "tokenizer.json" : path;
  const auto text_of = [](const MappedFile& mapped) {
    return std::string_view(reinterpret_cast<const char*>(mapped.bytes().data()), mapped.bytes().size());
  };
  const MappedFile mapped(file);
  const auto config = file.parent_path() / "tokenizer_config.json";
  if (!is_there(config)) return parse(text_of(mapped), file.string());
  const MappedFile mapped_config(config);
  return parse(text_of(mapped), file.string(), text_of(mapped_config));
}

inline Tokenizer Tokenizer::parse(std::string_view text, const std::string& origin, std::string_view config) {
  const nlohmann::json json = detail::parse_object(text, origin);
  const detail::JsonPart file(json, origin);
  Tokenizer result;
  result.model_ = detail::Bpe(file["model"]);
  result.normalizer_ = detail::Normalizer(file["normalizer"]);
  result.pre_tokenizer_ = detail::PreTokenizer(file["pre_tokenizer"]);
  result.decoder_ = detail::Decoder(file["decoder"]);
  for (const char* stands_for_unknown : {"\ufffd", "?"})
    if (result.model_.replace_unknown_by(result.pre_tokenizer_.written(stands_for_unknown))) break;
  for (const auto& [token, id] : result.model_.ids()) result.put(token, id);
  result.read_added(file["added_tokens"]);
  result.read_template(file["post_processor"]);
  const std::string place = origin + ": tokenizer_config.json";
  const nlohmann::json named = detail::parse_object(config, place);
  result.read_config({named, place});
  return result;
}

inline void Tokenizer::put(const std::string& token, Token id) {
  const auto at = static_cast<std::size_t>(id);
  if (at >= entries_.size()) entries_.resize(at + 1);
  entries_[at] = {token, decoder_.text_of(token, false), true, false};
}

inline void Tokenizer::read_added(const detail::JsonPart& tokens) {
  std::vector<detail::AddedToken> added;
  tokens.each([&](const detail::JsonPart& part) {
    detail::AddedToken token{.content = part["content"].text(),
                             .id = static_cast<Token>(part["id"].integer(detail::largest_id)),
                             .special = part["special"].flag(false),
                             .single_word = part["single_word"].flag(false),
                             .lstrip = part["lstrip"].flag(false),
                             .rstrip = part["rstrip"].flag(false),
                             .normalized = part["normalized"].flag(false)};
    const auto known = model_.id(token.content);
    require(!token.content.empty(), part.place(), ": wanted a text to look for, came none");
    require(!known || *known == token.id, part.place(), ": ", detail::quote(token.content), " has id ", token.id,
            ", in the model's vocabulary ", known.value_or(0));
    require(known || !has(token.id), part.place(), ": id ", token.id, " is that of another token too");
    require(added_ids_.emplace(token.content, token.id).second, part.place(), ": ", detail::quote(token.content),
            " occurs twice");
    put(token.content, token.id);
    Entry& entry = entries_[static_cast<std::size_t>(token.id)];
    entry.special = token.special;
    entry.text = decoder_.text_of(token.normalized ? normalizer_(token.content) : token.content, true);
    added.push_back(std::move(token));
  });
  // Of two that are looked for by one text, the special one counts.
  std::stable_partition(added.begin(), added.end(), [](const auto& token) { return token.special; });
  for (const auto& token : added) {
    if (token.normalized)
      added_normalized_.add(normalizer_(token.content), token);
    else
      added_raw_.add(token.content, token);
  }
  added_raw_.link();
  added_normalized_.link();
}

inline void Tokenizer::read_template(const detail::JsonPart& processor) {
  if (processor.is_null()) return;
  const std::string& type = processor["type"].text();
  if (type == "ByteLevel") return;  // it corrects offsets, which are not kept here
  if (type == "Sequence")
    return processor["processors"].each([&](const detail::JsonPart& part) { read_template(part); });
  require(type == "TemplateProcessing", processor.place(), ": type ", detail::quote(type),
          " is not supported, wanted TemplateProcessing, ByteLevel, Sequence or none");
  constexpr std::size_t most_around = 1024;
  std::vector<Token> before, after;
  bool text_met = false;
  processor["single"].each([&](const detail::JsonPart& part) {
    if (const auto sequence = part["Sequence"]; !sequence.is_null()) {
      if (text_met || sequence["id"].text() != "A") sequence.refuse("the sequence A, once");
      text_met = true;
      return;
    }
    const std::string& name = part["SpecialToken"]["id"].text();
    processor["special_tokens"][name.c_str()]["ids"].each([&](const detail::JsonPart& id) {
      const auto token = static_cast<Token>(id.integer(vocabulary() - 1));
      if (!has(token)) id.refuse("the id of a token");
      (text_met ? after : before).push_back(token);
      require(before_.size() + after_.size() + before.size() + after.size() <= most_around, processor.place(),
              ": at most ", most_around, " tokens around a text are supported, came more");
    });
  });
  if (!text_met) processor["single"].refuse("the sequence A among the template's parts");
  before_.insert(before_.begin(), before.begin(), before.end());
  after_.insert(after_.end(), after.begin(), after.end());
}

inline void Tokenizer::read_config(const detail::JsonPart& config) {
  const auto named = [&](const char* key, std::string_view customary) -> std::optional<Token> {
    const detail::JsonPart part = config[key];
    if (!part.is_null()) {
      const std::string& name = part.is_text() ? part.text() : part["content"].text();
      const auto found = id(name);
      require(found.has_value(), part.place(), ": ", detail::quote(name), " is not in the vocabulary");
      return found;
    }
    const auto at = added_ids_.find(customary);
    return at != added_ids_.end() && is_special(at->second) ? std::optional(at->second) : std::nullopt;
  };
  bos_ = named("bos_token", "<s>");
  eos_ = named("eos_token", "</s>");
  pad_ = named("pad_token", "<pad>");
}

// ---- Using ----

inline std::optional<Token> Tokenizer::id(std::string_view token) const {
  const auto at = added_ids_.find(token);
  return at != added_ids_.end() ? std::optional(at->second) : model_.id(token);
}

inline std::vector<Token> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  std::vector<Token> tokens;
  detail::Bpe::Scratch scratch;
  scratch.refuse_unknown = options.unknown == Unknown::refuse;
  if (options.add_special) tokens = before_;
  added_raw_.split(text, options.find_special, [&](std::size_t begin, std::string_view part, Token added) {
    if (added != detail::no_token) return tokens.push_back(added);
    const std::string normalized = normalizer_(part);
    added_normalized_.split(normalized, options.find_special, [&](std::size_t at, std::string_view piece, Token id) {
      if (id != detail::no_token) return tokens.push_back(id);
      pre_tokenizer_.split(piece, begin + at == 0,
                           [&](std::string_view word) { model_.encode(word, tokens, scratch); });
    });
    if (!scratch.unknown.empty()) refuse_unknown(scratch.unknown, text, begin);
  });
  if (options.add_special) tokens.insert(tokens.end(), after_.begin(), after_.end());
  return tokens;
}

/// `begin`: the character is that or behind it, or a step before has made it.
inline void Tokenizer::refuse_unknown(const std::string& character, std::string_view text, std::size_t begin) const {
  const bool by_bytes = pre_tokenizer_.by_bytes();
  const std::string bytes = by_bytes ? detail::ByteAlphabet::get().read(character) : character;
  const auto size_at = [&](std::size_t at) { return by_bytes ? 1 : detail::character_at(text, at).size; };
  while (begin < text.size() && text.substr(begin, size_at(begin)) != bytes) begin += size_at(begin);
  std::string named;
  for (const char byte : bytes) named += " " + detail::byte_token(static_cast<unsigned char>(byte)).substr(1, 4);
  fail("Tokenizer: no token for byte", bytes.size() > 1 ? "s" : "", named,
       begin < text.size() ? " at offset " + std::to_string(begin) + " of the text" : " of the text as normalised");
}

inline void Tokenizer::append(Token id, Place& place, std::string& text, DecodeOptions options) const {
  const Entry& found = entry(id);
  if (!found.special || options.special) decoder_.append(found.token, found.text, place, text);
}

inline std::string Tokenizer::decode(std::span<const Token> tokens, DecodeOptions options) const {
  std::string text;
  Place place = beginning();
  for (const Token token : tokens) append(token, place, text, options);
  return text;
}

}  // namespace zamba
