#include "engine_core/disk/disk_record.h"

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

namespace hadal::engine_core {
namespace {

constexpr std::array<int64_t, 4> kTokens = {7, 0, 129279, 2147483647};

std::string example(RecordKind kind, std::string_view payload) {
  PrefixDigest digest;
  digest.fill(std::byte{0x5a});
  return encode_record(kind, 12, digest, kTokens, std::as_bytes(std::span(payload)));
}

TEST(DiskRecord, SaysWhatItWasWrittenToSay) {
  for (const std::string_view payload : {std::string_view(""), std::string_view("payload")}) {
    const std::string bytes = example(RecordKind::kWindow, payload);
    EXPECT_EQ(std::ssize(bytes), record_bytes(4, std::ssize(payload)));
    const ParsedRecord parsed = parse_record(std::as_bytes(std::span(bytes)));
    ASSERT_TRUE(parsed.record) << parsed.fault;
    EXPECT_EQ(parsed.record->kind, RecordKind::kWindow);
    EXPECT_EQ(parsed.record->pos, 12);
    EXPECT_EQ(parsed.record->digest[31], std::byte{0x5a});
    EXPECT_TRUE(same_tokens(*parsed.record, kTokens));
    EXPECT_FALSE(same_tokens(*parsed.record, std::span(kTokens).first(3)));
    EXPECT_FALSE(same_tokens(*parsed.record, std::array<int64_t, 4>{7, 0, 129279, 1}));
    ASSERT_EQ(parsed.record->payload.size(), payload.size());
    EXPECT_TRUE(std::ranges::equal(parsed.record->payload, std::as_bytes(std::span(payload))));
  }
}

TEST(DiskRecord, EveryFlippedBitAndEveryTruncationIsNoticed) {
  for (const RecordKind kind :
       {RecordKind::kPage, RecordKind::kWindow, RecordKind::kSnapshot, RecordKind::kText}) {
    const std::string good = example(kind, "payload");
    for (size_t bit = 0; bit < 8 * good.size(); ++bit) {
      std::string bad = good;
      bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
      ASSERT_FALSE(parse_record(std::as_bytes(std::span(bad))).record) << "bit " << bit;
    }
    for (size_t size = 0; size < good.size(); ++size) {
      ASSERT_FALSE(parse_record(std::as_bytes(std::span(good)).first(size)).record) << size;
    }
    const std::string longer = good + "x";
    EXPECT_FALSE(parse_record(std::as_bytes(std::span(longer))).record);
  }
  const IndexEntry entry{256, 1000, 42};
  const std::string good = encode_index_entry(entry);
  EXPECT_EQ(parse_index_entry(std::as_bytes(std::span(good))), entry);
  for (size_t bit = 0; bit < 8 * good.size(); ++bit) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    ASSERT_FALSE(parse_index_entry(std::as_bytes(std::span(bad)))) << "bit " << bit;
  }
  for (size_t size = 0; size < good.size(); ++size) {
    ASSERT_FALSE(parse_index_entry(std::as_bytes(std::span(good)).first(size))) << size;
  }
}

TEST(DiskRecord, ANewerVersionIsNamed) {
  std::string bytes = example(RecordKind::kPage, "payload");
  bytes[4] = 2;
  EXPECT_STREQ(parse_record(std::as_bytes(std::span(bytes))).fault, "of another version");
}

}  // namespace
}  // namespace hadal::engine_core
