#include "text/tokenizer.h"

#include <mutex>
#include <unordered_map>
#include <utility>

#include "base/check.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/official_splitter.h"
#include "text/pre_tokenizer.h"
#include "text/tokenizer_file.h"

namespace hadal::text {
namespace {

/// Piece caches that no call is using. A few are kept: each takes 2 MiB.
class CachePool {
 public:
  void fill() {
    std::vector<std::unique_ptr<PieceCache>> taken;
    for (size_t i = 0; i < kMostKept; ++i) taken.push_back(take());
    for (auto& cache : taken) give(std::move(cache));
  }
  std::unique_ptr<PieceCache> take() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        std::unique_ptr<PieceCache> cache = std::move(free_.back());
        free_.pop_back();
        return cache;
      }
    }
    return std::make_unique<PieceCache>();
  }
  void give(std::unique_ptr<PieceCache> cache) {
    const std::lock_guard lock(mutex_);
    if (free_.size() < kMostKept) free_.push_back(std::move(cache));
  }

 private:
  static constexpr size_t kMostKept = 2;

  std::mutex mutex_;
  std::vector<std::unique_ptr<PieceCache>> free_;
};

class BorrowedCache {
 public:
  explicit BorrowedCache(CachePool& pool) : pool_(pool), cache_(pool.take()) {}
  ~BorrowedCache() { pool_.give(std::move(cache_)); }
  BorrowedCache(const BorrowedCache&) = delete;
  BorrowedCache& operator=(const BorrowedCache&) = delete;
  PieceCache& operator*() const { return *cache_; }

 private:
  CachePool& pool_;
  std::unique_ptr<PieceCache> cache_;
};

/// Calls token(id) and gap(text) in the order of the text.
template <typename Token, typename Gap>
void split_at_tokens(const AddedTokenMatcher& matcher,
                     std::string_view text,
                     Token token,
                     Gap gap) {
  size_t done = 0;
  while (done < text.size()) {
    const AddedTokenMatcher::Match match = matcher.find(text, done);
    if (match.pos > done) gap(text.substr(done, match.pos - done));
    if (match.length == 0) return;
    token(match.id);
    done = match.pos + match.length;
  }
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerFile parsed)
      : file(std::move(parsed)), pre_tokenizer(file.patterns), bpe(file.byte_ids, file.merges) {
    added.resize(file.names.size(), false);
    ids.reserve(file.bytes.size());
    for (const AddedToken& token : file.added) {
      added[static_cast<size_t>(token.id)] = true;
      (token.normalized ? second_pass : first_pass).add(token.content, token.id);
      ids.emplace(token.content, token.id);
    }
    for (size_t id = 0; id < file.bytes.size(); ++id) {
      ids.emplace(file.bytes[id],
                  static_cast<int32_t>(id));  // keeps an added token of the same bytes
    }
    file.merges = {};
  }

  void encode_piece(std::string_view piece, PieceCache& cache, std::vector<int32_t>& out) const {
    if (piece.size() > PieceCache::kMaxBytes) return bpe.encode(piece, out);
    PieceCache::Entry& entry = cache.at(piece);
    if (entry.holds(piece)) {
      out.insert(out.end(), entry.ids, entry.ids + entry.count);
      return;
    }
    const size_t before = out.size();
    bpe.encode(piece, out);
    const size_t count = out.size() - before;
    if (count > PieceCache::kMaxIds) return;
    entry.length = static_cast<uint8_t>(piece.size());
    entry.count = static_cast<uint8_t>(count);
    std::memcpy(entry.bytes, piece.data(), piece.size());
    std::memcpy(entry.ids, out.data() + before, count * sizeof(int32_t));
  }

  void encode_plain(std::string_view text, PieceCache& cache, std::vector<int32_t>& out) const {
    if (pre_tokenizer.is_official()) {
      OfficialSplitter splitter(text);
      std::string_view piece;
      while (splitter.next(piece)) encode_piece(piece, cache, out);
      return;
    }
    for (const std::string_view piece : pre_tokenizer.split(text)) encode_piece(piece, cache, out);
  }

  size_t checked(int32_t id) const {
    HADAL_INPUT_CHECK(id >= 0 && static_cast<size_t>(id) < file.names.size(), "tokenizer: id ", id,
                      " is outside the vocabulary of ", file.names.size());
    return static_cast<size_t>(id);
  }

  TokenizerFile file;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  AddedTokenMatcher first_pass;   ///< added tokens that are not normalised win over the others
  AddedTokenMatcher second_pass;  ///< looked for in what the first pass leaves
  std::vector<bool> added;
  std::unordered_map<std::string_view, int32_t> ids;  ///< keys point into `file`
  mutable CachePool caches;
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::from_file(const std::string& path) { return from_json(read_file(path), path); }

