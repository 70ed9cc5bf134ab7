#include "server/response_store.h"

#include <algorithm>
#include <filesystem>
#include <vector>

#include "base/file.h"
#include "base/log.h"

namespace hadal::server {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSuffix = ".json";

/// Ids are names of files, so that nothing but an id of ours may be one.
bool is_id(std::string_view id) {
  return id.starts_with("resp_") && id.size() <= 64 &&
         std::ranges::all_of(
             id.substr(5), [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); });
}

std::string text_of(const Json& items, const Json& response) {
  return Json::object({{"items", items}, {"response", response}}).dump();
}

/// Nothing, and a line in the log, if the text is none of ours.
std::optional<ResponseStore::Stored> stored_of(const std::string& text, const std::string& where) {
  try {
    const Json stored = Json::parse(text, where);
    const Json* items = stored.find("items");
    const Json* response = stored.find("response");
    if (items != nullptr && items->is_array() && response != nullptr && response->is_object())
      return ResponseStore::Stored{*items, *response};
    log::warn("server", where, ": no response of ours");
  } catch (const InputError& error) {
    log::warn("server", error.what());
  }
  return {};
}

}  // namespace

ResponseFolder::ResponseFolder(std::string folder, int64_t max_bytes)
    : folder_(std::move(folder)), max_bytes_(max_bytes) {
  std::error_code error;
  fs::create_directories(folder_, error);
  HADAL_INPUT_CHECK(!error, folder_, ": cannot hold responses: ", error.message());
  struct Found {
    fs::file_time_type written;
    std::string id;
    int64_t bytes;
  };
  std::vector<Found> found;
  for (const auto& file : fs::directory_iterator(folder_, error)) {
    const std::string id = file.path().stem().string();
    std::error_code gone;
    const auto bytes = static_cast<int64_t>(file.file_size(gone));
    if (!gone && file.path().extension() == kSuffix && is_id(id))
      found.push_back({file.last_write_time(gone), id, bytes});
  }
  HADAL_INPUT_CHECK(!error, folder_, ": ", error.message());
  std::ranges::sort(found, {}, &Found::written);
  for (const Found& one : found) {
    entries_[one.id] = {.bytes = one.bytes, .used = ++clock_};
    bytes_ += one.bytes;
  }
}

std::string ResponseFolder::path(const std::string& id) const {
  return concat(folder_, "/", id, kSuffix);
}

void ResponseFolder::forget(std::map<std::string, Entry>::iterator entry) {
  std::error_code ignored;
  fs::remove(path(entry->first), ignored);
  bytes_ -= entry->second.bytes;
  entries_.erase(entry);
}

void ResponseFolder::put(const std::string& id, const Json& items, const Json& response) {
  const std::string text = text_of(items, response);
  const auto bytes = static_cast<int64_t>(text.size());
  const std::lock_guard lock(mutex_);
  if (!is_id(id) || bytes > max_bytes_) return;
  while (!entries_.empty() && bytes_ + bytes > max_bytes_) {
    forget(std::ranges::min_element(entries_, {},
                                    [](const auto& entry) { return entry.second.used; }));
  }
  try {
    write_file_atomic(path(id), text);
  } catch (const std::exception& error) {
    log::warn("server", "response ", id, " is not kept: ", error.what());
    return;
  }
  entries_[id] = {.bytes = bytes, .used = ++clock_};
  bytes_ += bytes;
}

std::optional<ResponseStore::Stored> ResponseFolder::find(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto entry = entries_.find(id);
  if (entry == entries_.end()) return {};
  std::string text;
  try {
    text = read_file(path(id));
  } catch (const InputError& error) {
    log::warn("server", error.what());
  }
  if (auto stored = text.empty() ? std::nullopt : stored_of(text, path(id))) {
    entry->second.used = ++clock_;
    return stored;
  }
  forget(entry);
  return {};
}

bool ResponseFolder::erase(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const auto entry = entries_.find(id);
  if (entry == entries_.end()) return false;
  forget(entry);
  return true;
}

int64_t ResponseFolder::bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

void ResponseTexts::put(const std::string& id, const Json& items, const Json& response) {
  if (is_id(id) && !texts_.put_text(id, text_of(items, response)))
    log::warn("server", "response ", id, " is not kept: the store on disk does not take it");
}

std::optional<ResponseStore::Stored> ResponseTexts::find(const std::string& id) {
  if (!is_id(id)) return {};
  const std::optional<std::string> text = texts_.get_text(id);
  return text ? stored_of(*text, id) : std::nullopt;
}

bool ResponseTexts::erase(const std::string& id) { return is_id(id) && texts_.erase_text(id); }

}  // namespace hadal::server
