#include "engine_core/grammar/grammar_schema.h"

#include <algorithm>
#include <array>
#include <cmath>

#include <nlohmann/json.hpp>

#include "base/check.h"

namespace hadal::engine_core {
namespace {

using nlohmann::json;

constexpr int kMaxNesting = 100;        ///< of brackets
constexpr int64_t kMaxRepeat = 10'000;  ///< largest count in {m,n} and in a schema's bounds

template <size_t Size>
bool among(std::string_view key, const std::array<std::string_view, Size>& keys) {
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

/// Restrict an answer and would be left out.
constexpr std::array<std::string_view, 14> kUnsupported = {"not",
                                                           "if",
                                                           "then",
                                                           "else",
                                                           "dependentRequired",
                                                           "dependentSchemas",
                                                           "dependencies",
                                                           "contains",
                                                           "minContains",
                                                           "maxContains",
                                                           "$dynamicRef",
                                                           "$recursiveRef",
                                                           "additionalItems",
                                                           "unevaluatedItems"};
/// Say nothing about values.
constexpr std::array<std::string_view, 17> kAnnotations = {
    "title",    "description", "default",  "examples", "example",     "$comment",
    "$schema",  "$id",         "$anchor",  "$defs",    "definitions", "deprecated",
    "readOnly", "writeOnly",   "nullable", "strict",   "format"};
/// Each decides alone: beside it, xgrammar reads nothing else.
constexpr std::array<std::string_view, 6> kDeciding = {"$ref",  "const", "enum",
                                                       "anyOf", "oneOf", "allOf"};
constexpr std::array<std::string_view, 6> kBounds = {"minLength", "maxLength",     "minItems",
                                                     "maxItems",  "minProperties", "maxProperties"};

bool has_type(const json& value, const std::string& type) {
  if (type == "integer") return value.is_number_integer();
  if (type == "number") return value.is_number();
  return (type == "string" && value.is_string()) || (type == "boolean" && value.is_boolean()) ||
         (type == "null" && value.is_null()) || (type == "array" && value.is_array()) ||
         (type == "object" && value.is_object());
}

/// The type beside const or enum, which is not enforced, must hold anyway.
void check_values(const json& schema, const std::string& where) {
  if (!schema.contains("type")) return;
  const json& type = schema["type"];
  const auto fits = [&](const json& value) {
    if (type.is_string()) return has_type(value, type.get<std::string>());
    return std::any_of(type.begin(), type.end(), [&](const json& one) {
      return one.is_string() && has_type(value, one.get<std::string>());
    });
  };
  const bool good = schema.contains("const")
                        ? fits(schema["const"])
                        : schema["enum"].is_array() &&
                              std::all_of(schema["enum"].begin(), schema["enum"].end(), fits);
  HADAL_INPUT_CHECK(good, where, ": a value is not of type ", type.dump());
}

void check_deciding(const json& schema, const std::string& key, const std::string& where) {
  const bool values = key == "const" || key == "enum";
  for (const auto& [other, value] : schema.items()) {
    const bool fine = other == key || among(other, kAnnotations) || (values && other == "type");
    HADAL_INPUT_CHECK(fine, where, ": ", other, " beside ", key, " is not supported");
  }
  if (values) check_values(schema, where);
  if (key == "allOf") {
    HADAL_INPUT_CHECK(schema[key].is_array() && schema[key].size() == 1, where,
                      ": allOf is supported with one schema only");
  }
}

/// A bound that xgrammar reads with a type only, or with what implies one.
void check_typed(const json& schema, const std::string& where) {
  static constexpr std::array<std::string_view, 2> array_bounds = {"minItems", "maxItems"};
  static constexpr std::array<std::string_view, 4> object_bounds = {
      "minProperties", "maxProperties", "propertyNames", "patternProperties"};
  static constexpr std::array<std::string_view, 8> value_bounds = {
      "minLength", "maxLength",        "pattern",          "minimum",
      "maximum",   "exclusiveMinimum", "exclusiveMaximum", "multipleOf"};
  if (schema.contains("type")) return;
  const bool is_array = schema.contains("items") || schema.contains("prefixItems");
  const bool is_object = schema.contains("properties") || schema.contains("additionalProperties");
  for (const auto& [key, value] : schema.items()) {
    const bool lost = among(key, value_bounds) || (!is_array && among(key, array_bounds)) ||
                      (!is_object && among(key, object_bounds));
    HADAL_INPUT_CHECK(!lost, where, ": ", key, " without type is not supported");
  }
}

void check_object(const json& schema, const std::string& where) {
  for (const auto& name : schema.value("required", json::array())) {
    HADAL_INPUT_CHECK(name.is_string() && schema.contains("properties") &&
                          schema["properties"].contains(name.get<std::string>()),
                      where, ": required names ", name.dump(), ", which is not in properties");
  }
  HADAL_INPUT_CHECK(!schema.contains("patternProperties") ||
                        (!schema.contains("properties") && !schema.contains("propertyNames")),
                    where, ": patternProperties beside properties is not supported");
}

void check_lengths(const json& schema, const std::string& where) {
  if (!schema.contains("minLength") || !schema.contains("maxLength")) return;
  HADAL_INPUT_CHECK(schema["minLength"] <= schema["maxLength"], where, ": minLength is ",
                    schema["minLength"].dump(), ", above maxLength, ", schema["maxLength"].dump());
}

void check_keyword(const std::string& key, const json& value, const std::string& where) {
  HADAL_INPUT_CHECK(!among(key, kUnsupported), where, ": ", key, " is not supported");
  HADAL_INPUT_CHECK(key != "uniqueItems" || value == false, where,
                    ": uniqueItems is not supported");
  if (among(key, kBounds)) {
    const double bound = value.is_number() ? value.get<double>() : -1;
    const bool good =
        bound >= 0 && bound <= static_cast<double>(kMaxRepeat) && bound == std::floor(bound);
    HADAL_INPUT_CHECK(good, where, ": ", key, " is ", value.dump(),
                      ", expected a whole number, 0 to ", kMaxRepeat);
  }
  if (key == "pattern" && value.is_string()) {
    check_pattern(value.get_ref<const std::string&>(), where + ": pattern");
  }
}

/// The schemas that a keyword holds.
void check_below(const std::string& key, const json& value, const std::string& where) {
  static constexpr std::array<std::string_view, 4> maps = {"properties", "patternProperties",
                                                           "$defs", "definitions"};
  static constexpr std::array<std::string_view, 8> schemas = {"items",
                                                              "prefixItems",
                                                              "additionalProperties",
                                                              "unevaluatedProperties",
                                                              "propertyNames",
                                                              "anyOf",
                                                              "oneOf",
                                                              "allOf"};
  const std::string here = concat(where, ".", key);
  if (among(key, maps) && value.is_object()) {
    for (const auto& [name, schema] : value.items()) {
      if (key == "patternProperties") check_pattern(name, here);
      check_schema(schema, concat(here, ".", name));
    }
  }
  if (!among(key, schemas)) return;
  if (value.is_array()) {
    for (const auto& schema : value) check_schema(schema, here);
  } else if (key == "propertyNames" && value.is_object() && !value.contains("type")) {
    json named = value;
    named["type"] = "string";
    check_schema(named, here);
  } else {
    check_schema(value, here);
  }
}

}  // namespace

void check_pattern(std::string_view text, const std::string& where) {
  int depth = 0;
  for (size_t pos = 0; pos < text.size(); ++pos) {
    const char c = text[pos];
    if (c == '\\') {
      ++pos;
    } else if (c == '(') {
      HADAL_INPUT_CHECK(++depth <= kMaxNesting, where, ": more than ", kMaxNesting,
                        " nested brackets");
    } else if (c == ')') {
      depth = std::max(depth - 1, 0);
    } else if (c >= '0' && c <= '9') {
      // Outside {m,n} a large number is refused too: it is rare, and what is a count is the
      // parser's to say.
      int64_t count = 0;
      for (; pos < text.size() && text[pos] >= '0' && text[pos] <= '9'; ++pos) {
        count = std::min<int64_t>(count * 10 + (text[pos] - '0'), kMaxRepeat * 10);
      }
      const bool ends_count = pos < text.size() && (text[pos] == ',' || text[pos] == '}');
      HADAL_INPUT_CHECK(!ends_count || count <= kMaxRepeat, where, ": a repetition of more than ",
                        kMaxRepeat);
      --pos;
    }
  }
}

void check_schema(const json& schema, const std::string& where) {
  HADAL_INPUT_CHECK(schema.is_object() || schema.is_boolean(), where, ": a schema is ",
                    schema.type_name(), ", expected an object");
  if (!schema.is_object()) return;
  for (const auto& [key, value] : schema.items()) {
    check_keyword(key, value, where);
    check_below(key, value, where);
  }
  check_lengths(schema, where);
  for (const std::string_view key : kDeciding) {
    if (!schema.contains(key)) continue;
    check_deciding(schema, std::string(key), where);
    return;
  }
  check_typed(schema, where);
  check_object(schema, where);
}

}  // namespace hadal::engine_core
