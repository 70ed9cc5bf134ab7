// hadal chat: a conversation at the terminal, or scripted with one message a line.
#include <cerrno>
#include <cstdio>
#include <memory>
#include <optional>
#include <unistd.h>
#include <utility>

#include <CLI/CLI.hpp>

#include "apps/chat_session.h"
#include "apps/command.h"
#include "apps/interrupt.h"
#include "apps/text_io.h"
#include "base/check.h"
#include "base/log.h"

namespace hadal::apps {
namespace {

using text::CompletionEvent;
using text::PyJson;

constexpr const char* kHelp =
    "/reset   forget the conversation\n"
    "/help    this list\n"
    "/quit    leave (so does Ctrl-D)\n"
    "Ctrl-C stops an answer. A tool call asks for its result, one line.\n";

struct Flags {
  std::string model, numerics, thinking_mode = "chat", effort, system, tools;
  ops::SamplingParams sampling;
  int64_t max_tokens = 1024;
  bool json = false, recompute = false;
};

/// Lines of standard input, read without a library's buffer so that Ctrl-C can interrupt.
class LineReader {
 public:
  enum class State { kLine, kEnd, kInterrupted };

  /// A line without its newline; of a last line without newline, what there is.
  State next(std::string& line) {
    for (;;) {
      if (const size_t newline = buffer_.find('\n'); newline != std::string::npos) {
        line = buffer_.substr(0, newline);
        buffer_.erase(0, newline + 1);
        if (line.ends_with('\r')) line.pop_back();
        return State::kLine;
      }
      char piece[4096];
      const ssize_t got = ::read(STDIN_FILENO, piece, sizeof(piece));
      if (got < 0 && errno == EINTR) return State::kInterrupted;
      if (got <= 0) {
        line = std::exchange(buffer_, {});
        return line.empty() ? State::kEnd : State::kLine;
      }
      buffer_.append(piece, static_cast<size_t>(got));
    }
  }

 private:
  std::string buffer_;
};

/// Shows an answer while it comes.
class Display {
 public:
  explicit Display(bool terminal) : terminal_(terminal) {}

  void show(const CompletionEvent& event) {
    if (event.kind == CompletionEvent::Kind::kToolCall) {
      enter(Part::kCall);
      put("call " + event.call.name + "(" + event.call.arguments + ")\n");
    } else if (event.kind == CompletionEvent::Kind::kReasoning ||
               event.kind == CompletionEvent::Kind::kContent) {
      enter(event.kind == CompletionEvent::Kind::kReasoning ? Part::kReasoning : Part::kContent);
      put(event.text);
    }
    std::fflush(stdout);
  }
  void end() {
    enter(Part::kNone);
    std::fflush(stdout);
  }

 private:
  enum class Part { kNone, kReasoning, kContent, kCall };

  void enter(Part part) {
    if (part == part_) return;
    if (terminal_ && part_ == Part::kReasoning) std::fputs("\33[0m", stdout);
    if (part_ == Part::kReasoning || part_ == Part::kContent) std::fputc('\n', stdout);
    if (part_ == Part::kReasoning && part == Part::kContent) std::fputc('\n', stdout);
    if (terminal_ && part == Part::kReasoning) std::fputs("\33[2m", stdout);
    part_ = part;
  }
  /// A terminal obeys control characters, and a model may write any.
  void put(const std::string& text) const {
    for (const char c : text) {
      const bool control =
          (static_cast<unsigned char>(c) < 32 && c != '\n' && c != '\t') || c == 127;
      std::fputc(terminal_ && control ? '?' : c, stdout);
    }
  }

  bool terminal_;
  Part part_ = Part::kNone;
};

void print_json(const Answer& answer) {
  PyJson json = answer.completion.to_json();
  json.set("finish_reason", PyJson::string(finish_name(answer.finish)));
  json.set("error", answer.completion.ok ? PyJson() : PyJson::string(answer.completion.error));
  json.set("prompt_tokens", PyJson::integer(answer.prompt_tokens));
  json.set("reused_tokens", PyJson::integer(answer.reused_tokens));
  json.set("tokens", PyJson::integer(answer.tokens));
  write_output(json.dump() + "\n");
}

/// What a reader of the text alone would not know.
void print_note(const Answer& answer, int64_t max_tokens) {
  if (answer.finish == Finish::kInterrupted) {
    std::fprintf(stderr, "[stopped]\n");
  } else if (answer.finish == Finish::kLength) {
    std::fprintf(stderr, "[cut off after %lld tokens; --max-tokens is %lld]\n",
                 static_cast<long long>(answer.tokens), static_cast<long long>(max_tokens));
  } else if (!answer.completion.ok) {
    std::fprintf(stderr, "[malformed answer: %s]\n", answer.completion.error.c_str());
  }
}

class Repl {
 public:
  Repl(const LoadedModel& loaded, const Flags& flags, ChatSettings settings)
      : session_(loaded, std::move(settings)),
        flags_(flags),
        terminal_(isatty(STDIN_FILENO) != 0 && isatty(STDOUT_FILENO) != 0) {}

