// A tokenizer.json of bytes, the chat tokens and tokens of one's own, for tests that need no data.
#pragma once

#include <string>
#include <vector>

namespace hadal::testing {

/// Ids: 0 BOS, 1 EOS, 2 pad, 3 to 258 the bytes in order, then the chat tokens, then those
/// of `more` that hold the DSML marker (special tokens), then its others (ordinary ones).
std::string byte_tokenizer_json(const std::vector<std::string>& more = {});
/// Its number of ids without `more`.
int64_t byte_tokenizer_size();

}  // namespace hadal::testing
