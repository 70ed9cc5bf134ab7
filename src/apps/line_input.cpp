#include "apps/line_input.h"

#include <algorithm>
#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <cwchar>
#include <filesystem>
#include <histedit.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "apps/interrupt.h"

namespace hadal::apps {
namespace {

constexpr int kHistoryLines = 1000;

class PlainLines final : public LineInput {
 public:
  State next(const std::string&, std::string& line) override {
    for (;;) {
      if (const size_t newline = buffer_.find('\n'); newline != std::string::npos) {
        line = buffer_.substr(0, newline);
        buffer_.erase(0, newline + 1);
        if (line.ends_with('\r')) line.pop_back();
        return State::kLine;
      }
      char piece[4096];
      if (!wait_for_input(STDIN_FILENO)) return State::kInterrupted;
      const ssize_t got = ::read(STDIN_FILENO, piece, sizeof(piece));
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

/// Whether Ctrl-C ended the last read of a character. There is one terminal.
bool read_interrupted = false;

/// One character of the terminal: 1, 0 at the end of the input, -1 with EINTR at Ctrl-C. The
/// library's own reader would try again after a signal.
int read_character(EditLine*, wchar_t* out) {
  // A byte that ended a character before its time; it begins the next one. There is one terminal.
  static int held = -1;
  std::mbstate_t state = {};
  for (bool first = true;; first = false) {
    char byte = 0;
    if (held >= 0) {
      byte = static_cast<char>(std::exchange(held, -1));
    } else if (!wait_for_input(STDIN_FILENO)) {
      read_interrupted = true;
      errno = EINTR;
      return -1;
    } else if (const ssize_t got = ::read(STDIN_FILENO, &byte, 1); got <= 0) {
      return static_cast<int>(got);
    }
    const size_t used = std::mbrtowc(out, &byte, 1, &state);
    if (used == static_cast<size_t>(-2)) continue;  // more bytes belong to it
    if (used == static_cast<size_t>(-1)) {
      if (!first) held = static_cast<unsigned char>(byte);
      *out = L'\uFFFD';
    }
    return 1;
  }
}

unsigned char insert_newline(EditLine* editor, int) {
  return el_winsertstr(editor, L"\n") == 0 ? CC_REFRESH : CC_ERROR;
}

/// libedit speaks to its owner through one pointer and C functions.
class EditedLines final : public LineInput {
 public:
  EditedLines(std::vector<std::string> commands, std::string history)
      : commands_(std::move(commands)), file_(std::move(history)) {
    std::setlocale(LC_CTYPE, "");
    if (MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
    editor_ = el_init("hadal", stdin, stdout, stderr);
    history_ = history_init();
    if (editor_ == nullptr || history_ == nullptr) return;
    HistEvent event;
    ::history(history_, &event, H_SETSIZE, kHistoryLines);
    ::history(history_, &event, H_SETUNIQUE, 1);
    if (!file_.empty()) ::history(history_, &event, H_LOAD, file_.c_str());
    el_set(editor_, EL_CLIENTDATA, this);
    el_set(editor_, EL_EDITOR, "emacs");
    el_set(editor_, EL_PROMPT, &EditedLines::prompt_of);
    el_set(editor_, EL_GETCFN, &read_character);
    el_set(editor_, EL_HIST, ::history, history_);
    el_set(editor_, EL_ADDFN, "hadal-newline", "insert a newline", &insert_newline);
    el_set(editor_, EL_ADDFN, "hadal-paste", "insert pasted text", &EditedLines::insert_pasted);
    el_set(editor_, EL_ADDFN, "hadal-complete", "complete a command", &EditedLines::complete);
    el_set(editor_, EL_BIND, "\\e\\n", "hadal-newline", nullptr);
    el_set(editor_, EL_BIND, "\\e\\r", "hadal-newline", nullptr);
    el_set(editor_, EL_BIND, "\\e[200~", "hadal-paste", nullptr);
    el_set(editor_, EL_BIND, "\t", "hadal-complete", nullptr);
    el_set(editor_, EL_BIND, "^R", "em-inc-search-prev", nullptr);
    el_source(editor_, nullptr);  // the user's own ~/.editrc
  }
  ~EditedLines() override {
    if (editor_ != nullptr) el_end(editor_);
    if (history_ != nullptr) history_end(history_);
  }
  EditedLines(const EditedLines&) = delete;
  EditedLines& operator=(const EditedLines&) = delete;

  State next(const std::string& prompt, std::string& line) override {
    if (editor_ == nullptr) return plain_.next(prompt, line);
    line.clear();
    prompt_ = prompt;
    for (;;) {
      // By itself the library does so only behind the prompt; what is typed in between would be
      // echoed and edited by the terminal, which takes back bytes, not characters.
      el_set(editor_, EL_PREP_TERM, 1);
      set_paste_mode(true);
      int count = 0;
      read_interrupted = false;
      const char* got = el_gets(editor_, &count);
      set_paste_mode(false);
      if (got == nullptr || count <= 0) {
        const bool interrupted = std::exchange(read_interrupted, false);
        if (interrupted) el_reset(editor_);
        if (line.empty() || interrupted) return interrupted ? State::kInterrupted : State::kEnd;
        break;
      }
      std::string piece(got, static_cast<size_t>(count));
      while (piece.ends_with('\n')) piece.pop_back();
      const bool goes_on = piece.ends_with('\\');
      if (goes_on) piece.back() = '\n';
      line += piece;
      if (!goes_on) break;
      prompt_ = std::string(prompt.size() - std::min<size_t>(prompt.size(), 2), ' ') + ". ";
    }
    keep(line);
    return State::kLine;
  }

 private:
  static EditedLines& of(EditLine* editor) {
    void* self = nullptr;
    el_get(editor, EL_CLIENTDATA, &self);
    return *static_cast<EditedLines*>(self);
  }
  static char* prompt_of(EditLine* editor) { return of(editor).prompt_.data(); }

  /// Behind ESC [ 200 ~ comes what was pasted, up to ESC [ 201 ~: text, whatever it looks like.
  static unsigned char insert_pasted(EditLine* editor, int) {
    const std::wstring end = L"\33[201~";
    std::wstring text;
    wchar_t character = 0;
    while (!text.ends_with(end)) {
      if (read_character(editor, &character) != 1) return CC_EOF;
      text.push_back(character == L'\r' ? L'\n' : character);
    }
    text.resize(text.size() - end.size());
    std::erase_if(text, [](wchar_t c) { return (c < 32 && c != L'\n' && c != L'\t') || c == 127; });
    while (text.ends_with(L'\n')) text.pop_back();
    if (text.empty()) return CC_NORM;
    return el_winsertstr(editor, text.c_str()) == 0 ? CC_REFRESH : CC_ERROR;
  }

  static unsigned char complete(EditLine* editor, int) {
    const LineInfo* info = el_line(editor);
    const std::string before(info->buffer, info->cursor);
    if (!before.starts_with('/')) return el_insertstr(editor, "\t") == 0 ? CC_REFRESH : CC_ERROR;
    std::string common;
    size_t found = 0;
    for (const std::string& command : of(editor).commands_) {
      if (!command.starts_with(before)) continue;
      if (found++ == 0) common = command + " ";
      const auto end = std::mismatch(common.begin(), common.end(), command.begin(), command.end());
      if (found > 1) common.erase(end.first, common.end());
    }
    if (common.size() <= before.size()) return CC_ERROR;  // rings the bell
    return el_insertstr(editor, common.c_str() + before.size()) == 0 ? CC_REFRESH : CC_ERROR;
  }
  /// Terminals that know bracketed paste mark what was pasted.
  static void set_paste_mode(bool on) {
    std::fputs(on ? "\33[?2004h" : "\33[?2004l", stdout);
    std::fflush(stdout);
  }
  void keep(const std::string& line) {
    if (line.find_first_not_of(" \t\n") == std::string::npos) return;
    HistEvent event;
    ::history(history_, &event, H_ENTER, line.c_str());
    if (file_.empty()) return;
    const mode_t before = ::umask(077);
    std::error_code ignored;
    std::filesystem::create_directories(std::filesystem::path(file_).parent_path(), ignored);
    ::history(history_, &event, H_SAVE, file_.c_str());
    ::umask(before);
  }

  std::vector<std::string> commands_;
  std::string file_, prompt_;
  EditLine* editor_ = nullptr;
  History* history_ = nullptr;
  PlainLines plain_;
};

}  // namespace

std::unique_ptr<LineInput> plain_lines() { return std::make_unique<PlainLines>(); }

std::unique_ptr<LineInput> edited_lines(std::vector<std::string> commands,
                                        const std::string& history) {
  return std::make_unique<EditedLines>(std::move(commands), history);
}

std::string history_path() {
  const char* state = std::getenv("XDG_STATE_HOME");
  if (state != nullptr && *state == '/') return std::string(state) + "/hadal/chat_history";
  const char* home = std::getenv("HOME");
  if (home == nullptr || *home != '/') return "";
  return std::string(home) + "/.local/state/hadal/chat_history";
}

}  // namespace hadal::apps
