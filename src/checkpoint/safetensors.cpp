#include "checkpoint/safetensors.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <set>
#include <span>
#include <utility>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/join.h"
#include "base/json.h"
#include "base/placed_file.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr size_t kListed = 20;  // names in one message

std::string shard_name(size_t shard, size_t count) {
  char name[64];
  std::snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", shard + 1, count);
  return name;
}

Dtype stored_dtype(const NamedTensor& item) {
  const at::ScalarType type = item.tensor.scalar_type();
  HADAL_CHECK(!item.e8m0 || type == at::kByte, "write_safetensors: ", item.name,
              " is marked E8M0 but not of bytes");
  switch (type) {
    case at::kDouble:
      return Dtype::kF64;
    case at::kFloat:
      return Dtype::kF32;
    case at::kBFloat16:
      return Dtype::kBf16;
    case at::kHalf:
      return Dtype::kF16;
    case at::kFloat8_e4m3fn:
      return Dtype::kF8E4M3;
    case at::kFloat8_e8m0fnu:
      return Dtype::kF8E8M0;
    case at::kLong:
      return Dtype::kI64;
    case at::kInt:
      return Dtype::kI32;
    case at::kChar:
      return Dtype::kI8;
    case at::kByte:
      return item.e8m0 ? Dtype::kF8E8M0 : Dtype::kU8;
    case at::kBool:
      return Dtype::kBool;
    default:
      throw Error(concat("write_safetensors: ", item.name, " has type ", c10::toString(type),
                         ", which has no name in the format"));
  }
}

}  // namespace

at::ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
      return at::kDouble;
    case Dtype::kF32:
      return at::kFloat;
    case Dtype::kBf16:
      return at::kBFloat16;
    case Dtype::kF16:
      return at::kHalf;
    case Dtype::kF8E4M3:
      return at::kFloat8_e4m3fn;
    case Dtype::kF8E8M0:
    case Dtype::kU8:
      return at::kByte;
    case Dtype::kI64:
      return at::kLong;
    case Dtype::kI32:
      return at::kInt;
    case Dtype::kI8:
      return at::kChar;
    case Dtype::kBool:
      return at::kBool;
  }
  throw Error(concat("scalar_type: no dtype ", static_cast<int>(dtype)));
}

TensorReader TensorReader::open(const std::string& path) {
  TensorReader reader;
  reader.path_ = path;
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) {
    reader.add_file(path);
    return reader;
  }
  if (fs::exists(path + "/" + kIndexFile, ignored)) {
    reader.add_index(path);
  } else {
    HADAL_INPUT_CHECK(fs::exists(path + "/" + kSingleFile, ignored), path, ": holds neither ",
                      kSingleFile, " nor ", kIndexFile);
    reader.add_file(path + "/" + kSingleFile);
  }
  return reader;
}

void TensorReader::add_file(const std::string& path) {
  auto file = std::make_shared<const MappedFile>(path);
  TensorHeader header = parse_tensor_header(file->bytes(), path);
  for (TensorInfo& info : header.tensors) {
    const auto [it, is_new] = tensors_.try_emplace(info.name, Entry{info, files_.size()});
    HADAL_INPUT_CHECK(is_new, path, ": tensor ", info.name, " is also in ",
                      files_[it->second.file]->path());
  }
  if (files_.empty()) metadata_ = std::move(header.metadata);
  files_.push_back(std::move(file));
}

void TensorReader::add_index(const std::string& folder) {
  const std::string index_path = folder + "/" + kIndexFile;
  const JsonObject index = JsonObject::load(index_path);
  const JsonObject map = index.object("weight_map");
  std::map<std::string, std::string> shard_of;
  std::set<std::string> shards;
  for (const std::string& name : map.keys()) {
    const std::string shard = map.string(name);
    HADAL_INPUT_CHECK(!shard.empty() && shard.find('/') == std::string::npos && shard != "..",
                      map.where(name), ": ", json_quote(shard), " is no file name");
    shard_of[name] = shard;
    shards.insert(shard);
  }
  for (const std::string& shard : shards) add_file(folder + "/" + shard);

  std::vector<std::string> wrong;
  for (const auto& [name, shard] : shard_of) {
    const auto it = tensors_.find(name);
    if (it == tensors_.end() ||
        fs::path(files_[it->second.file]->path()).filename().string() != shard)
      wrong.push_back(name + " (not in " + shard + ")");
  }
  for (const auto& [name, entry] : tensors_)
    if (!shard_of.contains(name)) wrong.push_back(name + " (not in the index)");
  const size_t count = wrong.size();
  wrong.resize(std::min(count, kListed));
  HADAL_INPUT_CHECK(count == 0, index_path, ": index and shards disagree on ", count,
                    " tensors: ", join(wrong), count > kListed ? ", ..." : "");
}

std::vector<std::string> TensorReader::names() const {
  std::vector<std::string> result;
  for (const auto& [name, entry] : tensors_) result.push_back(name);
  return result;
}

std::vector<std::string> TensorReader::files() const {
  std::vector<std::string> result;
  for (const auto& file : files_) result.push_back(file->path());
  return result;
}

const TensorInfo& TensorReader::info(const std::string& name) const {
  const auto it = tensors_.find(name);
  HADAL_INPUT_CHECK(it != tensors_.end(), path_, ": has no tensor ", name);
  return it->second.info;
}

at::Tensor TensorReader::tensor(const std::string& name) const {
  const TensorInfo& stored = info(name);
  const auto options = at::TensorOptions().dtype(scalar_type(stored.dtype));
  if (stored.num_bytes() == 0) return at::empty(stored.shape, options);
  std::shared_ptr<const MappedFile> file = files_[tensors_.at(name).file];
  auto* data = const_cast<std::byte*>(file->bytes().data() + stored.begin);
  return at::from_blob(
      data, stored.shape, [file](void*) {}, options);
}

