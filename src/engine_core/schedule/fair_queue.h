// Whose turn it is: the waiting sequences, by priority, then by client, then by arrival.
//
// Within a priority the client that was served least comes next, where service is counted in tokens
// and a client that comes back after a pause starts level with the others (start-time fair
// queueing). Sequences that were preempted go before all others of their priority, by arrival: they
// were admitted once. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>

namespace hadal::engine_core {

class FairQueue {
 public:
  struct Item {
    uint64_t arrival = 0;  ///< unique; the earlier the smaller
    int priority = 0;      ///< higher first
    std::string client;
    bool resumes = false;  ///< was preempted
  };

  void push(const Item& item);
  /// The next one's arrival number.
  std::optional<uint64_t> front() const;
  /// Removes the next one, whose turn it was.
  void pop();
  /// Removes one whose turn it was not.
  void remove(uint64_t arrival);
  /// `client` got `tokens` tokens of service.
  void charge(const std::string& client, int64_t tokens);

  const Item& item(uint64_t arrival) const { return items_.at(arrival); }
  size_t size() const { return items_.size(); }
  bool empty() const { return items_.empty(); }

 private:
  struct Level {
    std::set<uint64_t> resuming;
    std::map<std::string, std::set<uint64_t>> clients;
  };
  struct Service {
    int64_t tokens = 0;
    int64_t waiting = 0;  ///< items
  };

  void forget_idle();

  std::map<int, Level, std::greater<>> levels_;
  std::unordered_map<uint64_t, Item> items_;
  std::unordered_map<std::string, Service> service_;
  int64_t now_ = 0;  ///< service of the client whose turn came last
};

}  // namespace hadal::engine_core
