#include "schema_cases.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <regex>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/check.h"

namespace hadal::testing {
namespace {

using nlohmann::json;

class Generator {
 public:
  explicit Generator(std::mt19937_64& random) : random_(random) {}

  /// `markup`: its names can stand in the markup of tool calls.
  json object(int depth, bool markup = false) {
    static const std::vector<std::string> names = {
        "name",      "age",  "tags", "size_2", "is-on", "q", "gr\u00f6\u00dfe",
        "two words", "Kind", "\"x\""};
    json properties = json::object(), required = json::array();
    const int64_t known = std::ssize(names) - (markup ? 1 : 0);
    const int64_t first = below(known), count = 1 + below(4);
    for (int64_t i = 0; i < count; ++i) {
      const std::string& name = names[static_cast<size_t>((first + i) % known)];
      properties[name] = any(depth - 1);
      if (below(10) < 7) required.push_back(name);
    }
    json schema{{"type", "object"}, {"properties", properties}, {"additionalProperties", false}};
    if (!required.empty()) schema["required"] = required;
    return schema;
  }

  json any(int depth) {
    const int64_t kind = below(depth > 0 ? 12 : 8);
    // Every leaf costs; what is left decides how rich the rest may be.
    if (--leaves_ < 0) return {{"type", "boolean"}};
    switch (kind) {
      case 0:
        return {{"type", below(2) == 0 ? "boolean" : "null"}};
      case 1:
        return integer();
      case 2:
        return number();
      case 3:
        return string();
      case 4:
        return {{"type", "string"}, {"pattern", pattern()}};
      case 5:
        return {{"enum", {"red", "gr\u00fcn", 3, nullptr, -2.5, "\U0001F600 \"q\"", false}}};
      case 6: {
        static const std::vector<json> values = {"a\\b\n", 17, json{{"fixed", {1, "two"}}}, true,
                                                 json::array()};
        return {{"const", values[static_cast<size_t>(below(std::ssize(values)))]}};
      }
      case 7:
        return {{"type", {"string", "null"}}, {"maxLength", 1 + below(10)}};
      case 8:
      case 9: {
        const int64_t least = below(3);
        return {{"type", "array"},
                {"items", any(depth - 1)},
                {"minItems", least},
                {"maxItems", least + below(3)}};
      }
      case 10:
        return {{"anyOf", {any(depth - 1), any(depth - 1)}}};
      default:
        return object(depth);
    }
  }

 private:
  int64_t below(int64_t count) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(count));
  }
  json integer() {
    const int64_t least = below(4000) - 2000;
    json schema{{"type", "integer"}};
    schema[below(3) == 0 ? "exclusiveMinimum" : "minimum"] = least;
    schema[below(3) == 0 ? "exclusiveMaximum" : "maximum"] = least + 2 + below(100'000);
    return schema;
  }
  json number() {
    const double least = static_cast<double>(below(4000) - 2000) / 8;
    json schema{{"type", "number"}};
    schema[below(3) == 0 ? "exclusiveMinimum" : "minimum"] = least;
    schema[below(3) == 0 ? "exclusiveMaximum" : "maximum"] =
        least + 1 + static_cast<double>(below(8000)) / 8;
    return schema;
  }
  json string() {
    const int64_t least = below(4);
    json schema{{"type", "string"}, {"maxLength", least + 1 + below(16)}};
    if (least > 0) schema["minLength"] = least;
    return schema;
  }
  std::string pattern() {
    static const std::array<const char*, 5> patterns = {
        "^[a-c]{2,4}(-[0-9]{1,3})?$", "^(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]$",
        "^[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8}){0,2}$", "^#[0-9a-f]{6}$", "^(yes|no|maybe)$"};
    return patterns[static_cast<size_t>(below(std::ssize(patterns)))];
  }

  std::mt19937_64& random_;
  int leaves_ = 14;
};

bool has_type(const json& value, const std::string& type) {
  if (type == "integer") {
    return value.is_number_integer() ||
           (value.is_number_float() && std::floor(value.get<double>()) == value.get<double>());
  }
  if (type == "number") return value.is_number();
  if (type == "null") return value.is_null();
  if (type == "boolean") return value.is_boolean();
  if (type == "string") return value.is_string();
  if (type == "array") return value.is_array();
  HADAL_CHECK(type == "object", "schema: type ", type);
  return value.is_object();
}

int64_t characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

/// One keyword, in the words of the specification: those for other types hold.
bool keyword_holds(const json& value, const std::string& key, const json& rule, const json& all) {
  if (key == "type") {
    if (rule.is_string()) return has_type(value, rule.get<std::string>());
    return std::any_of(rule.begin(), rule.end(),
                       [&](const json& one) { return has_type(value, one.get<std::string>()); });
  }
  if (key == "const") return value == rule;
  if (key == "enum") return std::find(rule.begin(), rule.end(), value) != rule.end();
  if (key == "anyOf") {
    return std::any_of(rule.begin(), rule.end(),
                       [&](const json& one) { return validates(value, one); });
  }
  if (key == "minimum") return !value.is_number() || value >= rule;
  if (key == "maximum") return !value.is_number() || value <= rule;
  if (key == "exclusiveMinimum") return !value.is_number() || value > rule;
  if (key == "exclusiveMaximum") return !value.is_number() || value < rule;
  if (key == "minLength")
    return !value.is_string() || characters(value.get<std::string>()) >= rule.get<int64_t>();
  if (key == "maxLength")
    return !value.is_string() || characters(value.get<std::string>()) <= rule.get<int64_t>();
  if (key == "pattern") {
    return !value.is_string() ||
           std::regex_search(value.get<std::string>(), std::regex(rule.get<std::string>()));
  }
  if (key == "minItems") return !value.is_array() || std::ssize(value) >= rule.get<int64_t>();
  if (key == "maxItems") return !value.is_array() || std::ssize(value) <= rule.get<int64_t>();
  if (key == "items") {
    return !value.is_array() || std::all_of(value.begin(), value.end(),
                                            [&](const json& one) { return validates(one, rule); });
  }
  if (key == "required") {
    return !value.is_object() || std::all_of(rule.begin(), rule.end(), [&](const json& name) {
      return value.contains(name.get<std::string>());
    });
  }
  if (key == "properties") {
    if (!value.is_object()) return true;
    const auto items = value.items();
    return std::all_of(items.begin(), items.end(), [&](const auto& member) {
      return !rule.contains(member.key()) || validates(member.value(), rule[member.key()]);
    });
  }
  HADAL_CHECK(key == "additionalProperties" && rule == false, "schema: keyword ", key);
  if (!value.is_object()) return true;
  const auto items = value.items();
  return std::all_of(items.begin(), items.end(), [&](const auto& member) {
    return all.contains("properties") && all["properties"].contains(member.key());
  });
}

}  // namespace

json random_schema(std::mt19937_64& random, bool root_object) {
  Generator generator(random);
  if (root_object) return generator.object(3, true);
  return random() % 4 != 0 ? generator.object(3) : generator.any(3);
}

bool validates(const json& value, const json& schema) {
  const auto items = schema.items();
  return std::all_of(items.begin(), items.end(), [&](const auto& rule) {
    return keyword_holds(value, rule.key(), rule.value(), schema);
  });
}

}  // namespace hadal::testing
