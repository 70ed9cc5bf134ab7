// TensorBoard event files with scalars: records in the TFRecord format (length, masked CRC-32C,
// data, masked CRC-32C), each an Event message of protocol buffers.
//
// Readers take whole records only and stop at a torn one, so a file is valid up to its last write.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hadal {

/// CRC-32C (Castagnoli) of the bytes.
uint32_t crc32c(std::string_view bytes);

/// One TFRecord around the data.
std::string tfrecord(std::string_view data);

using Scalars = std::vector<std::pair<std::string, double>>;

/// The records that an event file begins with: the version, and the start of a session at `step`,
/// which makes TensorBoard forget what earlier files say of that step and later ones.
std::string event_file_head(double wall_time, int64_t step);
/// A record with these scalars of one step.
std::string scalar_event(double wall_time, int64_t step, const Scalars& scalars);

/// How many bytes of an event file hold whole records of steps up to `last_step`.
size_t kept_event_bytes(std::string_view file, int64_t last_step);

/// A name that sorts behind those of earlier files: `events.out.tfevents.<seconds>.hadal`.
std::string event_file_name(int64_t seconds);
/// The event files of a folder by name.
std::vector<std::string> event_files(const std::string& folder);

}  // namespace hadal
