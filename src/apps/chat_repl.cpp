#include "apps/chat_repl.h"

#include <charconv>
#include <cstdio>
#include <memory>
#include <optional>
#include <unistd.h>
#include <utility>

#include "apps/interrupt.h"
#include "apps/line_input.h"
#include "apps/program.h"
#include "apps/text_io.h"
#include "base/check.h"
#include "base/file.h"

namespace hadal::apps {
namespace {

using text::CompletionEvent;
using text::PyJson;

constexpr const char* kHelp =
    "/system TEXT     another system message, the conversation stays; without TEXT: what it is\n"
    "/set NAME VALUE  a setting of later answers; /set alone lists them\n"
    "/regenerate      another answer to the last message, with the next seed\n"
    "/save FILE       the conversation as JSON, in OpenAI's form\n"
    "/load FILE       go on from a saved conversation\n"
    "/reset           forget the conversation\n"
    "/help            this list\n"
    "/quit            leave (so does Ctrl-D)\n"
    "A line that ends with a backslash goes on; Alt-Enter and pasted lines stay in one message.\n"
    "Ctrl-C stops an answer. A tool call asks for its result, one line.\n";

const std::vector<std::string>& command_names() {
  static const std::vector<std::string> names = {"/system", "/set",   "/regenerate", "/save",
                                                 "/load",   "/reset", "/help",       "/quit"};
  return names;
}

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
  const text::Completion& said = answer.completion;
  if (answer.finish == Finish::kInterrupted) {
    std::fprintf(stderr, "[stopped]\n");
  } else if (answer.finish == Finish::kLength) {
    std::fprintf(stderr, "[cut off after %lld tokens; --max-tokens is %lld]\n",
                 static_cast<long long>(answer.tokens), static_cast<long long>(max_tokens));
  } else if (said.lost) {
    std::fprintf(stderr, "[malformed answer: %s]\n", said.error.c_str());
  } else if (said.content.empty() && said.tool_calls.empty()) {
    std::fprintf(stderr, "[an empty answer; /regenerate asks for another]\n");
  }
}

/// A setting by name: how it is shown and set.
struct Setting {
  const char* name;
  const char* expected;
  std::string (*show)(const ChatSettings&);
  bool (*set)(ChatSettings&, const std::string&);  ///< false: not what is expected
};

template <typename Number>
bool read_number(const std::string& text, Number least, Number most, Number& out) {
  Number value{};
  const auto [at, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || at != text.data() + text.size()) return false;
  if (!(value >= least && value <= most)) return false;
  out = value;
  return true;
}

constexpr int64_t kMany = int64_t{1} << 40;

const Setting kSettings[] = {
    {"temperature", "a number from 0 to 100",
     [](const ChatSettings& s) { return concat(s.sampling.temperature); },
     [](ChatSettings& s, const std::string& text) {
       return read_number(text, 0.0, 100.0, s.sampling.temperature);
     }},
    {"top_p", "a number above 0, at most 1",
     [](const ChatSettings& s) { return concat(s.sampling.top_p); },
     [](ChatSettings& s, const std::string& text) {
       return read_number(text, 1e-9, 1.0, s.sampling.top_p);
     }},
    {"top_k", "a whole number of at least 0",
     [](const ChatSettings& s) { return concat(s.sampling.top_k); },
     [](ChatSettings& s, const std::string& text) {
       return read_number(text, int64_t{0}, kMany, s.sampling.top_k);
     }},
    {"min_p", "a number from 0 to less than 1",
     [](const ChatSettings& s) { return concat(s.sampling.min_p); },
     [](ChatSettings& s, const std::string& text) {
       return read_number(text, 0.0, 0.999999, s.sampling.min_p);
     }},
    {"repetition_penalty", "a number from 0.01 to 10",
     [](const ChatSettings& s) { return concat(s.sampling.repetition_penalty); },
     [](ChatSettings& s, const std::string& text) {
       return read_number(text, 0.01, 10.0, s.sampling.repetition_penalty);
     }},
    {"seed", "a whole number of at least 0",
     [](const ChatSettings& s) { return concat(s.sampling.seed); },
     [](ChatSettings& s, const std::string& text) {
       return read_number(text, uint64_t{0}, ~uint64_t{0}, s.sampling.seed);
     }},
    {"max_tokens", "a whole number above 0",
     [](const ChatSettings& s) { return concat(s.max_tokens); },
     [](ChatSettings& s, const std::string& text) {
       return read_number(text, int64_t{1}, kMany, s.max_tokens);
     }},
    {"thinking", "on or off",
     [](const ChatSettings& s) {
       return std::string(s.encoding.thinking_mode == text::ThinkingMode::kThinking ? "on" : "off");
     },
     [](ChatSettings& s, const std::string& text) {
       if (text != "on" && text != "off") return false;
       s.encoding.thinking_mode =
           text == "on" ? text::ThinkingMode::kThinking : text::ThinkingMode::kChat;
       return true;
     }},
};

class Repl {
 public:
  Repl(const LoadedModel& loaded, ChatSettings settings, const ReplOptions& options)
      : session_(loaded, std::move(settings)),
        options_(options),
        terminal_(isatty(STDIN_FILENO) != 0 && isatty(STDOUT_FILENO) != 0 && !options.json),
        input_(terminal_ ? edited_lines(command_names(), options.history ? history_path() : "")
                         : plain_lines()) {}