void TensorReader::read(const std::byte* from, std::span<std::byte> to) const {
  for (const auto& file : files_) {
    const std::span<const std::byte> bytes = file->bytes();
    if (std::less<>()(from, bytes.data()) || !std::less<>()(from, bytes.data() + bytes.size()))
      continue;
    return file->read(static_cast<size_t>(from - bytes.data()), to);
  }
  throw Error(concat(path_, ": read of an address outside its files"));
}

namespace {

/// A file's header and where each tensor lies.
struct Layout {
  std::string header;
  std::vector<TensorInfo> infos;  ///< in the order of the file
  std::vector<const NamedTensor*> items;

  Layout(const std::vector<NamedTensor>& tensors, const Metadata& metadata) {
    std::vector<std::pair<TensorInfo, const NamedTensor*>> order;
    for (const NamedTensor& item : tensors)
      order.emplace_back(TensorInfo{item.name, stored_dtype(item), item.tensor.sizes().vec(), 0, 0},
                         &item);
    // Largest elements first keeps every tensor aligned without padding.
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return dtype_bytes(a.first.dtype) > dtype_bytes(b.first.dtype);
    });
    for (const auto& [info, item] : order) {
      infos.push_back(info);
      items.push_back(item);
    }
    header = make_tensor_header(infos, metadata);
  }
};

std::span<const std::byte> bytes_of(const at::Tensor& dense) {
  return {static_cast<const std::byte*>(dense.const_data_ptr()), dense.nbytes()};
}

}  // namespace

void write_safetensors(const std::string& path,
                       const std::vector<NamedTensor>& tensors,
                       const Metadata& metadata) {
  const Layout layout(tensors, metadata);
  AtomicFile file(path);
  file.write(layout.header);
  for (const NamedTensor* item : layout.items)
    file.write(bytes_of(item->tensor.detach().to(at::kCPU).contiguous()));
  file.commit();
}

void create_safetensors(const std::string& path,
                        const std::vector<NamedTensor>& tensors,
                        const Metadata& metadata) {
  const Layout layout(tensors, metadata);
  const int64_t end = layout.infos.empty() ? std::ssize(layout.header) : layout.infos.back().end;
  PlacedFile file(path, PlacedFile::kCreate);
  file.resize(end);
  file.write(0, std::as_bytes(std::span(layout.header)));
  file.sync();
}

void fill_safetensors(const std::string& path,
                      const std::vector<NamedTensor>& tensors,
                      const Metadata& metadata) {
  const Layout layout(tensors, metadata);
  PlacedFile file(path, PlacedFile::kOpen);
  for (size_t i = 0; i < layout.items.size(); ++i) {
    const at::Tensor& tensor = layout.items[i]->tensor;
    const auto write = [&](int64_t element, const at::Tensor& values) {
      HADAL_CHECK(values.scalar_type() == tensor.scalar_type() &&
                      element + values.numel() <= tensor.numel(),
                  path, ": ", layout.infos[i].name, " has no elements ", element, " to ",
                  element + values.numel(), " of ", values.scalar_type());
      file.write(layout.infos[i].begin + element * static_cast<int64_t>(tensor.element_size()),
                 bytes_of(values.detach().to(at::kCPU).contiguous()));
    };
    for (const TensorPart& part : layout.items[i]->parts) write(part.begin, part.values);
    if (!tensor.is_meta()) write(0, tensor);
  }
  file.sync();
}

ShardWriter::ShardWriter(std::string folder, int64_t max_shard_bytes)
    : folder_(std::move(folder)), max_shard_bytes_(max_shard_bytes) {
  HADAL_INPUT_CHECK(max_shard_bytes_ > 0, "shard size must be positive, found ", max_shard_bytes_);
}

void ShardWriter::add(NamedTensor tensor) {
  const auto bytes = static_cast<int64_t>(tensor.tensor.nbytes());
  if (!pending_.empty() && pending_bytes_ + bytes > max_shard_bytes_) flush();
  pending_.push_back(std::move(tensor));
  pending_bytes_ += bytes;
  total_bytes_ += bytes;
}

void ShardWriter::flush() {
  // The number of shards is not known yet: 0 stands for it until finish().
  write_safetensors(folder_ + "/" + shard_name(shards_.size(), 0), pending_);
  auto& names = shards_.emplace_back();
  for (const NamedTensor& item : pending_) names.push_back(item.name);
  pending_.clear();
  pending_bytes_ = 0;
}

void ShardWriter::finish() {
  if (!pending_.empty() || shards_.empty()) flush();
  if (shards_.size() == 1) {
    fs::rename(folder_ + "/" + shard_name(0, 0), folder_ + "/" + kSingleFile);
    sync_directory(folder_);
    return;
  }
  JsonWriter index;
  index.begin_object().key("metadata").begin_object().field("total_size", total_bytes_);
  index.end_object().key("weight_map").begin_object();
  std::map<std::string, std::string> shard_of;
  for (size_t shard = 0; shard < shards_.size(); ++shard) {
    const std::string name = shard_name(shard, shards_.size());
    fs::rename(folder_ + "/" + shard_name(shard, 0), folder_ + "/" + name);
    for (const std::string& tensor : shards_[shard]) shard_of[tensor] = name;
  }
  for (const auto& [tensor, shard] : shard_of) index.field(tensor, std::string_view(shard));
  write_file_atomic(folder_ + "/" + kIndexFile, index.end_object().end_object().str());
}

}  // namespace hadal::checkpoint
