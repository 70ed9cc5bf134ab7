#include "server/json_reader.h"

#include <charconv>
#include <cmath>

namespace hadal::server {
namespace {

/// Counts what parsing would build before anything is built.
void check_size(std::string_view body, const ServerOptions& options) {
  int depth = 0;
  size_t values = 1;
  bool in_string = false;
  for (size_t i = 0; i < body.size(); ++i) {
    const char c = body[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
      continue;
    }
    if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      ++values;
      if (++depth > options.max_json_depth)
        throw RequestError(400, concat("the body: JSON nested more than ", options.max_json_depth,
                                       " levels deep"));
    } else if (c == ']' || c == '}') {
      --depth;
    } else if (c == ',') {
      ++values;
    }
  }
  if (values > options.max_json_values)
    throw RequestError(400,
                       concat("the body: more than ", options.max_json_values, " JSON values"));
}

std::string shown(const text::PyJson& value) {
  if (value.is_array() || value.is_object()) return value.kind_name();
  std::string text = value.dump();
  if (text.size() > 60) return value.kind_name();
  return concat(value.kind_name(), " ", text);
}

}  // namespace

text::PyJson parse_body(std::string_view body, const ServerOptions& options) {
  check_size(body, options);
  try {
    text::PyJson value = text::PyJson::parse(body, "the body", text::PyJson::Keys::kOnce);
    if (!value.is_object())
      throw RequestError(400, concat("the body is ", value.kind_name(), ", expected an object"));
    return value;
  } catch (const RequestError&) {
    throw;
  } catch (const InputError& error) {
    throw RequestError(400, error.what());
  }
}

std::optional<double> number_of(const text::PyJson& value) {
  using Kind = text::PyJson::Kind;
  if (value.kind() != Kind::kInteger && value.kind() != Kind::kFloat) return {};
  const std::string text = value.kind() == Kind::kInteger ? value.text() : value.dump();
  double result = 0;
  const auto end = std::from_chars(text.data(), text.data() + text.size(), result);
  if (end.ec != std::errc() || end.ptr != text.data() + text.size() || !std::isfinite(result))
    return {};
  return result;
}

std::optional<int64_t> integer_of(const text::PyJson& value) {
  if (value.kind() == text::PyJson::Kind::kInteger) {
    int64_t result = 0;
    const std::string& text = value.text();
    const auto end = std::from_chars(text.data(), text.data() + text.size(), result);
    if (end.ec != std::errc() || end.ptr != text.data() + text.size()) return {};
    return result;
  }
  const auto number = number_of(value);
  if (!number || std::abs(*number) > 9007199254740992.0 || std::trunc(*number) != *number)
    return {};
  return static_cast<int64_t>(*number);
}

Fields::Fields(const text::PyJson& object, std::string path)
    : object_(&object), path_(std::move(path)) {
  if (!object.is_object())
    throw RequestError(400, concat(path_, ": expected an object, found ", shown(object)), path_);
}

std::string Fields::path(std::string_view key) const {
  return path_.empty() ? std::string(key) : concat(path_, ".", key);
}

void Fields::fail(std::string_view key, std::string_view problem) const {
  const std::string where = path(key);
  throw RequestError(400, concat(where, ": ", problem), where);
}

std::string Fields::string(std::string_view key) const {
  const text::PyJson* value = find(key);
  if (value == nullptr) fail(key, "expected a string, found nothing");
  if (!value->is_string()) fail(key, concat("expected a string, found ", shown(*value)));
  return value->text();
}
std::string Fields::string_or(std::string_view key, std::string_view fallback) const {
  return has(key) ? string(key) : std::string(fallback);
}
bool Fields::boolean_or(std::string_view key, bool fallback) const {
  const text::PyJson* value = find(key);
  if (value == nullptr) return fallback;
  if (value->kind() != text::PyJson::Kind::kBool)
    fail(key, concat("expected true or false, found ", shown(*value)));
  return value->truthy();
}
int64_t Fields::integer_or(std::string_view key, int64_t fallback, int64_t min, int64_t max) const {
  const text::PyJson* value = find(key);
  if (value == nullptr) return fallback;
  const auto number = integer_of(*value);
  if (!number || *number < min || *number > max)
    fail(key, concat("expected an integer from ", min, " to ", max, ", found ", shown(*value)));
  return *number;
}
double Fields::number_or(std::string_view key, double fallback, double min, double max) const {
  const text::PyJson* value = find(key);
  if (value == nullptr) return fallback;
  const auto number = number_of(*value);
  if (!number || *number < min || *number > max)
    fail(key, concat("expected a number from ", min, " to ", max, ", found ", shown(*value)));
  return *number;
}
const text::PyJson* Fields::object_or_null(std::string_view key) const {
  const text::PyJson* value = find(key);
  if (value != nullptr && !value->is_object())
    fail(key, concat("expected an object, found ", shown(*value)));
  return value;
}
const text::PyJson* Fields::array_or_null(std::string_view key) const {
  const text::PyJson* value = find(key);
  if (value != nullptr && !value->is_array())
    fail(key, concat("expected an array, found ", shown(*value)));
  return value;
}
Fields Fields::object(std::string_view key) const {
  const text::PyJson* value = object_or_null(key);
  if (value == nullptr) fail(key, "expected an object, found nothing");
  return {*value, path(key)};
}

}  // namespace hadal::server
