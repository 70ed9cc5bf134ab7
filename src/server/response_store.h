// Responses that clients want to go on from later (/v1/responses with `store`): in a folder of
// their own, a file each, or in the store on disk that the engine keeps its prefixes in. Within a
// budget of bytes; the longest unused go first.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "engine_core/text_store.h"
#include "server/json_reader.h"

namespace hadal::server {

/// Thread-safe. What cannot be written or read is a response that is not there: it is logged and no
/// request fails.
class ResponseStore {
 public:
  struct Stored {
    Json items;     ///< the conversation: what went in and what came out
    Json response;  ///< as it was answered
  };
  virtual ~ResponseStore() = default;
  virtual void put(const std::string& id, const Json& items, const Json& response) = 0;
  virtual std::optional<Stored> find(const std::string& id) = 0;
  /// Whether it was there.
  virtual bool erase(const std::string& id) = 0;
};

class ResponseFolder final : public ResponseStore {
 public:
  /// Goes on with what the folder holds. Errors: InputError when it cannot be a folder of ours.
  ResponseFolder(std::string folder, int64_t max_bytes);
  void put(const std::string& id, const Json& items, const Json& response) override;
  std::optional<Stored> find(const std::string& id) override;
  bool erase(const std::string& id) override;
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

/// Beside the prefixes: one budget for both.
class ResponseTexts final : public ResponseStore {
 public:
  /// `texts` outlives it.
  explicit ResponseTexts(engine_core::TextStore& texts) : texts_(texts) {}
  void put(const std::string& id, const Json& items, const Json& response) override;
  std::optional<Stored> find(const std::string& id) override;
  bool erase(const std::string& id) override;

 private:
  engine_core::TextStore& texts_;
};

}  // namespace hadal::server
