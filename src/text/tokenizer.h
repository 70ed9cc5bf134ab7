// The tokenizer: text to ids and back, exactly as the official tokenizer.json defines it
// (chat_encoding.md 6).
//
// It reads the official file and the smaller ones tokenizer_cut.h makes. Encoding and decoding are
// const and safe from many threads at once: each call borrows a piece cache (2 MiB) that the next
// one reuses. Invalid UTF-8 becomes U+FFFD (maximal subparts) before anything else. A DecodeStream
// belongs to one thread and must not outlive its tokenizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/utf8.h"

namespace hadal::text {

/// What added tokens (`<think>`, `<|User|>`, ...) in the text become.
enum class SpecialTokens : uint8_t {
  kRecognise,  ///< their ids: for prompts we rendered
  kAsText,     ///< ordinary text: for text that users bring
};

/// Bytes [begin, end) of a text.
struct TextRange {
  size_t begin = 0;
  size_t end = 0;

  friend bool operator==(const TextRange&, const TextRange&) = default;
};

class Tokenizer {
 public:
  /// Errors: InputError naming what the file lacks or what is not supported.
  static Tokenizer from_file(const std::string& path);
  /// The text of a tokenizer.json; `name` begins every message.
  static Tokenizer from_json(std::string_view json, std::string_view name);

  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  std::vector<int32_t> encode(std::string_view text, SpecialTokens special) const;
  /// Appends to `ids`.
  void encode(std::string_view text, SpecialTokens special, std::vector<int32_t>& ids) const;

  /// Recognises added tokens, except those that touch one of the ranges (ascending, disjoint): what
  /// others wrote inside a prompt we rendered. Text without added tokens gets the same ids either
  /// way. Errors: InputError for invalid UTF-8, which cannot be repaired here because it would move
  /// the ranges.
  std::vector<int32_t> encode(std::string_view text, std::span<const TextRange> as_text) const;

  /// Takes the memory now that encoding keeps between calls, so that it is known. Thread-safe.
  void take_caches() const;

  /// Valid UTF-8; bytes that form no character become U+FFFD. Errors: InputError for an id outside
  /// the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;

  /// The bytes one token stands for (of an added token: its content). Errors: InputError for an id
  /// outside.
  std::string_view token_bytes(int32_t id) const;
  /// The token as the file spells it (byte alphabet). Errors: InputError for an id outside.
  const std::string& token_name(int32_t id) const;
  /// The id of an added token with this content, else of the token with these bytes.
  std::optional<int32_t> find(std::string_view token) const;
  /// find() or InputError naming the token.
  int32_t id_of(std::string_view token) const;
  /// Whether the id is an added token (recognised only with SpecialTokens::kRecognise).
  bool is_added(int32_t id) const;
  /// Number of ids; all of 0 to vocab_size() - 1 have a token.
  int32_t vocab_size() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Text of ids as they arrive; never hands out part of a character. All results concatenated equal
/// decode().
class DecodeStream {
 public:
  explicit DecodeStream(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}
  std::string push(int32_t id) { return bytes_.push(tokenizer_->token_bytes(id)); }
  std::string flush() { return bytes_.flush(); }

 private:
  const Tokenizer* tokenizer_;
  Utf8Stream bytes_;
};

}  // namespace hadal::text
