// Tensors in safetensors files: reading without copies, writing atomically.
//
// A checkpoint is one file, or a folder with model.safetensors, or a folder with
// model.safetensors.index.json and the shards it names. Opening maps the files and checks every
// header (base/tensor_file.h) and, with an index, that the index and the shards name the same
// tensors. Data are read when a page is first touched.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/file.h"
#include "base/tensor_file.h"

namespace hadal::checkpoint {

/// ATen's type of a stored one. F8_E8M0 becomes at::kByte: scales are exponent bytes to us, and
/// ATen has hardly any arithmetic for its own e8m0 type. F8_E4M3 becomes at::kFloat8_e4m3fn.
at::ScalarType scalar_type(Dtype dtype);

class TensorReader {
 public:
  /// A file, or a folder as above. Defects are InputErrors naming file and tensor.
  static TensorReader open(const std::string& path);

  const std::string& path() const { return path_; }
  /// In alphabetical order.
  std::vector<std::string> names() const;
  bool has(const std::string& name) const { return tensors_.contains(name); }
  /// An InputError naming the checkpoint when there is no such tensor.
  const TensorInfo& info(const std::string& name) const;
  /// A view of the mapped file that keeps it alive: never write to it. An empty tensor owns
  /// nothing.
  at::Tensor tensor(const std::string& name) const;
  /// Bytes of a tensor from an address inside it on, read from the file (MappedFile::read); from
  /// any thread.
  void read(const std::byte* from, std::span<std::byte> to) const;
  /// The metadata of the single file, or of the first shard.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// The files, in the order of their names.
  std::vector<std::string> files() const;

 private:
  struct Entry {
    TensorInfo info;
    size_t file;
  };
  void add_file(const std::string& path);
  void add_index(const std::string& folder);

  std::string path_;
  std::vector<std::shared_ptr<const MappedFile>>
      files_;  ///< shared with the tensors made from them
  std::map<std::string, Entry> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// Elements [begin, begin + numel) of a tensor, flat.
struct TensorPart {
  int64_t begin;
  at::Tensor values;
};

/// A tensor to write. kByte is stored as U8 unless `e8m0` says that the bytes are E8M0 scales.
struct NamedTensor {
  std::string name;
  at::Tensor tensor;  ///< any device and strides; made contiguous on the CPU one at a time
  bool e8m0 = false;  ///< kByte only: store as F8_E8M0
  /// Of a meta tensor, what of it fill_safetensors writes here.
  std::vector<TensorPart> parts = {};
};

using Metadata = std::map<std::string, std::string>;

/// Writes one file, atomically. The order in the file is by element size, then as given.
void write_safetensors(const std::string& path,
                       const std::vector<NamedTensor>& tensors,
                       const Metadata& metadata = {{"format", "pt"}});
/// The same file written by several processes: each calls fill_safetensors with all tensors, what
/// others write as meta tensors (shapes without memory), parts of these given as such, after one
/// has called create_safetensors, which writes everything but data. Not atomic: for a folder that
/// is (AtomicDirectory).
void create_safetensors(const std::string& path,
                        const std::vector<NamedTensor>& tensors,
                        const Metadata& metadata = {{"format", "pt"}});
void fill_safetensors(const std::string& path,
                      const std::vector<NamedTensor>& tensors,
                      const Metadata& metadata = {{"format", "pt"}});
/// Writes a checkpoint of several shards into a folder. A shard goes to disk as soon as the next
/// tensor would make it larger than `max_shard_bytes`; finish() gives the shards their official
/// names and writes the index, or names a single shard model.safetensors. The folder as a whole is
/// not atomic: use AtomicDirectory around it.
class ShardWriter {
 public:
  ShardWriter(std::string folder, int64_t max_shard_bytes);
  void add(NamedTensor tensor);
  void finish();

 private:
  void flush();

  std::string folder_;
  int64_t max_shard_bytes_;
  std::vector<NamedTensor> pending_;
  int64_t pending_bytes_ = 0;
  int64_t total_bytes_ = 0;
  std::vector<std::vector<std::string>> shards_;  ///< names of the tensors in each
};

}  // namespace hadal::checkpoint
