// hadal chat-encode, hadal chat-parse: messages to the prompt, a completion to the message it is.
#include <memory>

#include <CLI/CLI.hpp>

#include "apps/text_commands.h"
#include "apps/text_io.h"
#include "base/check.h"
#include "text/chat_format.h"
#include "text/tool_calls.h"

namespace hadal::apps {
namespace {

using text::PyJson;

struct CodecFlags {
  std::string input;
  std::string thinking_mode = "thinking";
  std::string effort, effort_levels = "preview";
  std::string drop_thinking = "yes";
};

std::shared_ptr<CodecFlags> define_codec(CLI::App& app) {
  auto options = std::make_shared<CodecFlags>();
  app.add_option("--thinking-mode", options->thinking_mode, "chat or thinking")
      ->check(CLI::IsMember({"chat", "thinking"}))
      ->capture_default_str();
  app.add_option("file", options->input, "input (default: standard input)");
  return options;
}

int encode(const CodecFlags& options) {
  const std::string name = options.input.empty() ? "standard input" : options.input;
  const PyJson messages = text::messages_of_request(PyJson::parse(read_input(options.input), name));
  text::ChatOptions chat;
  chat.thinking_mode = text::parse_thinking_mode(options.thinking_mode);
  chat.levels = text::parse_effort_levels(options.effort_levels);
  chat.effort = text::parse_reasoning_effort(options.effort, chat.levels);
  chat.drop_thinking = options.drop_thinking == "yes";
  write_output(text::encode_chat(messages, chat));
  return 0;
}

int parse(const CodecFlags& options) {
  const text::Completion completion = text::parse_completion(
      read_input(options.input), text::parse_thinking_mode(options.thinking_mode));
  PyJson message = completion.to_json();
  if (!completion.ok) message.set("error", PyJson::string(completion.error));
  write_output(message.dump() + "\n");
  return completion.lost || completion.cut ? 1 : 0;
}

}  // namespace

std::function<int()> define_chat_encode(CLI::App& app) {
  auto options = define_codec(app);
  app.add_option("--effort", options->effort,
                 "reasoning effort: high (the default) or max; with the levels of 0731 low (the "
                 "default), high or max");
  app.add_option("--effort-levels", options->effort_levels,
                 "preview or 0731: which checkpoint's levels (hadal inspect tells)")
      ->check(CLI::IsMember({"preview", "0731"}))
      ->capture_default_str();
  app.add_option("--drop-thinking", options->drop_thinking,
                 "yes or no: leave out the reasoning of earlier turns")
      ->check(CLI::IsMember({"yes", "no"}))
      ->capture_default_str();
  return [options] { return encode(*options); };
}

std::function<int()> define_chat_parse(CLI::App& app) {
  auto options = define_codec(app);
  return [options] { return parse(*options); };
}

}  // namespace hadal::apps
