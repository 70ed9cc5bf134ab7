// Writes off the critical path: a queue bounded in bytes and one thread that empties it. The caller
// never waits: what does not fit is refused.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace hadal::engine_core {

struct WriteItem {
  enum class Kind : uint8_t {
    kPut,
    kRemove,  ///< the key goes; `value` is empty
    kUse,     ///< no write: `value` names what was used
  };
  std::string key;
  std::string value;
  Kind kind = Kind::kPut;
};

class WriteBehind {
 public:
  struct Options {
    int64_t queue_bytes = int64_t{256} << 20;
    int64_t batch_bytes = int64_t{8} << 20;  ///< a batch ends with the item that reaches it
    std::chrono::milliseconds idle_every{1000};
  };
  /// Both run on the queue's thread. `write` gets the items in the order of push(); `idle` runs
  /// about every `idle_every`, between batches.
  using Write = std::function<void(std::vector<WriteItem> batch)>;
  using Idle = std::function<void()>;

  WriteBehind(Options options, Write write, Idle idle);
  /// Hands over all that is queued, then ends the thread.
  ~WriteBehind();
  WriteBehind(const WriteBehind&) = delete;
  WriteBehind& operator=(const WriteBehind&) = delete;

  /// False, and nothing queued, when the queue is full. Bytes count until their batch is written.
  bool push(WriteItem item);
  /// Whether an item of this size would be taken now.
  bool has_room(int64_t bytes) const;
  /// Waits until everything pushed before is written.
  void flush();
  int64_t queued_bytes() const;

 private:
  void run();

  const Options options_;
  const Write write_;
  const Idle idle_;
  mutable std::mutex mutex_;
  std::condition_variable wake_, written_;
  std::deque<WriteItem> queue_;
  int64_t bytes_ = 0;                   // queued and being written
  uint64_t pushed_ = 0, finished_ = 0;  // items ever
  bool stopping_ = false;
  std::thread thread_;  // last: starts when the rest is there
};

}  // namespace hadal::engine_core
