#include <algorithm>

#include "ops/attention/attn_lists_sm90.h"

namespace hadal::ops {

void attn_lists_twin(const AttnListsSm90Params& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    const int64_t own = p.pos[token], seq = p.seq[token], first_row = p.first_row[seq],
                  start = p.pos[first_row];
    const int64_t places = attn_window_places(p.window);
    int32_t* window = p.window_row + token * places;
    std::fill(window, window + places, -1);
    for (int64_t pos = std::max<int64_t>(own - p.window + 1, 0); pos <= own; ++pos) {
      window[pos % p.window] = static_cast<int32_t>(pos >= start && p.step_row >= 0
                                                        ? p.step_row + first_row + pos - start
                                                        : p.ring_row + p.ring.row(seq, pos));
    }
    const int64_t visible = p.ratio == 0 ? 0 : (own + 1) / p.ratio;
    const int64_t most = std::min(visible, p.block_places);
    p.num_blocks[token] = static_cast<int32_t>(most);
    for (int64_t place = 0; place < p.block_places; ++place) {
      int64_t block = place < most ? place : -1;
      if (block >= 0 && p.selection != nullptr) block = p.selection[token * p.block_places + place];
      p.block_row[token * p.block_places + place] =
          static_cast<int32_t>(block < 0 ? -1 : p.blocks.row(seq, block));
    }
  }
}

}  // namespace hadal::ops
