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

/// The records that every event file begins with: the version, and the start of a session at step
/// 0, which makes a running TensorBoard forget what an earlier file of the folder said.
std::string event_file_head(double wall_time);
/// A record with these scalars of one step.
std::string scalar_event(double wall_time, int64_t step, const Scalars& scalars);

/// A name that sorts behind those of earlier files: `events.out.tfevents.<seconds>.hadal`.
std::string event_file_name(int64_t seconds);
/// The event files of a folder by name.
std::vector<std::string> event_files(const std::string& folder);

}  // namespace hadal
