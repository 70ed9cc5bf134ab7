// Reading and writing of whole texts for the text subcommands.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace hadal::apps {

/// All of a file; of standard input if the path is empty or "-". Errors: InputError if it cannot be
/// read.
std::string read_input(const std::string& path);

/// Calls line(text, number from 1) for every line that is not blank, as it is read (same sources).
void for_each_line(const std::string& path,
                   const std::function<void(const std::string& text, long number)>& line);

/// Writes to standard output, nothing added. Errors: InputError if it is closed or full.
void write_output(std::string_view text);

}  // namespace hadal::apps
