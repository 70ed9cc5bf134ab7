// A source of training text as one mapped file of token ids, built once and kept.
//
// The file is a safetensors file with `tokens` [tokens] I32, `documents` [documents + 1] I64 (where
// each begins) and, for conversations, `scored` [tokens] U8. Its name holds a fingerprint of what
// it was made from (tokenizer, names and sizes of the files, kind), so sources can share a folder
// and the folder can move. A text changed without changing its size goes unnoticed by that; when
// its time says that it may have been, a warning names the file to delete. Building is parallel
// over documents; the order is that of the files.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/text_transforms.h"
#include "text/tokenizer.h"

namespace hadal::data {

enum class SourceKind : uint8_t {
  kText,          ///< documents: BOS, text, EOS; every token is a target
  kConversation,  ///< lines of encode_conversation(); what the assistant wrote is a target
};

struct SourceSpec {
  std::string name;  ///< letters, digits, `-` and `_`: it becomes part of a file name
  SourceKind kind = SourceKind::kText;
  std::vector<std::string> files;
  std::string field = "text";      ///< kText: the key of a JSON line
  TextTransforms transforms = {};  ///< kText
};

class TokenShards {
 public:
  /// Maps a file that build_token_shards made; every defect is an InputError.
  explicit TokenShards(const std::string& path);

  int64_t num_tokens() const { return static_cast<int64_t>(tokens_.size()); }
  int64_t num_documents() const { return static_cast<int64_t>(documents_.size()) - 1; }
  /// Tokens of one document.
  std::span<const int32_t> document(int64_t index) const;
  /// Marks of the same; empty: every token is a target.
  std::span<const uint8_t> scored(int64_t index) const;
  /// The text's size in bytes.
  int64_t text_bytes() const { return text_bytes_; }
  uint64_t fingerprint() const { return fingerprint_; }

 private:
  MappedFile file_;
  std::span<const int32_t> tokens_;
  std::span<const int64_t> documents_;
  std::span<const uint8_t> scored_;
  int64_t text_bytes_ = 0;
  uint64_t fingerprint_ = 0;
};

/// The path of the source's file in `folder`, which is created with everything above it; tokenises
/// when it is not there. `tokenizer_json` is the tokenizer's file content.
std::string build_token_shards(const SourceSpec& spec,
                               const text::Tokenizer& tokenizer,
                               std::string_view tokenizer_json,
                               const std::string& folder);

}  // namespace hadal::data
