// The keys of one query for the CPU kernel (attention_cpu.h). Private to this folder.
#pragma once

#include <cstdint>
#include <vector>

#include <c10/util/SmallVector.h>

#include "ops/attention/attention_cpu.h"

namespace hadal::ops {

/// The keys of one query in fold order, as pointers; reused from token to token.
class KeyList {
 public:
  void clear() {
    rows_.clear();
    packed_.clear();
    ends_.clear();
  }
  void add(const void* row, bool packed) {
    rows_.push_back(row);
    packed_.push_back(packed);
  }
  void end_chunk() {
    const auto count = static_cast<int32_t>(rows_.size());
    if (count > (ends_.empty() ? 0 : ends_.back())) ends_.push_back(count);
  }
  AttentionKeysCpu view() const {
    return {.rows = rows_.data(),
            .packed = packed_.data(),
            .chunk_ends = ends_.data(),
            .num_chunks = static_cast<int32_t>(ends_.size())};
  }

 private:
  std::vector<const void*> rows_;
  c10::SmallVector<bool, 512> packed_;  // std::vector<bool> holds no bools
  std::vector<int32_t> ends_;
};

}  // namespace hadal::ops
