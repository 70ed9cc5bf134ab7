// What is packed where it arrives is what the host packs, whatever it arrives in.
#include "ops/gemm/sm90_upload.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::same_bits;
using testing::Stored;
using Tensors = std::vector<at::Tensor>;

/// Counts what it reads.
struct Counted {
  std::atomic<int64_t> bytes{0};
  Uploader uploader{at::kCPU, [this](const std::byte* from, std::span<std::byte> to) {
                      std::memcpy(to.data(), from, to.size());
                      bytes += std::ssize(to);
                    }};
};

int64_t bytes_of(const Tensors& tensors) {
  int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

void expect_uploaded(WeightFormat format,
                     bool widened,
                     const Tensors& data,
                     const Tensors& scale,
                     const std::optional<Sm90Matrices>& wanted) {
  Counted counted;
  Sm90Matrices found = plan_upload(format, widened, data, scale);
  ASSERT_TRUE(found.data.defined());
  const at::Tensor inexact = upload_sm90(counted.uploader, found, data, scale);
  EXPECT_EQ(counted.bytes, bytes_of(data) + bytes_of(scale)) << "every byte is read once";
  ASSERT_EQ(inexact.item<int32_t>() == 0, wanted.has_value());
  if (!wanted) return;
  EXPECT_EQ(found.widened, wanted->widened);
  EXPECT_EQ(found.out, wanted->out);
  EXPECT_EQ(found.in, wanted->in);
  EXPECT_TRUE(same_bits(found.data, wanted->data));
  ASSERT_EQ(found.scales.defined(), wanted->scales.defined());
  EXPECT_TRUE(!wanted->scales.defined() || same_bits(found.scales, wanted->scales));
}

TEST(Sm90Upload, GivesTheHostsBytes) {
  const Stored a = testing::near_fp4(200, 384, 1), b = testing::near_fp4(200, 384, 2);
  const Tensors fp4 = {a.data, b.data}, fp4_scales = {a.scale, b.scale};
  expect_uploaded(WeightFormat::kFp4, false, fp4, fp4_scales, pack_sm90_fp4(fp4, fp4_scales));
  const Stored c = testing::make_fp8(192, 256, 3), d = testing::make_fp8(192, 256, 4);
  const Tensors fp8 = {c.data, d.data}, fp8_scales = {c.scale, d.scale};
  expect_uploaded(WeightFormat::kFp8, false, fp8, fp8_scales, pack_sm90_fp8(fp8, fp8_scales));
  expect_uploaded(WeightFormat::kFp8, true, fp8, fp8_scales, pack_sm90_widened(fp8, fp8_scales));
  const at::Tensor values = at::randn({3, 70, 104}).to(at::kBFloat16);
  expect_uploaded(WeightFormat::kBf16, false, values.unbind(0), {}, pack_sm90_bf16(values));
}

TEST(Sm90Upload, SaysWhatHasNoExactForm) {
  Stored a = testing::near_fp4(64, 128, 1);
  a.scale.view(at::kByte)[5][2] = 255;
  a.data.view(at::kByte)[5].fill_(0x11);
  expect_uploaded(WeightFormat::kFp4, false, {a.data}, {a.scale}, std::nullopt);
}

TEST(Sm90Upload, LeavesTheRestToTheHost) {
  const auto planned = [](WeightFormat format, bool widened, const Tensors& data,
                          const Tensors& scale) {
    return plan_upload(format, widened, data, scale).data.defined();
  };
  const Stored c = testing::make_fp8(192, 256, 3);
  EXPECT_TRUE(planned(WeightFormat::kFp8, true, {c.data}, {c.scale}));
  EXPECT_FALSE(planned(WeightFormat::kFp8, false, {c.data.t()}, {c.scale}));
  EXPECT_FALSE(planned(WeightFormat::kFp8, true, {c.data.narrow(0, 0, 100)}, {c.scale}));
  EXPECT_FALSE(planned(WeightFormat::kBf16, false, {at::zeros({8, 12}, at::kBFloat16)}, {}));
}

TEST(Sm90Upload, ReadersErrorsArrive) {
  Uploader uploader(
      at::kCPU, [](const std::byte*, std::span<std::byte>) { throw std::runtime_error("gone"); });
  EXPECT_THROW(upload(uploader, at::zeros({4})), std::runtime_error);
}

// Small pieces side by side, ends that are no multiple of anything, more than a buffer holds.
TEST(Sm90Upload, PiecesOfEverySizeArrive) {
  Counted counted;
  const at::Tensor from = at::arange(3'000'000), to = at::zeros_like(from);
  const auto* source = static_cast<const std::byte*>(from.const_data_ptr());
  auto* target = static_cast<std::byte*>(to.mutable_data_ptr());
  std::vector<UploadPiece> pieces;
  const auto bytes = static_cast<int64_t>(from.nbytes());
  for (int64_t at = 0, i = 0; at < bytes; ++i) {
    const int64_t size = std::min(bytes - at, i % 5 == 4 ? int64_t{9'000'001} : 3 + i * 977);
    pieces.push_back({.from = source + at, .to = target + at, .bytes = size});
    at += size;
  }
  std::ranges::rotate(pieces, pieces.begin() + 2);
  counted.uploader.copy(pieces);
  EXPECT_TRUE(at::equal(from, to));
  EXPECT_EQ(counted.bytes, bytes);
}

TEST(Sm90Upload, BytesAsTheyAre) {
  Counted counted;
  // More than a buffer, and no multiple of one.
  const at::Tensor values = at::arange(3'000'001);
  EXPECT_TRUE(at::equal(upload(counted.uploader, values), values));
}

}  // namespace
}  // namespace hadal::ops
