// Brings updates to their sinks on a thread of its own, a step's together: what sinks do, such as
// waking threads that write to clients, takes no time of the engine's.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "engine_core/request.h"

namespace hadal::engine_core {

class Delivery {
 public:
  Delivery();
  /// Delivers what was handed over.
  ~Delivery();

  /// Stands for `sink` in the engine's thread: keeps its updates until hand_over(). Once the sink
  /// has thrown it gets no more, and on_update() throws Error. Any thread; null for null.
  std::shared_ptr<Sink> keeper(std::shared_ptr<Sink> sink);
  /// The engine's thread: what its keepers have is delivered, in order.
  void hand_over();
  /// Any thread but this one's: until everything handed over has been delivered.
  void wait();

 private:
  class Keeper;
  struct Parcel {
    std::shared_ptr<Keeper> keeper;
    Update update;
  };
  void run();

  std::vector<Parcel> kept_;  ///< the engine's thread's
  std::mutex mutex_;
  std::condition_variable news_, empty_;
  std::vector<Parcel> handed_over_;
  bool delivering_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace hadal::engine_core
