// JSON for configurations and reports: strict reading into structs, and writing.
//
// A JsonObject is a view of one object of a parsed document. Every getter checks type and range,
// and its InputError starts with the origin and the dotted path of the key ("config.json:
// rope_scaling.factor: ..."). A document with duplicate keys, trailing text or more than 64 levels
// is refused. The object remembers which keys were asked for, so that unknown ones can be listed or
// refused at the end. Views share the document and may outlive each other.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace hadal {

/// Parses a document. Duplicate keys are InputErrors; `origin` names the source in messages.
std::shared_ptr<const nlohmann::json> parse_json(std::string_view text, const std::string& origin);

class JsonObject {
 public:
  static JsonObject parse(std::string_view text, const std::string& origin);
  static JsonObject load(const std::string& path);

  /// Present and not null. Counts as asking.
  bool has(const std::string& key) const;

  /// Required values: an InputError when the key is absent, null, of another type or outside [min,
  /// max]. An integer may be written as a number without fraction (1e6, 128.0).
  int64_t integer(const std::string& key, int64_t min, int64_t max) const;
  double number(const std::string& key,
                double min = -std::numeric_limits<double>::max(),
                double max = std::numeric_limits<double>::max()) const;
  bool boolean(const std::string& key) const;
  std::string string(const std::string& key) const;
  std::vector<int64_t> integers(const std::string& key, int64_t min, int64_t max) const;
  std::vector<double> numbers(const std::string& key) const;
  std::vector<std::string> strings(const std::string& key) const;
  JsonObject object(const std::string& key) const;
  std::vector<JsonObject> objects(const std::string& key) const;

  /// The same with a default for an absent or null key.
  int64_t integer_or(const std::string& key, int64_t fallback, int64_t min, int64_t max) const;
  double number_or(const std::string& key,
                   double fallback,
                   double min = -std::numeric_limits<double>::max(),
                   double max = std::numeric_limits<double>::max()) const;
  bool boolean_or(const std::string& key, bool fallback) const;
  std::string string_or(const std::string& key, const std::string& fallback) const;

  std::vector<std::string> keys() const;
  /// Keys nobody asked for, as dotted paths, in alphabetical order.
  std::vector<std::string> unread_keys() const;
  /// An InputError that lists the keys nobody asked for, if there are any.
  void expect_all_read() const;
  /// "origin: path.key": how messages about a key begin.
  std::string where(const std::string& key) const;

 private:
  JsonObject(std::shared_ptr<const nlohmann::json> document,
             const nlohmann::json* value,
             std::string origin,
             std::string path);
  const nlohmann::json& at(const std::string& key) const;

  std::shared_ptr<const nlohmann::json> document_;
  const nlohmann::json* value_;
  std::string origin_, path_;
  std::shared_ptr<std::set<std::string>> read_;  ///< shared by copies of this view
};

/// Writes JSON in the order of the calls, two spaces a level; numbers so that reading gives the
/// same value.
class JsonWriter {
 public:
  JsonWriter& begin_object();
  JsonWriter& end_object();
  JsonWriter& begin_array();
  JsonWriter& end_array();
  JsonWriter& key(std::string_view name);
  JsonWriter& value(int64_t number);
  JsonWriter& value(int number) { return value(static_cast<int64_t>(number)); }
  /// Non-finite numbers become null.
  JsonWriter& value(double number);
  JsonWriter& value(bool flag);
  JsonWriter& value(std::string_view text);
  JsonWriter& value(const char* text) { return value(std::string_view(text)); }
  /// An array on one line.
  JsonWriter& value(const std::vector<int64_t>& numbers);
  template <typename T>
  JsonWriter& field(std::string_view name, const T& content) {
    return key(name).value(content);
  }
  /// The document, with a newline at its end; every object and array must be closed.
  std::string str() const;

 private:
  void separate();

  std::string text_;
  std::vector<bool> has_items_;  ///< one a level that is open
  bool after_key_ = false;
};

/// A JSON string literal with its quotes; invalid UTF-8 becomes U+FFFD.
std::string json_quote(std::string_view text);

}  // namespace hadal
