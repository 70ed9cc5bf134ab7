// Documents out of text files: plain text, JSON lines, either compressed by xz or zstd.
//
// The kind is told by the name: `.jsonl` holds one JSON object a line, anything else is one
// document; a further `.xz` or `.zst` is decompressed on the way. Files are streamed, so memory is
// bounded by the largest document.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace hadal::data {

/// The bytes of a file, decompressed. Every failure is an InputError that names the file and the
/// byte offset in it.
class ByteReader {
 public:
  explicit ByteReader(const std::string& path);
  ~ByteReader();
  ByteReader(const ByteReader&) = delete;
  ByteReader& operator=(const ByteReader&) = delete;

  /// Replaces `out` by the next up to `max_bytes` bytes; false at the end of the file.
  bool read(std::string& out, size_t max_bytes = size_t{1} << 20);
  /// Bytes of the file itself consumed so far, for progress.
  int64_t file_position() const;

  struct Decoder;

 private:
  std::unique_ptr<Decoder> decoder_;
};

/// The name without a compression suffix: "a.jsonl.xz" gives "a.jsonl".
std::string without_compression(const std::string& path);

/// Calls visit(line, number) for each non-empty line of a file, without its newline; numbers count
/// from 1. A line longer than 1 GiB is an InputError.
void for_each_line(const std::string& path,
                   const std::function<void(const std::string& line, int64_t number)>& visit);

/// Calls visit(text) for each document of a file, in order: the string `field` of every JSON line
/// of a .jsonl file, else the whole file. InputErrors name file, line and field.
void for_each_document(const std::string& path,
                       const std::string& field,
                       const std::function<void(std::string text)>& visit);

}  // namespace hadal::data
