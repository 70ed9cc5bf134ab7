#include "train/state_manifest.h"

#include <algorithm>
#include <map>
#include <span>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/parallel.h"
#include "base/tensor_file.h"
#include "checkpoint/checksum.h"
#include "checkpoint/safetensors.h"

namespace hadal::train {
namespace {

using checkpoint::checksum;
using checkpoint::checksum_text;

std::string content_checksum(const std::string& content) {
  return checksum_text(checksum(std::as_bytes(std::span(content))));
}

/// The bytes before the first tensor.
std::string header_checksum(const std::string& path) {
  const MappedFile file(path);
  const TensorHeader header = parse_tensor_header(file.bytes(), path);
  int64_t begin = std::ssize(file.bytes());
  for (const TensorInfo& info : header.tensors) begin = std::min(begin, info.begin);
  return checksum_text(checksum(file.bytes().first(static_cast<size_t>(begin))));
}

void check_equal(const std::string& where, const std::string& expected, const std::string& found) {
  HADAL_INPUT_CHECK(found == expected, where, ": expected checksum ", expected, ", found ", found);
}

struct Expected {
  std::string name, checksum;
  int64_t unit = 0;
};

std::vector<Expected> expected_tensors(const JsonObject& manifest) {
  std::vector<Expected> result;
  for (const JsonObject& item : manifest.objects("tensors"))
    result.push_back(
        {item.string("name"), item.string("checksum"), item.integer("unit", 1, INT64_MAX)});
  return result;
}

void verify_tensors(const checkpoint::TensorReader& reader, const std::vector<Expected>& tensors) {
  HADAL_INPUT_CHECK(reader.names().size() == tensors.size(), reader.path(), ": expected ",
                    tensors.size(), " tensors, found ", reader.names().size());
  struct Block {
    const std::byte* data;
    size_t bytes;
  };
  std::vector<Block> blocks;
  std::vector<size_t> ends;
  for (const Expected& each : tensors) {
    const at::Tensor stored = reader.tensor(each.name);
    const auto size = static_cast<int64_t>(stored.element_size());
    const auto* data = static_cast<const std::byte*>(stored.const_data_ptr());
    for (const auto& [begin, end] : checked_blocks(stored.numel(), each.unit))
      blocks.push_back({data + begin * size, static_cast<size_t>((end - begin) * size)});
    ends.push_back(blocks.size());
  }
  std::vector<uint64_t> sums(blocks.size());
  parallel_for(std::ssize(blocks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Block& block = blocks[static_cast<size_t>(b)];
      sums[static_cast<size_t>(b)] = checksum({block.data, block.bytes});
    }
  });
  size_t begin = 0;
  for (size_t t = 0; t < tensors.size(); begin = ends[t++]) {
    const uint64_t found = joined_checksum(std::span(sums).subspan(begin, ends[t] - begin));
    check_equal(concat(reader.path(), ": tensor ", tensors[t].name), tensors[t].checksum,
                checksum_text(found));
  }
}

}  // namespace

void write_manifest(const std::string& folder,
                    int64_t step,
                    const std::vector<NamedState>& state,
                    const std::vector<int64_t>& checksums) {
  const std::string tensors = concat(folder, "/", kStateFile);
  JsonWriter json;
  json.begin_object().field("format", kStateFormat).field("step", step);
  const std::string progress = content_checksum(read_file(concat(folder, "/", kProgressFile)));
  json.field("progress", std::string_view(progress));
  const std::string header = header_checksum(tensors);
  json.field("header", std::string_view(header)).key("tensors").begin_array();
  std::vector<uint64_t> blocks(checksums.begin(), checksums.end());
  size_t begin = 0;
  for (const NamedState& each : state) {
    const size_t count = checked_blocks(each.tensor.whole.numel(), each.unit).size();
    HADAL_CHECK(begin + count <= blocks.size(), "write_manifest: too few checksums");
    const std::string text =
        checksum_text(joined_checksum(std::span(blocks).subspan(begin, count)));
    json.begin_object()
        .field("name", std::string_view(each.tensor.name))
        .field("unit", each.unit)
        .field("checksum", std::string_view(text))
        .end_object();
    begin += count;
  }
  HADAL_CHECK(begin == blocks.size(), "write_manifest: too many checksums");
  write_file_atomic(concat(folder, "/", kManifestFile), json.end_array().end_object().str());
}

bool verify_state(const std::string& folder) {
  const std::string progress = concat(folder, "/", kProgressFile);
  const std::string content = read_file(progress);
  const JsonObject json = JsonObject::parse(content, progress);
  const std::string format = json.string("format");
  HADAL_INPUT_CHECK(format == kStateFormat || format == kOldStateFormat, json.where("format"),
                    ": expected \"", kStateFormat, "\", found \"", format, "\"");
  const std::string file = concat(folder, "/", kStateFile);
  const auto reader = checkpoint::TensorReader::open(file);
  if (format == kOldStateFormat) return false;
  const JsonObject manifest = JsonObject::load(concat(folder, "/", kManifestFile));
  HADAL_INPUT_CHECK(manifest.string("format") == kStateFormat, manifest.where("format"),
                    ": expected \"", kStateFormat, "\", found \"", manifest.string("format"), "\"");
  check_equal(progress, manifest.string("progress"), content_checksum(content));
  check_equal(concat(file, ": header"), manifest.string("header"), header_checksum(file));
  verify_tensors(reader, expected_tensors(manifest));
  return true;
}

}  // namespace hadal::train
