// A name for the weights of a checkpoint, for caches that outlive a process.
#pragma once

#include <string>

namespace hadal::checkpoint {

/// 32 hexadecimal digits from config.json and every safetensors file of the folder: all bytes of
/// files up to 1 GiB; of larger ones the size, the first 16 MiB (with the header) and 1 MiB out of
/// every 64. The same weights in other files have another digest. Errors: InputError for what
/// cannot be read.
std::string weights_digest(const std::string& folder);

}  // namespace hadal::checkpoint
