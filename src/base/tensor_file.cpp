#include "base/tensor_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <tuple>

#include <fmt/format.h>

#include "base/check.h"
#include "base/json.h"
#include "base/math.h"

namespace hadal {
namespace {

static_assert(std::endian::native == std::endian::little, "tensor files are little-endian");

constexpr int64_t kLengthBytes = 8;
// The largest official shard header has about 300 KB; the format's own limit is this.
constexpr int64_t kMaxHeaderBytes = 100'000'000;
constexpr int64_t kDataAlignment = 64;

struct DtypeEntry {
  Dtype dtype;
  std::string_view name;
  int64_t bytes;
};

constexpr std::array<DtypeEntry, 11> kDtypes{{{Dtype::kF64, "F64", 8},
                                              {Dtype::kF32, "F32", 4},
                                              {Dtype::kBf16, "BF16", 2},
                                              {Dtype::kF16, "F16", 2},
                                              {Dtype::kF8E4M3, "F8_E4M3", 1},
                                              {Dtype::kF8E8M0, "F8_E8M0", 1},
                                              {Dtype::kI64, "I64", 8},
                                              {Dtype::kI32, "I32", 4},
                                              {Dtype::kI8, "I8", 1},
                                              {Dtype::kU8, "U8", 1},
                                              {Dtype::kBool, "BOOL", 1}}};

const DtypeEntry& entry_of(Dtype dtype) {
  const auto it = std::find_if(kDtypes.begin(), kDtypes.end(),
                               [&](const DtypeEntry& e) { return e.dtype == dtype; });
  HADAL_CHECK(it != kDtypes.end(), "dtype_name: no dtype ", static_cast<int>(dtype));
  return *it;
}

Dtype parse_dtype(const std::string& name, const std::string& where) {
  const auto it = std::find_if(kDtypes.begin(), kDtypes.end(),
                               [&](const DtypeEntry& e) { return e.name == name; });
  HADAL_INPUT_CHECK(it != kDtypes.end(), where, ": unknown dtype ", json_quote(name));
  return it->dtype;
}

/// Bytes of a shape, or nothing when the product does not fit.
std::optional<int64_t> byte_count(const std::vector<int64_t>& shape, Dtype dtype) {
  int64_t total = dtype_bytes(dtype);
  for (const int64_t size : shape)
    if (__builtin_mul_overflow(total, size, &total)) return std::nullopt;
  return total;
}

TensorInfo parse_entry(const JsonObject& root,
                       const std::string& name,
                       int64_t data_begin,
                       int64_t data_bytes) {
  const std::string where = root.where(name);
  const JsonObject entry = root.object(name);
  TensorInfo info;
  info.name = name;
  info.dtype = parse_dtype(entry.string("dtype"), where);
  info.shape = entry.integers("shape", 0, std::numeric_limits<int64_t>::max());
  const auto offsets = entry.integers("data_offsets", 0, std::numeric_limits<int64_t>::max());
  HADAL_INPUT_CHECK(offsets.size() == 2, where, ": data_offsets has ", offsets.size(),
                    " entries, expected 2");
  HADAL_INPUT_CHECK(offsets[0] <= offsets[1] && offsets[1] <= data_bytes, where, ": data_offsets [",
                    offsets[0], ", ", offsets[1], "] lie outside the ", data_bytes,
                    " bytes of data (truncated file?)");
  const auto expected = byte_count(info.shape, info.dtype);
  HADAL_INPUT_CHECK(expected.has_value(), where, ": shape ", shape_text(info.shape),
                    " has more elements than can be counted");
  HADAL_INPUT_CHECK(*expected == offsets[1] - offsets[0], where, ": shape ", shape_text(info.shape),
                    " of ", dtype_name(info.dtype), " takes ", *expected,
                    " bytes, data_offsets hold ", offsets[1] - offsets[0]);
  entry.expect_all_read();
  info.begin = data_begin + offsets[0];
  info.end = data_begin + offsets[1];
  return info;
}

/// Tensors sorted by offset must tile the data exactly.
void check_tiling(const std::vector<TensorInfo>& tensors,
                  int64_t begin,
                  int64_t end,
                  const std::string& origin) {
  for (const TensorInfo& tensor : tensors) {
    HADAL_INPUT_CHECK(tensor.begin >= begin, origin, ": ", tensor.name,
                      " overlaps the tensor before it by ", begin - tensor.begin, " bytes");
    HADAL_INPUT_CHECK(tensor.begin == begin, origin, ": ", tensor.begin - begin,
                      " bytes before tensor ", tensor.name, " belong to no tensor");
    begin = tensor.end;
  }
  HADAL_INPUT_CHECK(begin == end, origin, ": ", end - begin,
                    " bytes after the last tensor belong to no tensor");
}

}  // namespace

std::string_view dtype_name(Dtype dtype) { return entry_of(dtype).name; }
int64_t dtype_bytes(Dtype dtype) { return entry_of(dtype).bytes; }

std::string shape_text(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

TensorHeader parse_tensor_header(std::span<const std::byte> file, const std::string& origin) {
  const auto file_bytes = static_cast<int64_t>(file.size());
  HADAL_INPUT_CHECK(file_bytes >= kLengthBytes, origin, ": truncated: ", file_bytes,
                    " bytes, a safetensors file has at least ", kLengthBytes);
  uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof(length));
  HADAL_INPUT_CHECK(length <= static_cast<uint64_t>(kMaxHeaderBytes), origin, ": header length ",
                    length, " is absurd (at most ", kMaxHeaderBytes,
                    "): not a safetensors file, or damaged");
  const auto header_bytes = static_cast<int64_t>(length);
  HADAL_INPUT_CHECK(header_bytes <= file_bytes - kLengthBytes, origin,
                    ": truncated: the header has ", header_bytes, " bytes, the file ", file_bytes);
  const int64_t data_begin = kLengthBytes + header_bytes;
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes,
                              static_cast<size_t>(header_bytes));
  const JsonObject root = JsonObject::parse(text, origin);

