// hadal chat: a conversation at the terminal, or scripted with one message a line.
#include <memory>
#include <optional>
#include <utility>

#include <CLI/CLI.hpp>

#include "apps/chat_repl.h"
#include "apps/command.h"
#include "apps/flags.h"
#include "apps/text_io.h"
#include "base/check.h"
#include "base/log.h"

namespace hadal::apps {
namespace {

using text::PyJson;

constexpr int64_t kMaxTokens = 1024;  // where the model says nothing

struct ChatFlags {
  std::string model, numerics, thinking_mode, effort, effort_levels, system, tools;
  SamplingFlags sampling;
  std::optional<int64_t> max_tokens;
  bool json = false, recompute = false, no_history = false;
};

/// A list of tools, or {"tools": [...]}; bare functions are wrapped as the encoding expects.
PyJson read_tools(const std::string& path) {
  PyJson json = PyJson::parse(read_input(path), path);
  if (const PyJson* inner = json.find("tools"); inner != nullptr) json = PyJson(*inner);
  HADAL_INPUT_CHECK(json.is_array() && !json.items().empty(), path,
                    ": expected a list of tools, found ", json.kind_name());
  for (PyJson& tool : json.items()) {
    if (tool.find("function") == nullptr && tool.find("name") != nullptr) {
      tool = PyJson::object({{"type", PyJson::string("function")}, {"function", PyJson(tool)}});
    }
    HADAL_INPUT_CHECK(tool.find("function") != nullptr && tool.find("function")->is_object(), path,
                      ": a tool without an object \"function\"");
  }
  return json;
}

int run(const ChatFlags& flags) {
  ChatSettings settings;
  settings.system = flags.system;
  if (!flags.tools.empty()) settings.tools = read_tools(flags.tools);
  settings.recompute = flags.recompute;
  const LoadedModel loaded = load_with_tokenizer(flags.model, flags.numerics);
  const engine_core::GenerationDefaults& defaults = loaded.defaults;
  settings.encoding.thinking_mode = text::parse_thinking_mode(
      flags.thinking_mode.empty() ? (defaults.thinking ? "thinking" : "chat")
                                  : flags.thinking_mode);
  settings.sampling = flags.sampling.over(defaults.sampling);
  settings.max_tokens =
      flags.max_tokens.value_or(defaults.max_tokens > 0 ? defaults.max_tokens : kMaxTokens);
  settings.encoding.levels = flags.effort_levels.empty()
                                 ? loaded.effort.levels
                                 : text::parse_effort_levels(flags.effort_levels);
  settings.encoding.effort = text::parse_reasoning_effort(flags.effort, settings.encoding.levels);
  log::set_level(log::Level::kWarn);  // the terminal is for the conversation
  run_chat(loaded, std::move(settings), {.json = flags.json, .history = !flags.no_history});
  return 0;
}

}  // namespace

std::function<int()> define_chat(CLI::App& app) {
  auto flags = std::make_shared<ChatFlags>();
  app.add_option("--model", flags->model,
                 "checkpoint folder with tokenizer.json; default: the shipped model");
  app.add_option("--thinking-mode", flags->thinking_mode, "default: the model's")
      ->check(CLI::IsMember({"chat", "thinking"}));
  app.add_option("--effort", flags->effort,
                 "reasoning effort: high (the default) or max; with the levels of 0731 low (the "
                 "default), high or max")
      ->check(CLI::IsMember({"none", "low", "high", "max"}));
  app.add_option("--effort-levels", flags->effort_levels,
                 "preview or 0731; default: the model's (hadal inspect tells)")
      ->check(CLI::IsMember({"preview", "0731"}));
  app.add_option("--system", flags->system, "system message");
  app.add_option("--tools", flags->tools, "JSON file: a list of tools in OpenAI form");
  flags->sampling.define(app);
  app.add_option("--max-tokens", flags->max_tokens,
                 "tokens of an answer at most; default: the model's, else 1024")
      ->check(above(0));
  app.add_option("--numerics", flags->numerics,
                 "ideal, bf16, released or fp8; default: by the checkpoint's storage");
  app.add_flag("--json", flags->json, "every answer as one line of JSON");
  app.add_flag("--no-history", flags->no_history, "do not keep the lines for the next time");
  app.add_flag("--recompute", flags->recompute,
               "compute every prompt from its start: the same text, later");
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
