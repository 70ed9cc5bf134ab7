#include "engine_core/grammar/grammar_tools.h"

#include <algorithm>
#include <array>
#include <set>
#include <variant>
#include <vector>
#include <xgrammar/xgrammar.h>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/json.h"
#include "engine_core/grammar/grammar_ends.h"
#include "engine_core/grammar/grammar_lark.h"
#include "engine_core/grammar/grammar_marker.h"
#include "engine_core/grammar/grammar_pattern.h"
#include "engine_core/grammar/grammar_schema.h"
#include "engine_core/grammar/grammar_vocabulary.h"

namespace hadal::engine_core {
namespace {

constexpr const char* kPrefer = "prefer";

using Json = nlohmann::ordered_json;  // members in the order of the text: models follow it

// The markup, with kMarkerSign for its marker (no literal would separate "\x01" from a letter).
const std::string kOpen = concat("<", kMarkerSign);
const std::string kClose = concat("</", kMarkerSign);
const std::string kBlock = concat("\n\n", kOpen, "tool_calls>\n");
const std::string kBlockEnd = concat(kClose, "tool_calls>");
const std::string kParameterEnd = concat(kClose, "parameter>\n");

Json constant(std::string text) { return {{"type", "const_string"}, {"value", std::move(text)}}; }
Json sequence(std::vector<Json> elements) {
  return {{"type", "sequence"}, {"elements", std::move(elements)}};
}
Json one_of(std::vector<Json> elements) {
  if (elements.size() == 1) return std::move(elements[0]);
  return {{"type", "or"}, {"elements", std::move(elements)}};
}
Json regex(std::string pattern) { return {{"type", "regex"}, {"pattern", std::move(pattern)}}; }

/// JSON text of a schema. No string in it can hold kMarkerSign, a control character.
Json json_value(Json schema) {
  prepare_strings(schema, "tools");
  return {{"type", "json_schema"},
          {"json_schema", std::move(schema)},
          {"any_order", true},
          {"max_whitespace_cnt", kMaxWhitespace}};
}

/// The schema of one parameter together with the definitions it may refer to.
Json with_definitions(Json schema, const Json& root) {
  for (const char* key : {"$defs", "definitions"}) {
    if (root.contains(key) && schema.is_object()) schema[key] = root[key];
  }
  return schema;
}

/// A string as it stands, up to the parameter's end; the markup's marker cannot stand in it.
Json raw_string() {
  return {{"type", "tag"},
          {"begin", ""},
          {"content", {{"type", "any_text"}, {"excludes", {kMarkerSign}}}},
          {"end", kParameterEnd}};
}
Json raw_string(Json content) { return sequence({std::move(content), constant(kParameterEnd)}); }

/// What follows ` string="` for one schema: each way of writing a value, as string or as JSON.
class Values {
 public:
  explicit Values(const Json& root) : root_(root) {}

  Json read(const Json& schema) {
    add(schema, 0);
    return one_of(std::move(ways_));
  }

 private:
  void as_string(Json rest) { ways_.push_back(sequence({constant("true\">"), std::move(rest)})); }
  void as_json(Json value) {
    ways_.push_back(sequence({constant("false\">"), std::move(value), constant(kParameterEnd)}));
  }

  void add(const Json& schema, int depth) {
    HADAL_INPUT_CHECK(depth < 16, "tools: references go round");
    if (!schema.is_object()) return add_any();
    if (schema.contains("$ref")) return add(resolve(schema["$ref"]), depth + 1);
    for (const char* key : {"anyOf", "oneOf", "allOf"}) {
      if (!schema.contains(key)) continue;
      for (const Json& option : schema[key]) add(option, depth + 1);
      return;
    }
    if (schema.contains("const")) return add_value(schema["const"]);
    if (schema.contains("enum")) {
      for (const Json& value : schema["enum"]) add_value(value);
      return;
    }
    if (!schema.contains("type")) {
      // Annotations alone allow anything; the rest is left to the schema, strings quoted.
      const bool bare =
          std::all_of(schema.items().begin(), schema.items().end(), [](const auto& x) {
            return x.key() == "description" || x.key() == "title" || x.key() == "default";
          });
      return bare ? add_any() : as_json(json_value(with_definitions(schema, root_)));
    }
    const Json& type = schema["type"];
    if (type.is_array()) {
      for (const Json& one : type) {
        Json single = schema;
        single["type"] = one;
        add(single, depth + 1);
      }
      return;
    }
    if (type == "string") return add_string(schema);
    as_json(json_value(with_definitions(schema, root_)));
  }

  const Json& resolve(const Json& reference) {
    const std::string uri = reference.is_string() ? reference.get<std::string>() : "";
    for (const char* key : {"$defs", "definitions"}) {
      const std::string prefix = concat("#/", key, "/");
      if (!uri.starts_with(prefix) || !root_.contains(key)) continue;
      const std::string name = uri.substr(prefix.size());
      if (root_[key].contains(name)) return root_[key][name];
    }
    throw InputError(concat("tools: the reference ", reference.dump(), " leads nowhere"));
  }

