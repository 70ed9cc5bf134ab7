#include "engine_core/prefix_store.h"

#include <algorithm>
#include <utility>

namespace hadal::engine_core {

std::optional<StoredPrefix> PrefixStore::load(std::span<const int64_t> tokens,
                                              int64_t from_page,
                                              int64_t max_pos) {
  constexpr int64_t kAtOnce = 64;
  const std::unique_ptr<PrefixLoad> load = begin_load(tokens, from_page, max_pos);
  std::vector<std::vector<std::byte>> pages;
  while (load->advance(kAtOnce, pages)) continue;
  std::optional<StoredPrefix> found = load->take_result();
  if (!found) return std::nullopt;
  const int64_t used = std::max(found->pos / page_tokens() - from_page, int64_t{0});
  pages.resize(static_cast<size_t>(used));
  found->pages = std::move(pages);
  return found;
}

}  // namespace hadal::engine_core
