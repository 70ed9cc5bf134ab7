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

class ResponseStore;

/// What every request handler needs; outlives them.
struct Context {
  engine_core::Engine& engine;
  const text::Tokenizer& tokenizer;
  const ServerOptions& options;
  std::shared_ptr<CallMemory> calls = nullptr;         ///< null: calls are not remembered
  std::shared_ptr<ResponseStore> responses = nullptr;  ///< null: nothing is stored
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
  /// Reasoning gets half of the tokens at most, where nothing else limits it.
  bool halves_thinking = false;
  std::string effort;  ///< "" or as effort_of() takes it
  engine_core::Grammar format;
  Json format_schema;         ///< shown to the model; null: none
  std::string task;           ///< a quick-instruction task, or empty
  bool drop_thinking = true;  ///< the reasoning of earlier turns, where there are no tools
  bool opens_turn = true;     ///< false: the prompt ends with the last message
  bool continues = true;      ///< a last message of the assistant's is gone on from
  engine_core::Request base;  ///< sampling and limits; prompt, grammar, thinking are filled in here
};

/// For a model that was not taught to think (its defaults say so), before make_chat_job(): an
/// effort alone means no thinking, and thinking that is asked for gets half of the tokens, since
/// such a model does not end it by itself. What to tell the client; empty: nothing changed.
std::string settle_thinking(const Context& context, ChatJob& chat);
/// Renders, tokenises and checks. Errors: RequestError.
Job make_chat_job(const Context& context, ChatJob chat);
/// The prompt alone, for counting.
std::vector<int64_t> chat_prompt_tokens(const Context& context, const ChatJob& chat);

/// temperature, top_p, ... seed of a request; what it leaves out is the model's own.
void read_sampling(const Context& context, const Fields& body, engine_core::Request& request);
/// A string or a list of them; at most options.max_stop_strings.
std::vector<std::string> read_stop(const Fields& body,
                                   std::string_view key,
                                   const ServerOptions& options);
/// A max_tokens, 0 when absent.
int64_t read_max_tokens(const Fields& body, std::string_view key);
/// A prompt that leaves no room for an answer, in OpenAI's words, which clients match.
class ContextOverflow : public RequestError {
 public:
  ContextOverflow(int64_t prompt_tokens, int64_t max_context);
  const int64_t prompt_tokens, max_context;
};
enum class Room : uint8_t {
  kAnswer,
  kNone,  ///< max_tokens 0 means none, not that nobody said anything
};
/// Clips max_tokens to what the context leaves. Errors: ContextOverflow when the prompt fills it.
void fit_context(const Context& context, engine_core::Request& request, Room room = Room::kAnswer);
/// The model's name, checked. Errors: RequestError 404.
std::string read_model(const Context& context, const Fields& body);
/// {"name", "description", "parameters", "strict"} of a function, checked, as a tool.
Json read_function(const Fields& function);
/// {"type": "json_schema"|"json_object"|"text"|"regex"|"grammar", ...} into chat.format. `schema`
/// holds the fields of the schema (nested in one API, flat in another).
void read_format(const Fields& format, const Fields& schema, ChatJob& chat);
/// Text of a content: a string, or a list of texts and parts of the given types. What the model
/// cannot see stands there as "[Unsupported image]", as the official encoder writes it.
std::string read_text(const Fields& message,
                      std::string_view key,
                      std::initializer_list<std::string_view> types);
/// System messages behind the first turn: between an answer and a user's message they stay (the
/// official encoding knows that); inside a turn they become a part of it, since nothing may stand
/// between a turn and its answer. Where nobody but the system has spoken before an answer, an empty
/// turn is put in.
void settle_system_messages(std::vector<Json>& messages);

}  // namespace hadal::server
