// What the chat APIs share: checked messages, tools and wishes to a Job for the engine.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/generation.h"
#include "server/json_reader.h"
#include "server/options.h"
#include "text/chat_format.h"

namespace hadal::server {

/// What every request handler needs; outlives them.
struct Context {
  engine::Engine& engine;
  const text::Tokenizer& tokenizer;
  const ServerOptions& options;
  std::shared_ptr<CallMemory> calls = nullptr;  ///< null: calls are not remembered
  int64_t max_context() const;
};

enum class ToolChoice : uint8_t { kAuto, kNone, kRequired, kNamed };

struct ChatJob {
  std::vector<Json> messages;  ///< as text::render_chat() takes them
  std::vector<Json> tools;     ///< {"type": "function", "function": {...}}, checked
  ToolChoice tool_choice = ToolChoice::kAuto;
  std::string tool_name;  ///< for kNamed
  /// Names of the tools that may be called ("allowed_tools"); all are shown. Empty: all may.
  std::vector<std::string> allowed_tools;
  bool parallel_calls = true;
  std::optional<bool> thinking;  ///< unset: nobody said anything
  /// Most tokens of reasoning ("budget_tokens", "thinking_budget", "reasoning.max_tokens").
  std::optional<int64_t> thinking_budget;
  /// Whether an EOS inside the reasoning closes it and the answer goes on; unset: it does where
  /// there are tools.
  std::optional<bool> close_reasoning;
  bool default_thinking = true;
  std::string effort;  ///< "" or as effort_of() takes it
  engine::Grammar format;
  Json format_schema;    ///< shown to the model; null: none
  std::string task;      ///< a quick-instruction task, or empty
  engine::Request base;  ///< sampling and limits; prompt, grammar, thinking are filled in here
};

/// Renders, tokenises and checks. Errors: RequestError.
Job make_chat_job(const Context& context, ChatJob chat);
/// The prompt alone, for counting.
std::vector<int64_t> chat_prompt_tokens(const Context& context, const ChatJob& chat);

/// temperature, top_p, ... seed of a request; what it leaves out is the model's own.
void read_sampling(const Context& context, const Fields& body, engine::Request& request);
/// A string or a list of them; at most options.max_stop_strings.
std::vector<std::string> read_stop(const Fields& body,
                                   std::string_view key,
                                   const ServerOptions& options);
/// A max_tokens, 0 when absent.
int64_t read_max_tokens(const Fields& body, std::string_view key);
/// Clips max_tokens to what the context leaves. Errors: RequestError when the prompt fills it.
void fit_context(const Context& context, engine::Request& request);
/// The model's name, checked. Errors: RequestError 404.
std::string read_model(const Context& context, const Fields& body);
/// {"name", "description", "parameters", "strict"} of a function, checked, as a tool.
Json read_function(const Fields& function);
/// {"type": "json_schema"|"json_object"|"text"|"regex"|"grammar", ...} into chat.format. `schema`
/// holds the fields of the schema (nested in one API, flat in another).
void read_format(const Fields& format, const Fields& schema, ChatJob& chat);
/// Text of a content: a string, or a list of parts of the given types.
std::string read_text(const Fields& message,
                      std::string_view key,
                      std::initializer_list<std::string_view> types);

}  // namespace hadal::server
