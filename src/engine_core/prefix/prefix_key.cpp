#include "engine_core/prefix/prefix_key.h"

#include <algorithm>
#include <bit>
#include <openssl/evp.h>
#include <string>

#include "base/check.h"

namespace hadal::engine_core {
namespace {

static_assert(std::endian::native == std::endian::little, "digests are of little-endian integers");

constexpr size_t kMaxChains = 64;
constexpr size_t kMaxTokens = size_t{4} << 20;  // 32 MiB over all chains but the newest

PrefixDigest sha256(const void* data, size_t size) {
  PrefixDigest digest;
  unsigned int length = 0;
  const int done = EVP_Digest(data, size, reinterpret_cast<unsigned char*>(digest.data()), &length,
                              EVP_sha256(), nullptr);
  HADAL_CHECK(done == 1 && length == digest.size(), "prefix_key: SHA-256 failed");
  return digest;
}

}  // namespace

PrefixDigest text_digest(std::string_view name) {
  const std::string text = concat("hadal text 1\n", name);
  return sha256(text.data(), text.size());
}

PrefixKeys::PrefixKeys(std::string_view identity, int64_t page_tokens) : page_tokens_(page_tokens) {
  HADAL_CHECK(page_tokens > 0, "prefix_key: page_tokens ", page_tokens);
  set_identity(identity);
}

void PrefixKeys::set_identity(std::string_view identity) {
  const std::string text = concat("hadal prefix 1\n", page_tokens_, '\n', identity);
  const std::lock_guard lock(mutex_);
  root_ = sha256(text.data(), text.size());
  recent_.clear();
}

std::vector<PrefixDigest> PrefixKeys::chain(std::span<const int64_t> tokens) {
  const size_t pages = tokens.size() / static_cast<size_t>(page_tokens_);
  if (pages == 0) return {};
  const std::lock_guard lock(mutex_);
  const std::vector<PrefixDigest>& digests = extend(tokens).digests;
  return {digests.begin(), digests.begin() + static_cast<std::ptrdiff_t>(pages)};
}

PrefixDigest PrefixKeys::last(std::span<const int64_t> tokens, PrefixDigest* before) {
  const size_t pages = tokens.size() / static_cast<size_t>(page_tokens_);
  HADAL_CHECK(pages > 0, "prefix_key: ", tokens.size(), " tokens are no whole page");
  const std::lock_guard lock(mutex_);
  const std::vector<PrefixDigest>& digests = extend(tokens).digests;
  if (before) *before = pages > 1 ? digests[pages - 2] : root_;
  return digests[pages - 1];
}

int64_t PrefixKeys::hashed_pages() const {
  const std::lock_guard lock(mutex_);
  return hashed_pages_;
}

/// A remembered chain that covers all whole pages of `tokens`.
const PrefixKeys::Chain& PrefixKeys::extend(std::span<const int64_t> tokens) {
  const auto page = static_cast<size_t>(page_tokens_);
  tokens = tokens.first(tokens.size() / page * page);
  auto best = recent_.end();
  size_t shared = 0;  // whole pages in common with `best`
  for (auto it = recent_.begin(); it != recent_.end(); ++it) {
    const size_t common = std::min(it->tokens.size(), tokens.size());
    const auto differ = std::mismatch(
        tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(common), it->tokens.begin());
    const size_t pages = static_cast<size_t>(differ.first - tokens.begin()) / page;
    if (pages > shared || (pages == shared && pages == it->digests.size())) {
      best = it;
      shared = pages;
    }
    // All of `tokens`, or all of a chain that lacks little: no other saves more than a hash.
    if (shared * page == tokens.size()) break;
    if (pages == it->digests.size() && tokens.size() - pages * page <= page) break;
  }
  if (best != recent_.end() && (shared == best->digests.size() || shared * page == tokens.size())) {
    recent_.splice(recent_.begin(), recent_, best);  // one continues the other
  } else {
    Chain branch;
    if (best != recent_.end()) {
      branch.tokens.assign(best->tokens.begin(),
                           best->tokens.begin() + static_cast<std::ptrdiff_t>(shared * page));
      branch.digests.assign(best->digests.begin(),
                            best->digests.begin() + static_cast<std::ptrdiff_t>(shared));
    }
    recent_.push_front(std::move(branch));
  }
  Chain& chain = recent_.front();
  std::vector<std::byte> text(sizeof(PrefixDigest) + page * sizeof(int64_t));
  for (size_t begin = chain.tokens.size(); begin < tokens.size(); begin += page) {
    const PrefixDigest& before = chain.digests.empty() ? root_ : chain.digests.back();
    const auto ids = std::as_bytes(tokens.subspan(begin, page));
    std::copy(ids.begin(), ids.end(), std::copy(before.begin(), before.end(), text.begin()));
    chain.digests.push_back(sha256(text.data(), text.size()));
    ++hashed_pages_;
  }
  if (chain.tokens.size() < tokens.size())
    chain.tokens.insert(chain.tokens.end(),
                        tokens.begin() + static_cast<std::ptrdiff_t>(chain.tokens.size()),
                        tokens.end());
  forget_old();
  return chain;
}

void PrefixKeys::forget_old() {
  size_t tokens = 0, chains = 0;
  for (auto it = recent_.begin(); it != recent_.end(); ++chains) {
    tokens += chains == 0 ? 0 : it->tokens.size();
    it = chains >= kMaxChains || tokens > kMaxTokens ? recent_.erase(it) : std::next(it);
  }
}

}  // namespace hadal::engine_core
