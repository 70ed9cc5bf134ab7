#include "ops/cache/table_memory.h"

#include <algorithm>
#include <bit>
#include <limits>

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/check.h"
#include "base/math.h"

namespace hadal::ops {
namespace {

constexpr int64_t kAlignment = 64;

template <typename T>
void copy_as(std::span<const int64_t> values, void* out) {
  T* to = static_cast<T*>(out);
  for (size_t i = 0; i < values.size(); ++i) to[i] = static_cast<T>(values[i]);
}

void write_values(std::span<const int64_t> values, at::ScalarType type, void* out) {
  if (type == at::kLong) return copy_as<int64_t>(values, out);
  HADAL_CHECK(type == at::kInt, "table_memory: a table of ", type);
  const auto wide = std::ranges::find_if(values, [](int64_t value) {
    return value < std::numeric_limits<int32_t>::min() ||
           value > std::numeric_limits<int32_t>::max();
  });
  HADAL_CHECK(wide == values.end(), "table_memory: ", *wide, " in a table of 32-bit numbers");
  copy_as<int32_t>(values, out);
}

}  // namespace

TableMemory::Chunk TableMemory::make_chunk(int64_t bytes) const {
  Chunk chunk;
  const auto options = at::TensorOptions(at::kByte);
  chunk.host = at::zeros({bytes}, options.pinned_memory(device_.is_cuda()));
  chunk.device = device_.is_cpu() ? chunk.host : at::zeros({bytes}, options.device(device_));
  return chunk;
}

void TableMemory::begin() {
  if (uploaded_) uploaded_->synchronize();
  if (chunks_.size() > 1) settle();
}

void TableMemory::settle() {
  int64_t bytes = 0;
  for (auto& [name, table] : tables_) {
    table = {.chunk = 0, .offset = bytes, .room = table.room, .view = {}};
    bytes += table.room;
  }
  chunks_.assign(1, make_chunk(bytes));
  chunks_[0].used = bytes;
  ++moves_;
}

at::Tensor TableMemory::place(const Name& name,
                              std::span<const int64_t> values,
                              at::ScalarType type) {
  const auto size = static_cast<int64_t>(c10::elementSize(type)), count = std::ssize(values);
  Table& table = tables_[name];
  if (table.room < count * size || table.room == 0) {
    const auto most = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(count, 8)));
    table = {.chunk = chunks_.size(),
             .offset = 0,
             .room = align_up(static_cast<int64_t>(most) * size, kAlignment),
             .view = {}};
    chunks_.push_back(make_chunk(table.room));
    chunks_.back().used = table.room;
    ++moves_;
  }
  Chunk& chunk = chunks_[table.chunk];
  write_values(values, type, chunk.host.mutable_data_ptr<uint8_t>() + table.offset);
  const bool same =
      table.view.defined() && table.view.numel() == count && table.view.scalar_type() == type;
  if (!same) table.view = chunk.device.narrow(0, table.offset, count * size).view(type);
  return table.view;
}

void TableMemory::upload() {
  if (device_.is_cpu()) return;
  for (const Chunk& chunk : chunks_)
    chunk.device.narrow(0, 0, chunk.used)
        .copy_(chunk.host.narrow(0, 0, chunk.used), /*non_blocking=*/true);
  if (!uploaded_) uploaded_.emplace(device_.type());
  uploaded_->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
}

at::Tensor TableMemory::make(std::span<const int64_t> values,
                             at::ScalarType type,
                             at::Device device) {
  const at::Tensor host = at::empty({std::ssize(values)}, type);
  write_values(values, type, host.mutable_data_ptr());
  return host.to(device);
}

int64_t TableMemory::bytes() const {
  int64_t bytes = 0;
  for (const Chunk& chunk : chunks_) bytes += chunk.used;
  return bytes;
}

}  // namespace hadal::ops