  void run() {
    if (terminal_) std::fputs("/help lists the commands\n", stdout);
    while (const std::optional<std::string> line = ask("> ")) {
      if (line->find_first_not_of(" \t\n") == std::string::npos) continue;
      if (*line == "/quit") return;
      switch (obey(*line)) {
        case Then::kAsk:
          continue;
        case Then::kAnswer:
          break;
        case Then::kSay:
          session_.add_user(*line);
      }
      if (!converse()) return;
    }
  }

 private:
  enum class Then { kAsk, kAnswer, kSay };

  /// The next line; nothing at the end of the input. Ctrl-C empties the line.
  std::optional<std::string> ask(const std::string& prompt) {
    for (;;) {
      std::fflush(stdout);
      std::string line;
      const LineInput::State state = input_->next(prompt, line);
      if (state == LineInput::State::kLine) return line;
      if (terminal_) std::fputc('\n', stdout);
      if (state == LineInput::State::kEnd) return std::nullopt;
      interrupt_.clear();
      if (terminal_) std::fputs("(/quit or Ctrl-D leaves)\n", stdout);
    }
  }

  /// Does what a command asks for. Lines that begin like paths are messages.
  Then obey(const std::string& line) {
    if (line[0] != '/') return Then::kSay;
    const size_t space = line.find_first_of(" \t\n");
    const std::string name = line.substr(0, space);
    const size_t begin =
        space == std::string::npos ? space : line.find_first_not_of(" \t\n", space);
    const std::string rest = begin == std::string::npos ? "" : line.substr(begin);
    try {
      if (name == "/reset") {
        session_.reset();
        note("the conversation is forgotten");
      } else if (name == "/help") {
        std::fputs(kHelp, stderr);
      } else if (name == "/system") {
        change_system(rest);
      } else if (name == "/set") {
        change_setting(rest);
      } else if (name == "/save") {
        HADAL_INPUT_CHECK(!rest.empty(), "/save needs the name of a file");
        write_file_atomic(rest, session_.messages().dump() + "\n");
        note(concat(session_.messages().items().size(), " messages are in ", rest));
      } else if (name == "/load") {
        load(rest);
      } else if (name == "/regenerate") {
        if (!session_.take_answer()) {
          note("there is nothing to answer yet");
          return Then::kAsk;
        }
        ++session_.settings().sampling.seed;
        return Then::kAnswer;
      } else {
        const bool path = name.find_first_of("/.", 1) != std::string::npos;
        const std::string meant = nearest(name, command_names());
        if (path || (meant.empty() && !rest.empty())) return Then::kSay;
        note(concat("no command ", name, meant.empty() ? "" : concat("; did you mean ", meant, "?"),
                    meant.empty() ? "; " : " ", "/help lists them"));
      }
    } catch (const InputError& error) {
      note(error.what());
    }
    return Then::kAsk;
  }

  void change_system(const std::string& text) {
    if (text.empty()) {
      const std::string& now = session_.settings().system;
      note(now.empty() ? "there is no system message" : concat("the system message: ", now));
      return;
    }
    session_.set_system(text);
    note("the system message is changed");
  }

  void change_setting(const std::string& words) {
    ChatSettings& settings = session_.settings();
    const size_t space = words.find_first_of(" \t=");
    const std::string name = words.substr(0, space);
    const size_t begin =
        space == std::string::npos ? space : words.find_first_not_of(" \t=", space);
    const std::string value = begin == std::string::npos ? "" : words.substr(begin);
    std::vector<std::string> names;
    for (const Setting& setting : kSettings) {
      names.emplace_back(setting.name);
      if (words.empty()) note(concat(setting.name, " ", setting.show(settings)));
      if (setting.name != name) continue;
      HADAL_INPUT_CHECK(setting.set(settings, value), "/set ", name, ": expected ",
                        setting.expected, ", found ", value.empty() ? "nothing" : value);
      note(concat(name, " is ", setting.show(settings)));
      return;
    }
    if (words.empty()) return;
    const std::string meant = nearest(name, names);
    throw InputError(concat("/set: no setting ", name,
                            meant.empty() ? "" : concat("; did you mean ", meant, "?")));
  }

  void load(const std::string& path) {
    HADAL_INPUT_CHECK(!path.empty(), "/load needs the name of a file");
    session_.set_messages(PyJson::parse(read_file(path, int64_t{1} << 30), path), path);
    note(concat("going on after ", session_.messages().items().size(), " messages"));
  }

  static void note(const std::string& text) { std::fprintf(stderr, "[%s]\n", text.c_str()); }

  /// One answer, and further ones while the model calls tools; false at the end of the input.
  bool converse() {
    for (;;) {
      interrupt_.clear();
      Display display(terminal_);
      Answer answer;
      try {
        answer = session_.answer(
            [&](const CompletionEvent& event) {
              if (!options_.json) display.show(event);
            },
            [&] { return interrupt_.raised(); });
      } catch (const InputError& error) {
        note(error.what());
        return true;
      }
      display.end();
      interrupt_.clear();
      if (options_.json) print_json(answer);
      print_note(answer, session_.settings().max_tokens);
      if (answer.completion.tool_calls.empty()) return true;
      for (size_t i = 0; i < answer.completion.tool_calls.size(); ++i) {
        const auto result = ask(concat("result of ", answer.completion.tool_calls[i].name, "> "));
        if (!result) return false;
        session_.add_tool_result(i, *result);
      }
    }
  }

  InterruptFlag interrupt_;
  ChatSession session_;
  const ReplOptions options_;
  bool terminal_;
  std::unique_ptr<LineInput> input_;
};

}  // namespace

void run_chat(const LoadedModel& loaded, ChatSettings settings, const ReplOptions& options) {
  Repl(loaded, std::move(settings), options).run();
}

}  // namespace hadal::apps
