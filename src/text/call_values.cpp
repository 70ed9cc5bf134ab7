#include "text/call_values.h"

#include <algorithm>
#include <array>
#include <optional>

#include "base/check.h"

namespace hadal::text {
namespace {

using JsonKind = PyJson::Kind;

constexpr int kMaxSchemaDepth =
    32;  ///< of references and alternatives; beyond it anything is allowed

/// Python reads NaN and infinities, which are no JSON.
bool is_finite_json(const PyJson& value) {
  if (value.kind() == JsonKind::kFloat) {
    const std::string text = value.dump();
    return text != "NaN" && text != "Infinity" && text != "-Infinity";
  }
  return std::all_of(value.items().begin(), value.items().end(), is_finite_json) &&
         std::all_of(value.members().begin(), value.members().end(),
                     [](const PyJson::Member& member) { return is_finite_json(member.second); });
}

std::optional<PyJson> read_json(std::string_view text) {
  try {
    PyJson value = PyJson::parse(text, "value");
    if (is_finite_json(value)) return value;
  } catch (const InputError&) {
    return std::nullopt;  // models write such things
  }
  return std::nullopt;
}

bool is_of_type(const PyJson& value, std::string_view type) {
  switch (value.kind()) {
    case JsonKind::kNull:
      return type == "null";
    case JsonKind::kBool:
      return type == "boolean";
    case JsonKind::kInteger:
      return type == "integer" || type == "number";
    case JsonKind::kFloat:
      return type == "number" || (type == "integer" && value.dump().ends_with(".0"));
    case JsonKind::kString:
      return type == "string";
    case JsonKind::kArray:
      return type == "array";
    case JsonKind::kObject:
      return type == "object";
  }
  return false;
}

const PyJson* resolve(const PyJson& reference, const PyJson& root) {
  if (!reference.is_string() || !reference.text().starts_with("#/")) return nullptr;
  const PyJson* found = &root;
  std::string_view rest = std::string_view(reference.text()).substr(2);
  while (found != nullptr && !rest.empty()) {
    const size_t end = std::min(rest.find('/'), rest.size());
    found = found->find(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return found;
}

/// Whether a schema allows a value of this kind; what is not understood allows anything.
bool allows(const PyJson& schema, const PyJson& root, const PyJson& value, int depth = 0) {
  if (!schema.is_object() || depth > kMaxSchemaDepth) return true;
  if (const PyJson* reference = schema.find("$ref")) {
    const PyJson* target = resolve(*reference, root);
    return target == nullptr || allows(*target, root, value, depth + 1);
  }
  const auto one_allows = [&](const PyJson& one) { return allows(one, root, value, depth + 1); };
  for (const char* key : {"anyOf", "oneOf"}) {
    const PyJson* options = schema.find(key);
    if (options != nullptr && options->is_array() &&
        std::none_of(options->items().begin(), options->items().end(), one_allows))
      return false;
  }
  if (const PyJson* all = schema.find("allOf"); all != nullptr && all->is_array()) {
    if (!std::all_of(all->items().begin(), all->items().end(), one_allows)) return false;
  }
  // Values stand for their types here: what a model should have written is not ours to decide.
  const auto same_type = [&](const PyJson& known) {
    return known.kind() == value.kind() ||
           (known.kind() == JsonKind::kFloat && is_of_type(value, "number"));
  };
  if (const PyJson* known = schema.find("const"); known != nullptr && !same_type(*known))
    return false;
  if (const PyJson* known = schema.find("enum"); known != nullptr && known->is_array()) {
    if (std::none_of(known->items().begin(), known->items().end(), same_type)) return false;
  }
  const PyJson* type = schema.find("type");
  const PyJson* nullable = schema.find("nullable");
  if (nullable != nullptr && nullable->truthy() && value.is_null()) return true;
  if (type == nullptr) return true;
  if (type->is_string()) return is_of_type(value, type->text());
  return !type->is_array() ||
         std::any_of(type->items().begin(), type->items().end(), [&](const PyJson& one) {
           return one.is_string() && is_of_type(value, one.text());
         });
}

const PyJson* property(const PyJson* parameters, std::string_view key) {
  if (parameters == nullptr) return nullptr;
  const PyJson* properties = parameters->find("properties");
  return properties == nullptr ? nullptr : properties->find(key);
}

}  // namespace

bool is_json(std::string_view text) { return read_json(text).has_value(); }

ToolSchemas::ToolSchemas(const PyJson& tools) {
  for (const PyJson& tool : tools.items()) {
    const PyJson* function = tool.find("function");
    const PyJson* name = function == nullptr ? nullptr : function->find("name");
    const PyJson* parameters = function == nullptr ? nullptr : function->find("parameters");
    if (name == nullptr || !name->is_string() || parameters == nullptr) continue;
    if (parameters->is_object()) parameters_.emplace(name->text(), *parameters);
  }
}

const PyJson* ToolSchemas::parameters(std::string_view tool) const {
  const auto found = parameters_.find(tool);
  return found == parameters_.end() ? nullptr : &found->second;
}

bool ToolSchemas::allows_string(std::string_view tool, std::string_view key) const {
  const PyJson* root = parameters(tool);
  const PyJson* schema = property(root, key);
  return schema == nullptr || allows(*schema, *root, PyJson::string(""));
}

bool ToolSchemas::may_wrap(std::string_view tool, std::string_view key) const {
  if (key != "arguments" && key != "input") return false;
  const PyJson* root = parameters(tool);
  return root != nullptr && property(root, key) == nullptr;
}

std::string ToolSchemas::unwrap(std::string_view tool, std::string_view value) const {
  const PyJson* root = parameters(tool);
  const std::optional<PyJson> object = read_json(value);
  if (root == nullptr || !object || !object->is_object()) return {};
  if (const PyJson* required = root->find("required"); required != nullptr) {
    for (const PyJson& name : required->items()) {
      if (name.is_string() && object->find(name.text()) == nullptr) return {};
    }
  }
  const PyJson* others = root->find("additionalProperties");
  const PyJson* properties = root->find("properties");
  const bool open = properties == nullptr || (others != nullptr && others->truthy());
  for (const auto& [key, member] : object->members()) {
    const PyJson* schema = property(root, key);
    if (schema == nullptr ? !open : !allows(*schema, *root, member)) return {};
  }
  return object->dump();
}

std::string ToolSchemas::value(std::string_view tool,
                               std::string_view key,
                               std::string_view text,
                               bool is_string) const {
  if (is_string && allows_string(tool, key)) return quote_json(text);
  const std::optional<PyJson> value = read_json(text);
  if (!is_string) return value ? value->dump() : quote_json(text);
  const PyJson* root = parameters(tool);
  if (!value || !allows(*property(root, key), *root, *value)) return quote_json(text);
  // A number is converted only as it would be written; lists and objects are unmistakable.
  const bool nested = value->is_array() || value->is_object();
  return nested || value->dump() == text ? value->dump() : quote_json(text);
}

}  // namespace hadal::text
