// Requests' JSON: read strictly, within limits, with errors that name the field.
//
// Values are text::PyJson because parts of requests end in prompts, where numbers and the order of
// keys count. Fields nobody asks for are ignored: clients send more than any server knows.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "server/options.h"
#include "text/python_json.h"

namespace hadal::server {

/// A request that is refused: the status, what to change, and where.
class RequestError : public InputError {
 public:
  RequestError(int status,
               const std::string& message,
               std::string param = "",
               std::string code = "")
      : InputError(message), status_(status), param_(std::move(param)), code_(std::move(code)) {}
  int status() const { return status_; }
  const std::string& param() const { return param_; }
  const std::string& code() const { return code_; }

 private:
  int status_;
  std::string param_, code_;
};

/// Parses a body: an object, of limited depth and number of values, no key twice. Errors:
/// RequestError 400.
text::PyJson parse_body(std::string_view body, const ServerOptions& options);

/// The fields of one object. Null counts as absent. Errors: RequestError 400.
class Fields {
 public:
  /// `path` names the object ("" for the body).
  Fields(const text::PyJson& object, std::string path);

  std::string path(std::string_view key) const;
  const text::PyJson* find(std::string_view key) const { return object_->find_set(key); }
  bool has(std::string_view key) const { return find(key) != nullptr; }

  std::string string(std::string_view key) const;
  std::string string_or(std::string_view key, std::string_view fallback) const;
  bool boolean_or(std::string_view key, bool fallback) const;
  int64_t integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const;
  double number_or(std::string_view key, double fallback, double min, double max) const;
  /// Nullptr when absent.
  const text::PyJson* object_or_null(std::string_view key) const;
  const text::PyJson* array_or_null(std::string_view key) const;
  Fields object(std::string_view key) const;

  [[noreturn]] void fail(std::string_view key, std::string_view problem) const;
  const text::PyJson& json() const { return *object_; }

 private:
  const text::PyJson* object_;
  std::string path_;
};

/// The value of a JSON number; nothing for other kinds.
std::optional<double> number_of(const text::PyJson& value);
std::optional<int64_t> integer_of(const text::PyJson& value);

// Short names for building answers.
using Json = text::PyJson;
using Members = std::vector<text::PyJson::Member>;
inline Json js(std::string_view text) { return Json::string(std::string(text)); }
inline Json js(const char* text) { return Json::string(text); }
inline Json js(const std::string& text) { return Json::string(text); }
inline Json js(int64_t number) { return Json::integer(number); }
inline Json js(double number) { return Json::real(number); }
inline Json js(bool flag) { return Json::boolean(flag); }

}  // namespace hadal::server
