#include "engine_core/disk/recency_index.h"

#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace hadal::engine_core {
namespace {

TEST(RecencyIndex, GoesByUseThenDepthThenSize) {
  RecencyIndex index;
  index.begin_use();
  index.insert("page 1", 256, 10);
  index.insert("page 2", 512, 10);
  index.insert("snapshot 2", 512, 3);
  index.begin_use();
  index.insert("other", 256, 10);
  EXPECT_EQ(index.victim(), "page 2");
  index.begin_use();
  for (const char* key : {"page 1", "page 2", "snapshot 2"}) index.touch(key);
  std::vector<std::string> order;
  while (index.size() > 0) {
    order.push_back(index.victim());
    index.erase(order.back());
    index.check_integrity();
  }
  EXPECT_EQ(order, (std::vector<std::string>{"other", "page 2", "snapshot 2", "page 1"}));
  EXPECT_EQ(index.bytes(), 0);
}

TEST(RecencyIndex, PiecesOfOneUseCountAsSimultaneous) {
  RecencyIndex index;
  index.begin_use();
  for (const char* key : {"page 1", "other"}) index.insert(key, 256, 10);
  index.insert("page 2", 512, 10);
  const uint64_t use = index.begin_use();
  index.touch("page 1", use);
  index.begin_use();
  index.touch("other");
  index.touch("page 2", use);
  index.touch("other", use);  // its later use stays
  index.check_integrity();
  std::vector<std::string> order;
  while (index.size() > 0) {
    order.push_back(index.victim());
    index.erase(order.back());
  }
  EXPECT_EQ(order, (std::vector<std::string>{"page 2", "page 1", "other"}));
}

TEST(RecencyIndex, APrefixThatGrowsGoesFromItsEnd) {
  RecencyIndex index;
  index.insert("page 1", 256, 10);
  index.begin_use();
  index.insert("other", 256, 10);
  index.begin_use();
  index.insert("page 2", 512, 10, "page 1");
  index.insert("page 9", 2304, 10, "unknown");
  std::vector<std::string> order;
  while (index.size() > 0) {
    order.push_back(index.victim());
    index.erase(order.back());
  }
  EXPECT_EQ(order, (std::vector<std::string>{"page 2", "page 1", "other", "page 9"}));
}

TEST(RecencyIndex, RandomUseKeepsItsSumsAndARestoredOneItsOrder) {
  std::mt19937_64 random(3);
  RecencyIndex index;
  for (int step = 0; step < 5000; ++step) {
    index.begin_use();
    const std::string key = std::to_string(random() % 200);
    if (index.state(key) == RecencyIndex::State::kAbsent) {
      index.insert(key, static_cast<int64_t>(random() % 1000), static_cast<int64_t>(random() % 9));
      EXPECT_EQ(index.state(key), RecencyIndex::State::kQueued);
      index.mark_stored(key);
      EXPECT_EQ(index.state(key), RecencyIndex::State::kStored);
    } else if (random() % 3 == 0) {
      index.erase(key);
    } else {
      index.touch(key);
    }
    if (step % 50 == 0) index.check_integrity();
  }
  for (const auto& [key, entry] : index.take_touched(1000)) EXPECT_EQ(index.at(key), entry);
  EXPECT_TRUE(index.take_touched(1000).empty());
  RecencyIndex restored;
  for (int key = 0; key < 200; ++key) {
    const std::string name = std::to_string(key);
    if (index.state(name) != RecencyIndex::State::kAbsent) restored.restore(name, index.at(name));
  }
  EXPECT_EQ(restored.bytes(), index.bytes());
  while (index.size() > 0) {
    const std::string victim = index.victim();
    ASSERT_EQ(restored.victim(), victim);
    index.erase(victim);
    restored.erase(victim);
  }
  EXPECT_EQ(restored.size(), 0);
}

}  // namespace
}  // namespace hadal::engine_core
