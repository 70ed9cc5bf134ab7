// Where a conversation's lines come from: a terminal with editing, history and pasting (libedit),
// or any other standard input, a line at a time.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace hadal::apps {

class LineInput {
 public:
  enum class State { kLine, kEnd, kInterrupted };

  virtual ~LineInput() = default;
  /// A line without its newline; on a terminal a message may hold several. kInterrupted: Ctrl-C.
  virtual State next(const std::string& prompt, std::string& line) = 0;
};

/// Standard input without a library's buffer, so that Ctrl-C can interrupt; of a last line without
/// newline, what there is.
std::unique_ptr<LineInput> plain_lines();

/// The terminal. A line that ends with a backslash goes on; Alt-Enter and pasted newlines stay in
/// the message. Tab completes `commands`. Earlier lines are read from and kept in `history`, a file
/// that only its owner may read; empty: nothing is kept.
std::unique_ptr<LineInput> edited_lines(std::vector<std::string> commands,
                                        const std::string& history);

/// chat_history in hadal's folder of XDG_STATE_HOME; empty where there is no home.
std::string history_path();

}  // namespace hadal::apps
