// A conversation with a model: the history, prompts in the official encoding, answers as they come.
//
// What messages hold never becomes a special token. The answers are the engine's: its
// prefix tree goes on where the last turn ended, or before the reasoning that the new prompt leaves
// out, and the model drafts where that is faster. Neither changes a bit of an answer. A
// session is used by one thread; the engine has its own.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "apps/answer_engine.h"
#include "apps/loaded_model.h"
#include "text/chat_format.h"
#include "text/completion_parser.h"

namespace hadal::apps {

struct ChatSettings {
  text::ChatOptions encoding;
  std::string system;
  text::PyJson tools;  ///< a list in OpenAI form, or null
  Sampling sampling;
  int64_t max_tokens = 1024;
  bool recompute = false;  ///< never use cached state
};

struct Answer {
  text::Completion completion;  ///< not ok when it was cut off or malformed
  Finish finish = Finish::kStop;
  int64_t prompt_tokens = 0;
  int64_t reused_tokens = 0;  ///< of the prompt, from cached state
  int64_t tokens = 0;
};

class ChatSession {
 public:
  /// `loaded` must outlive the session.
  ChatSession(const LoadedModel& loaded, ChatSettings settings);

  /// What later answers go by.
  ChatSettings& settings() { return settings_; }
  /// Back to the system message and the tools.
  void reset();
  /// Puts another system message in front of the conversation; empty: none.
  void set_system(const std::string& text);
  /// The conversation in OpenAI's form.
  const text::PyJson& messages() const { return messages_; }
  /// Goes on from another conversation. Errors: InputError (naming `name`) where it is none;
  /// nothing is changed then.
  void set_messages(text::PyJson messages, const std::string& name);
  /// Takes the last answer away, so that answer() gives another; false when there is none. It comes
  /// back where answer() is interrupted before the first token.
  bool take_answer();
  void add_user(std::string_view text);
  /// The result of call `index` of the last answer.
  void add_tool_result(size_t index, std::string_view text);

  /// Lets the model speak and adds what it said to the history, tool calls of well-formed answers
  /// only. Interrupted before the first token, the history loses what was added since the last
  /// answer; so it does, with an InputError, when the prompt has no room in the model's positions.
  /// `stop` is asked many times a second.
  Answer answer(const std::function<void(const text::CompletionEvent&)>& on_event,
                const StopFunction& stop);

 private:
  const LoadedModel& loaded_;
  ChatSettings settings_;
  AnswerEngine engine_;
  text::PyJson messages_;
  std::optional<text::PyJson> taken_;  ///< by take_answer()
  size_t answered_ = 0;                ///< messages that an interrupted answer leaves
  int64_t num_calls_ = 0;              ///< of the whole conversation, for ids
  int64_t first_call_ = 0;
};

}  // namespace hadal::apps
