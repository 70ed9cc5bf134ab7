// Values of tool calls: from what a model wrote, and how it marked it, to JSON.
//
// The mark is trusted: `string="true"` gives a string, `string="false"` JSON. Two things are
// mended, since models err there and clients need JSON: marked as JSON but none, a value is a
// string; marked as a string where the tool's schema allows none, a value that is canonical JSON of
// a type the schema allows is that. Pure functions; a ToolSchemas is immutable and safe from many
// threads.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "text/python_json.h"

namespace hadal::text {

/// Whether the text is JSON (strict: no NaN), with any white space around.
bool is_json(std::string_view text);

/// What the offered tools say about their parameters.
class ToolSchemas {
 public:
  ToolSchemas() = default;
  /// A list of {"function": {"name", "parameters"}}, other members ignored.
  explicit ToolSchemas(const PyJson& tools);

  /// The schema of a tool's parameters, or null for a tool or schema that is not known.
  const PyJson* parameters(std::string_view tool) const;
  /// Whether the value of a parameter may be a string, as far as is known.
  bool allows_string(std::string_view tool, std::string_view key) const;
  /// Whether a single parameter of this name may be a wrapper of all of them: `arguments` or
  /// `input`, where the tool is known and has no such parameter.
  bool may_wrap(std::string_view tool, std::string_view key) const;
  /// The object that a wrapper holds, as JSON text; empty if it holds none that fits the schema.
  std::string unwrap(std::string_view tool, std::string_view value) const;
  /// The JSON text of a value.
  std::string value(std::string_view tool,
                    std::string_view key,
                    std::string_view text,
                    bool is_string) const;

 private:
  std::map<std::string, PyJson, std::less<>> parameters_;
};

}  // namespace hadal::text