  void add_any() {
    as_string(raw_string());
    as_json(json_value(Json::object()));
  }

  void add_value(const Json& value) {
    const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    HADAL_INPUT_CHECK(text.find(kMarkerSign) == std::string::npos, "tools: the value ",
                      value.dump(), " holds the character U+0001");
    if (value.is_string()) {
      as_string(raw_string(constant(text)));
    } else {
      as_json(constant(text));
    }
  }

  void add_string(const Json& schema) {
    const bool bounded = schema.contains("minLength") || schema.contains("maxLength");
    // Patterns and formats stand in quotes.
    if (schema.contains("pattern") || schema.contains("format")) {
      return as_json(json_value(schema));
    }
    if (!bounded) return as_string(raw_string());
    const int64_t least = schema.value("minLength", int64_t{0});
    const std::string most =
        schema.contains("maxLength") ? std::to_string(schema["maxLength"].get<int64_t>()) : "";
    as_string(raw_string(regex(concat("[^\\x01]{", least, ",", most, "}"))));
  }

  const Json& root_;
  std::vector<Json> ways_;
};

/// One parameter and the line's end.
Json parameter(const std::string& name, const Json& schema, const Json& root) {
  return sequence({constant(concat(kOpen, "parameter name=\"", name, "\" string=\"")),
                   Values(root).read(schema)});
}

/// The parameters of a tool with "strict", in any order.
Json strict_parameters(const Json& schema, CallParameters& calls) {
  const std::string& tool = calls.tool;
  static const std::set<std::string> known = {
      "type",    "properties", "required", "additionalProperties", "$defs",   "definitions",
      "$schema", "$id",        "title",    "description",          "examples"};
  for (const auto& [key, value] : schema.items()) {
    HADAL_INPUT_CHECK(known.contains(key), "tools: '", tool, "': parameters.", key,
                      " is not supported with strict");
  }
  HADAL_INPUT_CHECK(schema.value("type", "object") == "object", "tools: '", tool,
                    "': parameters.type is ", schema["type"].dump(), ", expected \"object\"");
  const Json properties = schema.value("properties", Json::object());
  HADAL_INPUT_CHECK(properties.is_object(), "tools: '", tool,
                    "': parameters.properties is no object");
  const Json required = schema.value("required", Json::array());
  HADAL_INPUT_CHECK(required.is_array(), "tools: '", tool, "': parameters.required is no list");
  for (const Json& name : required) {
    HADAL_INPUT_CHECK(name.is_string() && properties.contains(name.get<std::string>()), "tools: '",
                      tool, "': parameters.required names ", name.dump(), ", which is no property");
  }
  std::vector<Json> parameters;
  for (const auto& [name, value] : properties.items()) {
    HADAL_INPUT_CHECK(name.find_first_of("\"<>\n") == std::string::npos &&
                          name.find(kMarkerSign) == std::string::npos,
                      "tools: '", tool, "': the property '", name, "' cannot be written as markup");
    parameters.push_back(parameter(name, value, schema));
    calls.names.push_back(name);
  }
  for (const Json& name : required) calls.required.push_back(name.get<std::string>());
  if (parameters.empty()) return {};
  // One without an end would be a trap: the star over all of them may end before it.
  const Json each{{"type", "structural_tag"}, {"format", sequence(parameters)}};
  const auto read = xgrammar::Grammar::FromStructuralTag(each.dump());
  if (const auto* grammar = std::get_if<xgrammar::Grammar>(&read))
    check_ends(grammar->ToString(), concat("tools: '", tool, "'"));
  return {{"type", "star"}, {"content", one_of(std::move(parameters))}};
}

/// Any parameters.
Json free_parameters(CallParameters& calls) {
  calls.any = true;
  const Json any = Json::object();
  Json one = sequence({constant(concat(kOpen, "parameter name=\"")),
                       regex("[a-zA-Z_][a-zA-Z0-9_.-]{0,63}"), constant("\" string=\""),
                       Values(any).read(any)});
  return {{"type", "star"}, {"content", std::move(one)}};
}

/// The one text of a custom tool, by its grammar.
Json formatted_input(const Json& format, CallParameters& calls) {
  const std::string where = concat("tools: '", calls.tool, "': format");
  const std::string syntax = format.value("syntax", ""),
                    definition = format.value("definition", "");
  HADAL_INPUT_CHECK(syntax == "lark" || syntax == "regex", where, ".syntax is '", syntax,
                    "', expected lark or regex");
  const std::string ebnf =
      syntax == "lark" ? lark_to_ebnf(definition, where) : regex_to_ebnf(definition, where);
  check_pattern(ebnf, where);
  check_ends(xgrammar::Grammar::FromEBNF(ebnf).ToString(), where);
  calls.names = calls.required = {"input"};
  return sequence({constant(concat(kOpen, "parameter name=\"input\" string=\"true\">")),
                   Json{{"type", "grammar"}, {"grammar", ebnf}}, constant(kParameterEnd)});
}

Json call(const Json& tool, size_t index, bool prefer, std::vector<CallParameters>& all) {
  HADAL_INPUT_CHECK(tool.is_object() && tool.contains("name") && tool["name"].is_string(), "tools[",
                    index, "]: has no name");
  const auto name = tool["name"].get<std::string>();
  HADAL_INPUT_CHECK(!name.empty() && name.find_first_of("\"<>\n") == std::string::npos &&
                        name.find(kMarkerSign) == std::string::npos,
                    "tools[", index, "]: the name '", name, "' cannot be written as markup");
  const Json strict = tool.value("strict", Json(false));
  HADAL_INPUT_CHECK(strict.is_boolean() || strict.is_null() || strict == kPrefer, "tools: '", name,
                    "': strict is no boolean");
  std::vector<Json> elements = {constant(concat(kOpen, "invoke name=\"", name, "\">\n"))};
  CallParameters calls;
  calls.tool = name;
  const auto add_strict = [&] {
    const Json parameters = tool.value("parameters", Json::object());
    HADAL_INPUT_CHECK(parameters.is_object(), "tools: '", name, "': parameters is no object");
    check_schema(nlohmann::json(parameters), concat("tools: '", name, "': parameters"));
    Json some = strict_parameters(parameters, calls);
    if (!some.is_null()) elements.push_back(std::move(some));
  };
  if (tool.contains("format")) {
    elements.push_back(formatted_input(tool["format"], calls));
  } else if (strict == true) {
    add_strict();
  } else if (strict == kPrefer && prefer) {
    try {
      add_strict();
    } catch (const std::exception&) {  // nobody asked for it to be kept
      calls = {};
      calls.tool = name;
      elements.push_back(free_parameters(calls));
    }
  } else {
    elements.push_back(free_parameters(calls));
  }
  if (calls.required.empty()) {
    // A call of none is written with a blank line.
    const Json blank = regex("\\n?");
    const bool none = elements.size() == 1;
    Json some = none ? Json() : std::move(elements.back());
    if (!none) elements.pop_back();
    elements.push_back(none ? blank : one_of({std::move(some), constant("\n")}));
  }
  all.push_back(std::move(calls));
  elements.push_back(constant(concat(kClose, "invoke>\n")));
  return sequence(std::move(elements));
}

/// What an answer that is no calls must be: {"kind", "text"}.
Json content_format(const Json& answer) {
  const std::string kind = answer.value("kind", ""), text = answer.value("text", "");
  if (kind == "json_object")
    return json_value({{"type", "object"}, {"additionalProperties", true}});
  if (kind == "json_schema") {
    check_schema(*parse_json(text, "grammar: JSON schema"), "grammar: JSON schema");
    return json_value(Json::parse(text));
  }
  check_pattern(text, "grammar");
  if (kind == "regex") return regex(text);
  HADAL_INPUT_CHECK(kind == "ebnf", "tools: content.kind is '", kind, "'");
  return {{"type", "grammar"}, {"grammar", text}};
}

}  // namespace

ToolGrammar read_tool_grammar(std::string_view text, bool prefer) {
  parse_json(text, "tools");  // depth and repeated keys
  Json document = Json::parse(text);
  bool required = true, parallel = true;
  Json tools = document, answer;
  if (document.is_object()) {
    tools = document.value("tools", Json::array());
    answer = document.value("content", Json());
    const Json mode = document.value("mode", Json("required"));
    HADAL_INPUT_CHECK(mode == "required" || mode == "auto", "tools: mode is ", mode.dump(),
                      ", expected \"required\" or \"auto\"");
    const Json flag = document.value("parallel", Json(true));
    HADAL_INPUT_CHECK(flag.is_boolean(), "tools: parallel is no boolean");
    required = mode == "required";
    parallel = flag.get<bool>();
  }
  HADAL_INPUT_CHECK(tools.is_array() && !tools.empty(), "tools: expected a list of tools");
  ToolGrammar result;
  std::vector<Json> calls;
  for (size_t index = 0; index < tools.size(); ++index) {
    calls.push_back(call(tools[index], index, prefer, result.calls));
    result.has_preferences =
        result.has_preferences || tools[index].value("strict", Json(false)) == kPrefer;
  }
  Json content = one_of(std::move(calls));
  if (parallel) content = Json{{"type", "plus"}, {"content", std::move(content)}};
  Json format = sequence({constant(kBlock), content, constant(kBlockEnd)});
  if (!required && answer.is_null()) {
    Json tag{
        {"type", "tag"}, {"begin", kBlock}, {"content", std::move(content)}, {"end", kBlockEnd}};
    format = Json{{"type", "triggered_tags"},
                  // Sessions see to it that the marker comes nowhere else.
                  {"triggers", {concat(kBlockBegin, kMarkerSign)}},
                  {"tags", {std::move(tag)}},
                  {"stop_after_first", true}};
    result.watch = MarkerGuard::Watch::kBlocks;
  } else if (!required) {
    format = one_of({content_format(answer), std::move(format)});
    result.watch = MarkerGuard::Watch::kStart;
  }
  result.structural_tag = Json{{"type", "structural_tag"}, {"format", std::move(format)}}.dump();
  return result;
}

}  // namespace hadal::engine_core
