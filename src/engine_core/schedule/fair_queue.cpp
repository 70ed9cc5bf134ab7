#include "engine_core/schedule/fair_queue.h"

#include <algorithm>

#include "base/check.h"

namespace hadal::engine_core {
namespace {

constexpr size_t kMaxIdleClients = 1024;

}  // namespace

void FairQueue::push(const Item& item) {
  HADAL_CHECK(items_.emplace(item.arrival, item).second, "fair_queue: ", item.arrival, " waits");
  Service& service = service_[item.client];
  if (service.waiting++ == 0) service.tokens = std::max(service.tokens, now_);
  Level& level = levels_[item.priority];
  if (item.resumes) {
    level.resuming.insert(item.arrival);
  } else {
    level.clients[item.client].insert(item.arrival);
  }
}

std::optional<uint64_t> FairQueue::front() const {
  if (levels_.empty()) return std::nullopt;
  const Level& level = levels_.begin()->second;
  if (!level.resuming.empty()) return *level.resuming.begin();
  const std::set<uint64_t>* best = nullptr;
  int64_t least = 0;
  for (const auto& [client, arrivals] : level.clients) {
    const int64_t tokens = service_.at(client).tokens;
    if (best != nullptr &&
        (tokens > least || (tokens == least && *best->begin() < *arrivals.begin())))
      continue;
    best = &arrivals;
    least = tokens;
  }
  return *best->begin();
}

void FairQueue::pop() {
  const std::optional<uint64_t> arrival = front();
  HADAL_CHECK(arrival.has_value(), "fair_queue: empty");
  now_ = std::max(now_, service_.at(items_.at(*arrival).client).tokens);
  remove(*arrival);
}

void FairQueue::remove(uint64_t arrival) {
  const auto found = items_.find(arrival);
  HADAL_CHECK(found != items_.end(), "fair_queue: ", arrival, " does not wait");
  const Item& item = found->second;
  const auto at = levels_.find(item.priority);
  Level& level = at->second;
  if (item.resumes) {
    level.resuming.erase(arrival);
  } else {
    const auto client = level.clients.find(item.client);
    client->second.erase(arrival);
    if (client->second.empty()) level.clients.erase(client);
  }
  if (level.resuming.empty() && level.clients.empty()) levels_.erase(at);
  --service_.at(item.client).waiting;
  items_.erase(found);
  forget_idle();
}

void FairQueue::charge(const std::string& client, int64_t tokens) {
  service_[client].tokens += tokens;
}

// Who has no more service than a newcomer would start with need not be remembered.
void FairQueue::forget_idle() {
  if (service_.size() <= kMaxIdleClients + items_.size()) return;
  std::erase_if(service_, [&](const auto& entry) {
    return entry.second.waiting == 0 && entry.second.tokens <= now_;
  });
}

}  // namespace hadal::engine_core
