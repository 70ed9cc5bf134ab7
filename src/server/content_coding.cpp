#include "server/content_coding.h"

#include <algorithm>
#include <array>
#include <memory>
#include <vector>
#include <zlib.h>

#include <zstd.h>

#include "base/check.h"
#include "server/http_text.h"
#include "server/json_reader.h"

namespace hadal::server {
namespace {

constexpr size_t kPiece = 64 << 10;
// Memory of a zstd frame: clients' encoders stay far below.
constexpr int kMaxWindowLog = 27;

[[noreturn]] void fail_damaged(const std::string& coding) {
  throw RequestError(400, concat("the body is no whole ", coding, " stream"));
}
void append(std::string& out, const char* data, size_t count, size_t limit) {
  if (count > limit - out.size())
    throw RequestError(413, concat("the body has more than ", limit, " bytes once decompressed"));
  out.append(data, count);
}

std::string inflate_all(const std::string& coding, const std::string& body, size_t limit) {
  z_stream stream{};
  // 15 + 32: gzip's or zlib's frame, told apart by the first bytes.
  HADAL_CHECK(inflateInit2(&stream, 15 + 32) == Z_OK, "zlib does not start");
  const std::unique_ptr<z_stream, void (*)(z_stream*)> end(&stream,
                                                           [](z_stream* s) { inflateEnd(s); });
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(body.data()));
  stream.avail_in = static_cast<uInt>(body.size());
  std::string out;
  std::vector<char> piece(kPiece);
  int status = Z_OK;
  while (true) {
    stream.next_out = reinterpret_cast<Bytef*>(piece.data());
    stream.avail_out = static_cast<uInt>(piece.size());
    status = inflate(&stream, Z_NO_FLUSH);
    append(out, piece.data(), piece.size() - stream.avail_out, limit);
    if (status == Z_STREAM_END) {
      if (stream.avail_in == 0) return out;
      // gzip files may be several in a row.
      if (inflateReset(&stream) != Z_OK) fail_damaged(coding);
      continue;
    }
    if (status != Z_OK || (stream.avail_in == 0 && stream.avail_out != 0)) fail_damaged(coding);
  }
}

std::string zstd_all(const std::string& coding, const std::string& body, size_t limit) {
  const std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream(ZSTD_createDStream(),
                                                                        ZSTD_freeDStream);
  HADAL_CHECK(stream != nullptr, "zstd does not start");
  ZSTD_DCtx_setParameter(stream.get(), ZSTD_d_windowLogMax, kMaxWindowLog);
  ZSTD_inBuffer input{body.data(), body.size(), 0};
  std::string out;
  std::vector<char> piece(kPiece);
  while (true) {
    ZSTD_outBuffer output{piece.data(), piece.size(), 0};
    const size_t left = ZSTD_decompressStream(stream.get(), &output, &input);
    if (ZSTD_isError(left) != 0) fail_damaged(coding);
    append(out, piece.data(), output.pos, limit);
    if (input.pos < input.size || output.pos == output.size) continue;
    if (left != 0) fail_damaged(coding);
    return out;
  }
}

}  // namespace

std::string decoded_body(std::string_view codings, std::string body, size_t limit) {
  std::vector<std::string> names;
  while (!codings.empty()) {
    const size_t comma = std::min(codings.find(','), codings.size());
    std::string name = lower_case(codings.substr(0, comma));
    codings.remove_prefix(std::min(comma + 1, codings.size()));
    std::erase_if(name, [](char c) { return c == ' ' || c == '\t'; });
    if (!name.empty() && name != "identity") names.push_back(std::move(name));
  }
  if (names.size() > 4) throw RequestError(400, "the body is compressed more than four times");
  std::ranges::reverse(names);
  for (const std::string& name : names) {
    if (name == "gzip" || name == "x-gzip" || name == "deflate") {
      body = inflate_all(name, body, limit);
    } else if (name == "zstd") {
      body = zstd_all(name, body, limit);
    } else {
      throw RequestError(415, concat("content-encoding '", name.substr(0, 40),
                                     "' is not known; gzip, deflate and zstd are"));
    }
  }
  return body;
}

}  // namespace hadal::server
