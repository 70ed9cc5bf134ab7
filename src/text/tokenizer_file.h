// What a tokenizer.json says, checked: tokens, merges, added tokens, expressions of the
// pre-tokeniser.
//
// The reader accepts the format of the official file (chat_encoding.md 6): model BPE on the byte
// alphabet, no normaliser, Split stages with behaviour Isolated and then ByteLevel without its own
// expression. Anything that would give other ids than the library that defined the format is an
// InputError, never ignored.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/bpe.h"

namespace hadal::text {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;
  bool normalized =
      false;  ///< matched in a second pass, in what the first (not normalised) pass leaves
};

struct TokenizerFile {
  std::vector<std::string>
      names;  ///< [vocab] as the file spells them (byte alphabet; added: the content)
  std::vector<std::string> bytes;          ///< [vocab] what a token stands for
  std::vector<AddedToken> added;           ///< ascending id
  std::vector<Merge> merges;               ///< in order of rank
  std::vector<std::string> patterns;       ///< Split stages in order
  std::array<int32_t, 256> byte_ids = {};  ///< id of each single byte
};

/// Reads the text of a tokenizer.json; `name` begins every message.
TokenizerFile parse_tokenizer_file(std::string_view json, std::string_view name);

/// The 256 bytes as the byte-level alphabet spells them, in UTF-8.
const std::array<std::string, 256>& byte_alphabet();

/// A whole file. Errors: InputError if it cannot be read.
std::string read_file(const std::string& path);

}  // namespace hadal::text