  void run() {
    if (terminal_ && !flags_.json) std::fputs("/help lists the commands\n", stdout);
    while (const std::optional<std::string> line = ask("> ")) {
      if (line->find_first_not_of(" \t") == std::string::npos) continue;
      if (*line == "/quit") return;
      if (is_command(*line)) continue;
      session_.add_user(*line);
      if (!converse()) return;
    }
  }

 private:
  /// The next line; nothing at the end of the input. Ctrl-C empties the line.
  std::optional<std::string> ask(const std::string& prompt) {
    for (;;) {
      if (terminal_) std::fputs(prompt.c_str(), stdout);
      std::fflush(stdout);
      std::string line;
      const LineReader::State state = input_.next(line);
      if (state == LineReader::State::kLine) return line;
      if (terminal_) std::fputc('\n', stdout);
      if (state == LineReader::State::kEnd) return std::nullopt;
      interrupt_.clear();
      if (terminal_) std::fputs("(/quit or Ctrl-D leaves)\n", stdout);
    }
  }

  bool is_command(const std::string& line) {
    if (line == "/reset") {
      session_.reset();
      std::fprintf(stderr, "[the conversation is forgotten]\n");
      return true;
    }
    if (line == "/help") {
      std::fputs(kHelp, stderr);
      return true;
    }
    const bool word = line[0] == '/' && line.find_first_of("/ .", 1) == std::string::npos;
    if (word) std::fprintf(stderr, "[no command %s; /help lists them]\n", line.c_str());
    return word;
  }

  /// One answer, and further ones while the model calls tools; false at the end of the input.
  bool converse() {
    for (;;) {
      interrupt_.clear();
      Display display(terminal_);
      Answer answer;
      try {
        answer = session_.answer(
            [&](const CompletionEvent& event) {
              if (!flags_.json) display.show(event);
            },
            [&] { return interrupt_.raised(); });
      } catch (const InputError& error) {
        std::fprintf(stderr, "[%s]\n", error.what());
        return true;
      }
      display.end();
      interrupt_.clear();
      if (flags_.json) print_json(answer);
      print_note(answer, flags_.max_tokens);
      if (!answer.completion.ok || answer.completion.tool_calls.empty()) return true;
      for (size_t i = 0; i < answer.completion.tool_calls.size(); ++i) {
        const auto result = ask(concat("result of ", answer.completion.tool_calls[i].name, "> "));
        if (!result) return false;
        session_.add_tool_result(i, *result);
      }
    }
  }

  InterruptFlag interrupt_;
  ChatSession session_;
  const Flags& flags_;
  bool terminal_;
  LineReader input_;
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

int run(const Flags& flags) {
  ChatSettings settings;
  settings.encoding.thinking_mode = text::parse_thinking_mode(flags.thinking_mode);
  settings.encoding.effort = text::parse_reasoning_effort(flags.effort);
  settings.system = flags.system;
  if (!flags.tools.empty()) settings.tools = read_tools(flags.tools);
  settings.sampling = flags.sampling;
  settings.max_tokens = flags.max_tokens;
  settings.recompute = flags.recompute;
  const LoadedModel loaded = load_with_tokenizer(flags.model, flags.numerics);
  log::set_level(log::Level::kWarn);  // the terminal is for the conversation
  Repl(loaded, flags, settings).run();
  return 0;
}

}  // namespace

std::function<int()> define_chat(CLI::App& app) {
  auto flags = std::make_shared<Flags>();
  app.add_option("--model", flags->model,
                 "checkpoint folder with tokenizer.json; default: the shipped model");
  app.add_option("--thinking-mode", flags->thinking_mode, "chat or thinking")
      ->check(CLI::IsMember({"chat", "thinking"}))
      ->capture_default_str();
  app.add_option("--effort", flags->effort, "reasoning effort: high (the default) or max")
      ->check(CLI::IsMember({"none", "high", "max"}));
  app.add_option("--system", flags->system, "system message");
  app.add_option("--tools", flags->tools, "JSON file: a list of tools in OpenAI form");
  app.add_option("--temperature", flags->sampling.temperature, "0: always the most likely token")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--top-p", flags->sampling.top_p, "keep the most likely tokens of this mass")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--seed", flags->sampling.seed, "same seed, same text");
  app.add_option("--max-tokens", flags->max_tokens, "tokens of an answer at most")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--numerics", flags->numerics,
                 "ideal, bf16 or released; default: by the checkpoint's scales");
  app.add_flag("--json", flags->json, "every answer as one line of JSON");
  app.add_flag("--recompute", flags->recompute,
               "compute every prompt from its start: the same text, later");
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
