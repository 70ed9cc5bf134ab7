// A mutator for fuzz targets whose inputs are JSON: most of what it makes is JSON again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace hadal::testing {

/// What the mutator puts into texts: member names, and values as JSON.
struct JsonPool {
  std::span<const std::string_view> keys, values;
};

/// As LLVMFuzzerCustomMutator: changes the text in `data` and returns its new size.
size_t mutate_json(
    uint8_t* data, size_t size, size_t max_size, unsigned seed, const JsonPool& pool);

}  // namespace hadal::testing
