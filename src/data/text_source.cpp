#include "data/text_source.h"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include <lzma.h>
#include <nlohmann/json.hpp>
#include <zstd.h>

#include "base/check.h"

namespace hadal::data {
namespace {

bool ends_with(const std::string& text, std::string_view suffix) {
  return text.size() >= suffix.size() &&
         text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

/// A file read in pieces that a decompressor takes from.
class InputFile {
 public:
  explicit InputFile(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "rb")) {
    HADAL_INPUT_CHECK(file_ != nullptr, path, ": ", std::strerror(errno));
  }
  ~InputFile() { std::fclose(file_); }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  /// Up to max_bytes bytes; 0 at the end.
  size_t read(char* out, size_t max_bytes) {
    const size_t count = std::fread(out, 1, max_bytes, file_);
    HADAL_INPUT_CHECK(count > 0 || std::ferror(file_) == 0, path_, ": reading failed at byte ",
                      position_, ": ", std::strerror(errno));
    position_ += static_cast<int64_t>(count);
    return count;
  }
  int64_t position() const { return position_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::FILE* file_;
  int64_t position_ = 0;
};

}  // namespace

struct ByteReader::Decoder {
  explicit Decoder(const std::string& path) : input(path) {}
  virtual ~Decoder() = default;
  /// Up to max_bytes decoded bytes; 0 at the end.
  virtual size_t read(char* out, size_t max_bytes) { return input.read(out, max_bytes); }

 protected:
  /// Reads on when the buffer is used up; false at the end of the file.
  bool refill() {
    if (begin < end) return true;
    begin = 0;
    end = input.read(buffer.data(), buffer.size());
    return end > 0;
  }
  [[noreturn]] void fail(const char* what) const {
    throw InputError(concat(input.path(), ": ", what, " before byte ", input.position()));
  }

 public:
  InputFile input;

 protected:
  std::array<char, size_t{1} << 16> buffer{};
  size_t begin = 0, end = 0;
};

namespace {

struct XzDecoder : ByteReader::Decoder {
  explicit XzDecoder(const std::string& path) : Decoder(path) {
    HADAL_CHECK(lzma_stream_decoder(&stream, UINT64_MAX, LZMA_CONCATENATED) == LZMA_OK,
                "xz: no decoder");
  }
  ~XzDecoder() override { lzma_end(&stream); }

  size_t read(char* out, size_t max_bytes) override {
    stream.next_out = reinterpret_cast<uint8_t*>(out);
    stream.avail_out = max_bytes;
    while (stream.avail_out > 0 && !finished) {
      const bool more = refill();
      stream.next_in = reinterpret_cast<const uint8_t*>(buffer.data() + begin);
      stream.avail_in = end - begin;
      const lzma_ret status = lzma_code(&stream, more ? LZMA_RUN : LZMA_FINISH);
      begin = end - stream.avail_in;
      if (status == LZMA_STREAM_END) {
        finished = true;
      } else if (status == LZMA_BUF_ERROR && !more) {
        fail("the xz data end too early");
      } else if (status != LZMA_OK) {
        fail("the xz data are damaged");
      }
    }
    return max_bytes - stream.avail_out;
  }

  lzma_stream stream = LZMA_STREAM_INIT;
  bool finished = false;
};

struct ZstdDecoder : ByteReader::Decoder {
  explicit ZstdDecoder(const std::string& path) : Decoder(path), stream(ZSTD_createDStream()) {
    HADAL_CHECK(stream != nullptr, "zstd: no decoder");
  }
  ~ZstdDecoder() override { ZSTD_freeDStream(stream); }

  size_t read(char* out, size_t max_bytes) override {
    ZSTD_outBuffer output{out, max_bytes, 0};
    while (output.pos < output.size) {
      if (!refill()) {
        if (expected != 0) fail("the zstd data end too early");
        break;
      }
      ZSTD_inBuffer source{buffer.data() + begin, end - begin, 0};
      expected = ZSTD_decompressStream(stream, &output, &source);
      if (ZSTD_isError(expected) != 0) fail("the zstd data are damaged");
      begin += source.pos;
    }
    return output.pos;
  }

  ZSTD_DStream* stream;
  size_t expected = 0;
};

}  // namespace

ByteReader::ByteReader(const std::string& path) {
  if (ends_with(path, ".xz")) {
    decoder_ = std::make_unique<XzDecoder>(path);
  } else if (ends_with(path, ".zst")) {
    decoder_ = std::make_unique<ZstdDecoder>(path);
  } else {
    decoder_ = std::make_unique<Decoder>(path);
  }
}

ByteReader::~ByteReader() = default;

bool ByteReader::read(std::string& out, size_t max_bytes) {
  out.resize(max_bytes);
  out.resize(decoder_->read(out.data(), max_bytes));
  return !out.empty();
}

int64_t ByteReader::file_position() const { return decoder_->input.position(); }

std::string without_compression(const std::string& path) {
  for (const std::string_view suffix : {".xz", ".zst"}) {
    if (ends_with(path, suffix)) return path.substr(0, path.size() - suffix.size());
  }
  return path;
}

void for_each_line(const std::string& path,
                   const std::function<void(const std::string& line, int64_t number)>& visit) {
  constexpr size_t kMaxLine = size_t{1} << 30;
  ByteReader reader(path);
  std::string chunk, line;
  int64_t number = 1;
  while (reader.read(chunk)) {
    size_t begin = 0;
    for (size_t newline; (newline = chunk.find('\n', begin)) != std::string::npos;
         begin = newline + 1) {
      line.append(chunk, begin, newline - begin);
      if (!line.empty()) visit(line, number);
      line.clear();
      ++number;
    }
    line.append(chunk, begin);
    HADAL_INPUT_CHECK(line.size() <= kMaxLine, path, ": line ", number, " is longer than 1 GiB");
  }
  if (!line.empty()) visit(line, number);
}

void for_each_document(const std::string& path,
                       const std::string& field,
                       const std::function<void(std::string text)>& visit) {
  if (!ends_with(without_compression(path), ".jsonl")) {
    ByteReader reader(path);
    std::string chunk, text;
    while (reader.read(chunk)) text += chunk;
    visit(std::move(text));
    return;
  }
  for_each_line(path, [&](const std::string& line, int64_t number) {
    nlohmann::json object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    HADAL_INPUT_CHECK(!object.is_discarded() && object.is_object(), path, ": line ", number,
                      " is no JSON object");
    const auto found = object.find(field);
    HADAL_INPUT_CHECK(found != object.end() && found->is_string(), path, ": line ", number,
                      ": expected a string \"", field, "\"");
    visit(std::move(found->get_ref<std::string&>()));
  });
}

}  // namespace hadal::data
