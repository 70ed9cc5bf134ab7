#include "ops/gemm/sm90_upload.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "ops/gemm/pack_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

/// Stored bytes on the device at a time.
constexpr int64_t kBatchBytes = int64_t{256} << 20;
/// Widened weights: the largest power of two that fits.
constexpr int kMostWidened = 127 + 7;

const std::byte* bytes_of(const at::Tensor& host) {
  return static_cast<const std::byte*>(host.const_data_ptr());
}

bool usable(const std::vector<at::Tensor>& tensors) {
  return std::ranges::all_of(tensors, [&](const at::Tensor& t) {
    return t.is_cpu() && t.is_contiguous() && t.dim() == 2 && t.sizes() == tensors[0].sizes();
  });
}

/// Stored matrices on the device: bytes [matrices, rows, bytes of a row].
at::Tensor stack_there(Uploader& uploader, std::span<const at::Tensor> host) {
  const auto each = static_cast<int64_t>(host[0].nbytes());
  const at::Tensor there = at::empty({std::ssize(host), host[0].size(0), each / host[0].size(0)},
                                     at::TensorOptions(uploader.device()).dtype(at::kByte));
  auto* to = static_cast<std::byte*>(there.mutable_data_ptr());
  std::vector<UploadPiece> pieces;
  for (const at::Tensor& tensor : host) {
    pieces.push_back({.from = bytes_of(tensor), .to = to, .bytes = each});
    to += each;
  }
  uploader.copy(pieces);
  return there;
}

/// Matrices `first` to `first + codes.size(0)` out of what lies on the device.
void pack(const at::Tensor& codes,
          const at::Tensor& scales,
          const Sm90Matrices& w,
          int64_t first,
          const at::Tensor& inexact) {
  const int64_t matrices = codes.size(0);
  uint8_t* data = w.data.mutable_data_ptr<uint8_t>() + first * w.data.stride(0);
  const auto* from = codes.const_data_ptr<uint8_t>();
  if (w.format == WeightFormat::kFp4)
    return run_sm90(codes, pack_fp4_sm90, pack_fp4_twin,
                    {.codes = from,
                     .scales = scales.const_data_ptr<uint8_t>(),
                     .matrices = matrices,
                     .outputs = w.out,
                     .in = w.in,
                     .tiles = data,
                     .inexact = inexact.mutable_data_ptr<int32_t>()});
  if (w.widened)
    run_sm90(codes, pack_widened_sm90, pack_widened_twin,
             {.codes = from, .matrices = matrices, .outputs = w.out, .in = w.in, .tiles = data});
  else
    run_sm90(codes, pack_operand_sm90, pack_operand_twin,
             {.rows = from,
              .matrices = matrices,
              .outputs = w.out,
              .row_bytes = codes.size(2),
              .operand = data});
  if (w.format != WeightFormat::kFp8) return;
  run_sm90(codes, pack_scales_sm90, pack_scales_twin,
           {.codes = from,
            .scales = scales.const_data_ptr<uint8_t>(),
            .matrices = matrices,
            .outputs = w.out,
            .in = w.in,
            .most = w.widened ? kMostWidened : kMaxScaleByte,
            .out = w.scales.mutable_data_ptr<float>() + first * w.scales.stride(0),
            .inexact = inexact.mutable_data_ptr<int32_t>()});
}

}  // namespace

Sm90Matrices plan_upload(WeightFormat format,
                         bool widened,
                         const std::vector<at::Tensor>& data,
                         const std::vector<at::Tensor>& scale) {
  HADAL_CHECK(!data.empty() && scale.size() == (format == WeightFormat::kBf16 ? 0 : data.size()),
              "plan_upload: ", data.size(), " matrices with ", scale.size(), " scales");
  Sm90Matrices w{.format = format,
                 .widened = widened,
                 .matrices = std::ssize(data),
                 .out = data[0].size(0),
                 .in = data[0].size(1) * (format == WeightFormat::kFp4 ? 2 : 1),
                 .data = {},
                 .scales = {}};
  const int64_t unit = format == WeightFormat::kFp4 ? 32 : format == WeightFormat::kFp8 ? 16 : 8;
  const bool tiled = !widened || (w.out % sm90::kTileRows == 0 && w.in % sm90::kFp8Chain == 0);
  if (!usable(data) || !usable(scale) || w.out == 0 || w.in == 0 || w.in % unit != 0 || !tiled)
    return w;
  const int64_t bytes = format == WeightFormat::kFp4
                            ? sm90::round_up(w.out, sm90::kTileRows) / sm90::kTileRows * w.slabs() *
                                  sm90::kFp4TileBytes
                            : w.slabs() * w.row_groups() * sm90::kGroupRows * sm90::kSlabBytes;
  w.data = at::empty({w.matrices, bytes}, at::TensorOptions(at::kMeta).dtype(at::kByte));
  if (format == WeightFormat::kFp8)
    w.scales = at::empty({w.matrices, w.slabs(), ceil_div(w.out, int64_t{128})},
                         at::TensorOptions(at::kMeta).dtype(at::kFloat));
  return w;
}

at::Tensor upload_sm90(Uploader& uploader,
                       Sm90Matrices& planned,
                       const std::vector<at::Tensor>& data,
                       const std::vector<at::Tensor>& scale) {
  HADAL_CHECK(planned.data.defined() && planned.matrices == std::ssize(data),
              "upload_sm90: matrices that were not planned");
  const at::TensorOptions there(uploader.device());
  planned.data = at::empty(planned.data.sizes(), there.dtype(at::kByte));
  if (planned.scales.defined())
    planned.scales = at::empty(planned.scales.sizes(), there.dtype(at::kFloat));
  const at::Tensor inexact = at::zeros({1}, there.dtype(at::kInt));
  const auto each = static_cast<int64_t>(data[0].nbytes());
  const int64_t batch = std::max<int64_t>(1, kBatchBytes / each);
  for (int64_t first = 0; first < planned.matrices; first += batch) {
    const auto count = static_cast<size_t>(std::min(batch, planned.matrices - first));
    const auto begin = static_cast<size_t>(first);
    const at::Tensor codes = stack_there(uploader, std::span(data).subspan(begin, count));
    at::Tensor scales;
    if (!scale.empty()) scales = stack_there(uploader, std::span(scale).subspan(begin, count));
    pack(codes, scales, planned, first, inexact);
  }
  return inexact;
}

at::Tensor upload(Uploader& uploader, const at::Tensor& host) {
  HADAL_CHECK(host.is_cpu() && host.is_contiguous(), "upload: of a contiguous tensor of the host");
  const at::Tensor there = at::empty(host.sizes(), host.options().device(uploader.device()));
  uploader.copy({{.from = bytes_of(host),
                  .to = static_cast<std::byte*>(there.mutable_data_ptr()),
                  .bytes = static_cast<int64_t>(host.nbytes())}});
  return there;
}

}  // namespace hadal::ops
