// Errors: what a broken contract or a bad input throws, and the checks that throw it.
//
// HADAL_CHECK guards contracts between pieces of code and is always on; its message starts with the
// op or unit and ends with the values. InputError is for what people and files bring (flags, JSON,
// weights): it names what, where, expected and found, and carries no source location.
#pragma once

#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>

namespace hadal {

/// A broken contract. what() ends with the file and line that found it.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message,
                 std::source_location where = std::source_location::current());

 protected:
  struct Verbatim {};
  Error(Verbatim, const std::string& message) : std::runtime_error(message) {}
};

/// Bad input from outside: a file, a flag, a request. The program's exit code for it is 2.
class InputError : public Error {
 public:
  explicit InputError(const std::string& message) : Error(Verbatim{}, message) {}
};

/// Joins anything that can be streamed into one string.
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace hadal

#define HADAL_CHECK(condition, ...)                       \
  do {                                                    \
    if (!(condition)) [[unlikely]]                        \
      throw ::hadal::Error(::hadal::concat(__VA_ARGS__)); \
  } while (false)

#define HADAL_INPUT_CHECK(condition, ...)                      \
  do {                                                         \
    if (!(condition)) [[unlikely]]                             \
      throw ::hadal::InputError(::hadal::concat(__VA_ARGS__)); \
  } while (false)

#ifdef NDEBUG
#define HADAL_DCHECK(condition, ...) static_cast<void>(0)
#else
#define HADAL_DCHECK(condition, ...) HADAL_CHECK(condition, __VA_ARGS__)
#endif
