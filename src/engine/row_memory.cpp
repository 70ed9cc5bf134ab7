#include "engine/row_memory.h"

#include <algorithm>
#include <cstring>

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/check.h"
#include "ops/cache/lazy_memory.h"

namespace hadal::engine {

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

namespace {

/// Calls f(first, count, bytes before) for the runs of consecutive numbers.
template <typename F>
void each_run(std::span<const int64_t> numbers, int64_t row_bytes, F f) {
  for (size_t first = 0; first < numbers.size();) {
    size_t end = first + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    f(numbers[first], static_cast<int64_t>(end - first), static_cast<int64_t>(first) * row_bytes);
    first = end;
  }
}

/// Host memory as rows of the type of `like`.
at::Tensor host_rows(const std::byte* bytes, int64_t count, const at::Tensor& like) {
  return at::from_blob(const_cast<std::byte*>(bytes), {count, like.size(1)}, like.scalar_type());
}

}  // namespace

std::byte* RowMemory::read(std::span<const int64_t> numbers, std::byte* out) const {
  const int64_t size = row_bytes();
  std::byte* const end = out + std::ssize(numbers) * size;
  if (!rows_.is_cpu()) {
    each_run(numbers, size, [&](int64_t first, int64_t count, int64_t before) {
      host_rows(out + before, count, rows_)
          .copy_(rows_.narrow(0, first, count), /*non_blocking=*/true);
    });
    return end;
  }
  for (const int64_t row : numbers) {
    std::memcpy(out, bytes(row), static_cast<size_t>(size));
    out += size;
  }
  return end;
}

const std::byte* RowMemory::write(std::span<const int64_t> numbers, const std::byte* in) {
  const int64_t size = row_bytes();
  const std::byte* const end = in + std::ssize(numbers) * size;
  if (!rows_.is_cpu()) {
    each_run(numbers, size, [&](int64_t first, int64_t count, int64_t before) {
      rows_.narrow(0, first, count)
          .copy_(host_rows(in + before, count, rows_), /*non_blocking=*/true);
    });
    return end;
  }
  for (const int64_t row : numbers) {
    std::memcpy(bytes(row), in, static_cast<size_t>(size));
    in += size;
  }
  return end;
}

DeviceBytes::DeviceBytes(int64_t count, at::Device device) : device_(device) {
  if (!device.is_cpu())
    pinned_ =
        at::empty({std::max<int64_t>(count, 1)}, at::TensorOptions(at::kByte).pinned_memory(true));
}

DeviceBytes::DeviceBytes(std::span<std::byte> out, at::Device device)
    : DeviceBytes(std::ssize(out), device) {
  out_ = out;
}

DeviceBytes::DeviceBytes(std::span<const std::byte> in, at::Device device)
    : DeviceBytes(std::ssize(in), device) {
  in_ = in;
  if (pinned_.defined()) std::memcpy(pinned_data(), in.data(), in.size());
}

void DeviceBytes::wait() {
  if (!pinned_.defined()) return;
  c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).synchronize();
  if (!out_.empty()) std::memcpy(out_.data(), pinned_data(), out_.size());
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