  TensorHeader result;
  for (const std::string& key : root.keys()) {
    if (key == "__metadata__") {
      const JsonObject metadata = root.object(key);
      for (const std::string& name : metadata.keys()) result.metadata[name] = metadata.string(name);
    } else {
      HADAL_INPUT_CHECK(!key.empty(), origin, ": a tensor has an empty name");
      result.tensors.push_back(parse_entry(root, key, data_begin, file_bytes - data_begin));
    }
  }
  std::sort(result.tensors.begin(), result.tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) {
              return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
            });
  check_tiling(result.tensors, data_begin, file_bytes, origin);
  return result;
}

std::string make_tensor_header(std::vector<TensorInfo>& tensors,
                               const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata)
      text +=
          fmt::format("{}{}:{}", text.back() == '{' ? "" : ",", json_quote(key), json_quote(value));
    text += "}";
  }
  std::set<std::string_view> names;
  int64_t offset = 0;
  for (TensorInfo& tensor : tensors) {
    HADAL_CHECK(
        !tensor.name.empty() && tensor.name != "__metadata__" && names.insert(tensor.name).second,
        "make_tensor_header: name \"", tensor.name, "\" is empty, reserved or used twice");
    HADAL_CHECK(
        std::all_of(tensor.shape.begin(), tensor.shape.end(), [](int64_t n) { return n >= 0; }),
        "make_tensor_header: ", tensor.name, " has shape ", shape_text(tensor.shape));
    const auto bytes = byte_count(tensor.shape, tensor.dtype);
    HADAL_CHECK(bytes.has_value(), "make_tensor_header: ", tensor.name, " is too large");
    HADAL_CHECK(offset % dtype_bytes(tensor.dtype) == 0, "make_tensor_header: ", tensor.name,
                " would be misaligned at byte ", offset, " of the data");
    tensor.begin = offset;
    tensor.end = offset += *bytes;
    text +=
        fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                    text.size() == 1 ? "" : ",", json_quote(tensor.name), dtype_name(tensor.dtype),
                    fmt::join(tensor.shape, ","), tensor.begin, tensor.end);
  }
  text += "}";
  const int64_t data_begin =
      align_up(kLengthBytes + static_cast<int64_t>(text.size()), kDataAlignment);
  text.resize(static_cast<size_t>(data_begin - kLengthBytes), ' ');
  for (TensorInfo& tensor : tensors) {
    tensor.begin += data_begin;
    tensor.end += data_begin;
  }
  const uint64_t length = text.size();
  std::string result(sizeof(length), '\0');
  std::memcpy(result.data(), &length, sizeof(length));
  return result + text;
}

}  // namespace hadal
