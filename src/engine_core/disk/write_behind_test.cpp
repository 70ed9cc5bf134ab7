// Named so that the thread sanitizer's run takes these and leaves RocksDB, which is not
// instrumented, out.
#include "engine_core/disk/write_behind.h"

#include <array>
#include <atomic>
#include <semaphore>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace hadal::engine_core {
namespace {

using std::chrono::milliseconds;

TEST(WriteBehindThread, ItemsOfSeveralThreadsArriveOnceAndInOrder) {
  std::vector<WriteItem> arrived;
  {
    WriteBehind queue(
        {.batch_bytes = 500},
        [&](std::vector<WriteItem> batch) {
          for (WriteItem& item : batch) arrived.push_back(std::move(item));
        },
        [] {});
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread) {
      threads.emplace_back([&queue, thread] {
        for (int i = 0; i < 500; ++i) {
          EXPECT_TRUE(queue.push({std::to_string(thread), std::to_string(i),
                                  i % 7 == 0 ? WriteItem::Kind::kRemove : WriteItem::Kind::kPut}));
          if (i % 100 == 0) queue.flush();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  ASSERT_EQ(arrived.size(), 2000u);
  std::array<int, 4> next{};
  for (const WriteItem& item : arrived) {
    const int thread = std::stoi(item.key);
    const int number = next[static_cast<size_t>(thread)]++;
    EXPECT_EQ(item.value, std::to_string(number));
    EXPECT_EQ(item.kind == WriteItem::Kind::kRemove, number % 7 == 0);
  }
}

TEST(WriteBehindThread, AFullQueueRefusesAtOnceAndTakesAgainLater) {
  std::binary_semaphore blocked(0), go(0);
  std::atomic<int> written{0};
  WriteBehind queue(
      {.queue_bytes = 3000},
      [&](const std::vector<WriteItem>& batch) {
        blocked.release();
        go.acquire();
        written += static_cast<int>(batch.size());
      },
      [] {});
  ASSERT_TRUE(queue.push({"first", std::string(1000, 'x')}));
  blocked.acquire();  // the first is being written and still counts
  int taken = 0;
  while (queue.push({"more", std::string(500, 'x')})) ++taken;
  EXPECT_GE(taken, 1);
  EXPECT_LE(taken, 3);
  EXPECT_FALSE(queue.has_room(500));
  EXPECT_LE(queue.queued_bytes(), 3000);
  go.release();
  blocked.acquire();
  go.release();
  queue.flush();
  EXPECT_EQ(written, 1 + taken);
  EXPECT_EQ(queue.queued_bytes(), 0);
  EXPECT_TRUE(queue.has_room(500));
}

TEST(WriteBehindThread, IdleRunsBetweenBatchesAndAnExceptionEndsNothing) {
  std::atomic<int> idles{0}, batches{0};
  WriteBehind queue(
      {.idle_every = milliseconds(1)},
      [&](const std::vector<WriteItem>&) {
        if (++batches == 1) throw std::runtime_error("the first batch fails, as this test wants");
      },
      [&] { ++idles; });
  queue.push({"a", "b"});
  queue.flush();
  queue.push({"c", "d"});
  queue.flush();
  EXPECT_EQ(batches, 2);
  for (int wait = 0; wait < 2000 && idles < 3; ++wait) std::this_thread::sleep_for(milliseconds(1));
  EXPECT_GE(idles, 3);
}

}  // namespace
}  // namespace hadal::engine_core