Tokenizer Tokenizer::from_json(std::string_view json, std::string_view name) {
  TokenizerFile file = parse_tokenizer_file(json, name);
  try {
    return Tokenizer(std::make_unique<Impl>(std::move(file)));
  } catch (const InputError& error) {  // an expression or a pair of merges
    throw InputError(concat(name, ": ", error.what()));
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, SpecialTokens special) const {
  std::vector<int32_t> ids;
  encode(text, special, ids);
  return ids;
}

void Tokenizer::encode(std::string_view text,
                       SpecialTokens special,
                       std::vector<int32_t>& ids) const {
  std::string repaired;
  if (valid_utf8_prefix(text) != text.size()) {
    repaired = repair_utf8(text);
    text = repaired;
  }
  const BorrowedCache cache(impl_->caches);
  if (special == SpecialTokens::kAsText) return impl_->encode_plain(text, *cache, ids);
  const auto token = [&](int32_t id) { ids.push_back(id); };
  split_at_tokens(impl_->first_pass, text, token, [&](std::string_view gap) {
    split_at_tokens(impl_->second_pass, gap, token,
                    [&](std::string_view plain) { impl_->encode_plain(plain, *cache, ids); });
  });
}

void Tokenizer::take_caches() const { impl_->caches.fill(); }

std::vector<int32_t> Tokenizer::encode(std::string_view text,
                                       std::span<const TextRange> as_text) const {
  HADAL_INPUT_CHECK(valid_utf8_prefix(text) == text.size(),
                    "tokenizer: a prompt with invalid UTF-8 at byte ", valid_utf8_prefix(text));
  const BorrowedCache cache(impl_->caches);
  std::vector<int32_t> ids;
  size_t done = 0;  // everything before is encoded
  // Tokens are looked for between the ranges only; what lies between two tokens is encoded in one
  // go, so that the ranges leave no other trace.
  const auto token_at = [&](size_t pos, size_t length, int32_t id) {
    if (pos > done) impl_->encode_plain(text.substr(done, pos - done), *cache, ids);
    ids.push_back(id);
    done = pos + length;
  };
  const auto search = [&](size_t begin, size_t end) {
    const auto position = [&](std::string_view part) {
      return static_cast<size_t>(part.data() - text.data());
    };
    size_t at = begin;  // where the next gap or token of the first pass begins
    split_at_tokens(
        impl_->first_pass, text.substr(begin, end - begin),
        [&](int32_t id) {
          const size_t length = impl_->file.bytes[static_cast<size_t>(id)].size();
          token_at(at, length, id);
          at += length;
        },
        [&](std::string_view gap) {
          size_t inner = position(gap);
          at = inner + gap.size();
          split_at_tokens(
              impl_->second_pass, gap,
              [&](int32_t id) {
                const size_t length = impl_->file.bytes[static_cast<size_t>(id)].size();
                token_at(inner, length, id);
                inner += length;
              },
              [&](std::string_view plain) { inner = position(plain) + plain.size(); });
        });
  };
  size_t begin = 0;
  for (const TextRange& range : as_text) {
    HADAL_CHECK(begin <= range.begin && range.begin <= range.end && range.end <= text.size(),
                "tokenizer: range ", range.begin, " to ", range.end, " in a text of ", text.size());
    search(begin, range.begin);
    begin = range.end;
  }
  search(begin, text.size());
  if (done < text.size()) impl_->encode_plain(text.substr(done), *cache, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string bytes;
  for (const int32_t id : ids) bytes += token_bytes(id);
  return valid_utf8_prefix(bytes) == bytes.size() ? bytes : repair_utf8(bytes);
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
  return impl_->file.bytes[impl_->checked(id)];
}

const std::string& Tokenizer::token_name(int32_t id) const {
  return impl_->file.names[impl_->checked(id)];
}

std::optional<int32_t> Tokenizer::find(std::string_view token) const {
  const auto found = impl_->ids.find(token);
  if (found == impl_->ids.end()) return std::nullopt;
  return found->second;
}

int32_t Tokenizer::id_of(std::string_view token) const {
  const std::optional<int32_t> id = find(token);
  HADAL_INPUT_CHECK(id.has_value(), "tokenizer: the vocabulary has no token '", token, "'");
  return *id;
}

bool Tokenizer::is_added(int32_t id) const { return impl_->added[impl_->checked(id)]; }

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->file.names.size()); }

}  // namespace hadal::text
