// Responses that clients want to go on from later (/v1/responses with `store`): one file each in a
// folder of its own, within a budget of bytes; the longest unused go first.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "server/json_reader.h"

namespace hadal::server {

/// Thread-safe. A file that cannot be written or read is a response that is not there: it is logged
/// and no request fails.
class ResponseStore {
 public:
  struct Stored {
    Json items;     ///< the conversation: what went in and what came out
    Json response;  ///< as it was answered
  };

  /// Goes on with what the folder holds. Errors: InputError when it cannot be a folder of ours.
  ResponseStore(std::string folder, int64_t max_bytes);
  void put(const std::string& id, const Json& items, const Json& response);
  std::optional<Stored> find(const std::string& id);
  /// Whether it was there.
  bool erase(const std::string& id);
  int64_t bytes() const;

 private:
  struct Entry {
    int64_t bytes = 0;
    uint64_t used = 0;  ///< the larger the later
  };
  std::string path(const std::string& id) const;
  void forget(std::map<std::string, Entry>::iterator entry);

  const std::string folder_;
  const int64_t max_bytes_;
  mutable std::mutex mutex_;
  std::map<std::string, Entry> entries_;
  int64_t bytes_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace hadal::server
