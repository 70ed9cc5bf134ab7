#include "engine_core/schedule/delivery.h"

#include <atomic>
#include <exception>
#include <iterator>
#include <utility>

#include "base/check.h"
#include "base/log.h"

namespace hadal::engine_core {

class Delivery::Keeper final : public Sink, public std::enable_shared_from_this<Keeper> {
 public:
  Keeper(Delivery& delivery, std::shared_ptr<Sink> sink)
      : delivery_(delivery), sink_(std::move(sink)) {}

  void on_update(Update update) override {
    if (failed_) throw Error("an update before this one failed");
    delivery_.kept_.push_back({shared_from_this(), std::move(update)});
  }

  void deliver(Update update) {
    if (failed_) return;
    try {
      sink_->on_update(std::move(update));
      return;
    } catch (const std::exception& error) {
      log::error("engine", "a request's sink threw: ", error.what());
    } catch (...) {
      log::error("engine", "a request's sink threw");
    }
    failed_ = true;
  }

 private:
  Delivery& delivery_;
  const std::shared_ptr<Sink> sink_;
  std::atomic<bool> failed_{false};
};

Delivery::Delivery() : thread_([this] { run(); }) {}

Delivery::~Delivery() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  news_.notify_one();
  thread_.join();
}

std::shared_ptr<Sink> Delivery::keeper(std::shared_ptr<Sink> sink) {
  if (sink == nullptr) return nullptr;
  return std::make_shared<Keeper>(*this, std::move(sink));
}

void Delivery::hand_over() {
  if (kept_.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    if (handed_over_.empty()) {
      handed_over_.swap(kept_);
    } else {
      std::ranges::move(kept_, std::back_inserter(handed_over_));
    }
  }
  kept_.clear();
  news_.notify_one();
}

void Delivery::wait() {
  std::unique_lock lock(mutex_);
  empty_.wait(lock, [this] { return handed_over_.empty() && !delivering_; });
}

void Delivery::run() {
  std::vector<Parcel> parcels;
  std::unique_lock lock(mutex_);
  for (;;) {
    news_.wait(lock, [this] { return !handed_over_.empty() || stopping_; });
    if (handed_over_.empty()) return;
    parcels.swap(handed_over_);
    delivering_ = true;
    lock.unlock();
    for (Parcel& parcel : parcels) parcel.keeper->deliver(std::move(parcel.update));
    parcels.clear();
    lock.lock();
    delivering_ = false;
    if (handed_over_.empty()) empty_.notify_all();
  }
}

}  // namespace hadal::engine_core
