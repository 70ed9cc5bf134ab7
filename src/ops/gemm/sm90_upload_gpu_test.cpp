// Uploads to a card through pinned buffers: the bytes that the host packs.
#include <cstring>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/gemm/sm90_upload.h"
#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::same_bits;
using testing::Stored;

TEST(Sm90UploadGpu, GivesTheHostsBytesAgainAndAgain) {
  Uploader uploader(at::kCUDA, [](const std::byte* from, std::span<std::byte> to) {
    std::memcpy(to.data(), from, to.size());
  });
  // Many buffers' worth, so that each is filled again while others are under way.
  std::vector<at::Tensor> data, scale;
  for (unsigned seed = 0; seed < 24; ++seed) {
    const Stored one = testing::near_fp4(2048, 4096, seed % 3);
    data.push_back(one.data);
    scale.push_back(one.scale);
  }
  const auto wanted = pack_sm90_fp4(data, scale);
  ASSERT_TRUE(wanted.has_value());
  for (int turn = 0; turn < 3; ++turn) {
    Sm90Matrices found = plan_upload(WeightFormat::kFp4, false, data, scale);
    const at::Tensor inexact = upload_sm90(uploader, found, data, scale);
    EXPECT_EQ(inexact.item<int32_t>(), 0);
    EXPECT_TRUE(same_bits(found.data.cpu(), wanted->data));
  }
  const Stored c = testing::make_fp8(512, 1024, 3);
  for (const bool widened : {false, true}) {
    const auto packed =
        widened ? pack_sm90_widened({c.data}, {c.scale}) : pack_sm90_fp8({c.data}, {c.scale});
    Sm90Matrices found = plan_upload(WeightFormat::kFp8, widened, {c.data}, {c.scale});
    upload_sm90(uploader, found, {c.data}, {c.scale});
    EXPECT_TRUE(same_bits(found.data.cpu(), packed->data)) << widened;
    EXPECT_TRUE(same_bits(found.scales.cpu(), packed->scales)) << widened;
  }
  const at::Tensor values = at::randn({3, 70, 104}).to(at::kBFloat16);
  Sm90Matrices found = plan_upload(WeightFormat::kBf16, false, values.unbind(0), {});
  upload_sm90(uploader, found, values.unbind(0), {});
  EXPECT_TRUE(same_bits(found.data.cpu(), pack_sm90_bf16(values)->data));
  const at::Tensor whole = at::arange(3'000'001);
  EXPECT_TRUE(at::equal(upload(uploader, whole).cpu(), whole));
}

}  // namespace
}  // namespace hadal::ops
