#include "engine/row_memory.h"

#include <cstring>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/cache/lazy_memory.h"

namespace hadal::engine {
namespace {

at::Tensor upload(std::span<const int64_t> numbers, at::Device device) {
  return at::tensor(at::ArrayRef<int64_t>(numbers.data(), numbers.size()), at::kLong).to(device);
}

}  // namespace

RowMemory::RowMemory(int64_t count,
                     int64_t width,
                     const ops::RowFormat& format,
                     at::ScalarType dense,
                     at::Device device,
                     bool lazy)
    : format_(format) {
  const at::ScalarType type = format.packed() ? at::kByte : dense;
  const int64_t columns = format.packed() ? format.bytes() : width;
  rows_ = device.is_cpu() && lazy
              ? ops::lazy_zeros(count, columns, type)
              : at::zeros({count, columns}, at::TensorOptions(device).dtype(type));
}

std::byte* RowMemory::read(std::span<const int64_t> numbers, std::byte* out) const {
  const auto size = static_cast<size_t>(row_bytes());
  if (!rows_.is_cpu()) {
    const at::Tensor found = rows_.index_select(0, upload(numbers, rows_.device())).cpu();
    std::memcpy(out, found.const_data_ptr(), found.nbytes());
    return out + found.nbytes();
  }
  for (const int64_t row : numbers) {
    std::memcpy(out, bytes(row), size);
    out += size;
  }
  return out;
}

const std::byte* RowMemory::write(std::span<const int64_t> numbers, const std::byte* in) {
  const auto size = static_cast<size_t>(row_bytes());
  if (!rows_.is_cpu()) {
    const at::Tensor given =
        at::empty({static_cast<int64_t>(numbers.size()), rows_.size(1)}, rows_.scalar_type());
    std::memcpy(given.mutable_data_ptr(), in, given.nbytes());
    rows_.index_copy_(0, upload(numbers, rows_.device()), given.to(rows_.device()));
    return in + given.nbytes();
  }
  for (const int64_t row : numbers) {
    std::memcpy(bytes(row), in, size);
    in += size;
  }
  return in;
}

void RowMemory::store(const at::Tensor& source, const at::Tensor& from, const at::Tensor& to) {
  const int64_t count = from.defined() ? from.numel() : source.size(0);
  const bool packs = format_.packed() && source.scalar_type() != at::kByte;
  HADAL_CHECK(count == to.numel() && source.device() == rows_.device(), "row_memory: ", count,
              " rows on ", source.device().str(), " for ", to.numel(), " on ",
              rows_.device().str());
  if (!rows_.is_cpu()) {
    const at::Tensor found = from.defined() ? source.index_select(0, from) : source;
    rows_.index_copy_(0, to,
                      packs ? ops::pack_rows(found, format_) : found.to(rows_.scalar_type()));
    return;
  }
  const at::Tensor dense =
      packs ? source.contiguous() : source.to(rows_.scalar_type()).contiguous();
  const int64_t stride = dense.size(1) * dense.element_size();
  const auto* data = static_cast<const std::byte*>(dense.const_data_ptr());
  HADAL_CHECK(packs ? dense.scalar_type() == at::kBFloat16 : stride == row_bytes(),
              "row_memory: rows of ", dense.size(1), " ", dense.scalar_type(), " for rows of ",
              row_bytes(), " bytes");
  const int64_t* sources = from.defined() ? from.const_data_ptr<int64_t>() : nullptr;
  const int64_t* targets = to.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = sources != nullptr ? sources[i] : i;
    const std::byte* row = data + number * stride;
    if (!packs) {
      std::memcpy(bytes(targets[i]), row, static_cast<size_t>(stride));
      continue;
    }
    HADAL_CHECK(ops::pack_row(reinterpret_cast<const uint16_t*>(row), format_,
                              reinterpret_cast<uint8_t*>(bytes(targets[i]))),
                "row_memory: row ", number, " did not go through its round trip");
  }
}

void RowMemory::copy(int64_t from, int64_t to, int64_t count) {
  if (from == to) return;
  rows_.narrow(0, to, count).copy_(rows_.narrow(0, from, count));
}

}  // namespace hadal::engine
