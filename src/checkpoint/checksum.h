// Checksums of stored bytes: XXH3, 64 bits. They find damage, not forgery.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace hadal::checkpoint {

uint64_t checksum(std::span<const std::byte> bytes);

/// 16 hexadecimal digits.
std::string checksum_text(uint64_t value);

}  // namespace hadal::checkpoint
