// Texts in the disk store: records as those of prefixes, under the digests of their names.
#include "base/log.h"
#include "engine_core/disk/disk_store_state.h"

namespace hadal::engine_core {

bool DiskStore::Impl::put_text(const std::string& name, const std::string& text) {
  const PrefixDigest digest = text_digest(name);
  const std::string key = key_of(RecordKind::kText, digest);
  const int64_t bytes = record_bytes(0, std::ssize(text));
  {
    const std::lock_guard lock(mutex_);
    if (!stats_.writing) {
      ++stats_.dropped_off;
      return false;
    }
    if (index_.state(key) != RecencyIndex::State::kAbsent) return false;
    if (bytes > options_.max_bytes || !queue_->has_room(bytes)) {
      ++stats_.dropped_full;
      return false;
    }
    index_.insert(key, 0, bytes);
    queued_texts_[key] = text;
  }
  std::string record =
      encode_record(RecordKind::kText, 0, digest, {}, std::as_bytes(std::span(text)));
  if (queue_->push({.key = key, .value = std::move(record)})) return true;
  const std::lock_guard lock(mutex_);
  index_.erase(key);
  queued_texts_.erase(key);
  ++stats_.dropped_full;
  return false;
}

std::optional<std::string> DiskStore::Impl::get_text(const std::string& name) {
  const PrefixDigest digest = text_digest(name);
  const std::string key = key_of(RecordKind::kText, digest);
  {
    const std::lock_guard lock(mutex_);
    const auto queued = queued_texts_.find(key);
    const bool is_queued = queued != queued_texts_.end();
    if (!is_queued && index_.state(key) != RecencyIndex::State::kStored) return std::nullopt;
    index_.touch(key, index_.begin_use());
    if (is_queued) return queued->second;
  }
  return read_text(key, digest);
}

std::optional<std::string> DiskStore::Impl::read_text(const std::string& key,
                                                      const PrefixDigest& digest) {
  std::optional<std::string> text;
  std::string fault;
  const auto check = [&](std::span<const std::byte> bytes) {
    const ParsedRecord parsed = parse_record(bytes);
    fault = parsed.fault;
    if (!parsed.record) return;
    const std::span<const std::byte> payload = parsed.record->payload;
    if (parsed.record->kind == RecordKind::kText && parsed.record->digest == digest)
      text.emplace(reinterpret_cast<const char*>(payload.data()), payload.size());
    else
      fault = "of another name";
  };
  const DiskDb::Found found = db_.get(key, check, &fault);
  if (text) {
    const std::lock_guard lock(mutex_);
    DiskStoreStats::Traffic& traffic = stats_.traffic[static_cast<size_t>(RecordKind::kText)];
    ++traffic.read;
    traffic.read_bytes += std::ssize(*text);
    return text;
  }
  if (found != DiskDb::Found::kNo && db_.failure().empty()) {
    log::warn("disk", options_.folder, ": a text is damaged (", fault, "): a miss");
    const std::lock_guard lock(mutex_);
    ++stats_.damaged;
  }
  forget(key);
  return std::nullopt;
}

bool DiskStore::Impl::erase_text(const std::string& name) {
  const std::string key = key_of(RecordKind::kText, text_digest(name));
  const std::lock_guard lock(mutex_);
  if (index_.state(key) == RecencyIndex::State::kAbsent) return false;
  index_.erase(key);
  queued_texts_.erase(key);
  // Where it cannot be written now, it is done when the store is opened for writing again.
  if (!stats_.writing || !queue_->push({.key = key, .value = {}, .kind = WriteItem::Kind::kRemove}))
    erased_texts_.insert(key);
  return true;
}

}  // namespace hadal::engine_core
