#include "text/pre_tokenizer.h"

#include <cstdint>
#include <utility>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/check.h"
#include "text/official_splitter.h"

namespace hadal::text {
namespace {

// White_Space of Unicode, which `\s` means to the library that defined the ids; PCRE2's own `\s`
// has U+180E as well.
constexpr std::string_view kSpaceSet =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029})"
    R"(\x{202f}\x{205f}\x{3000})";

/// The expression with `\s` and `\S` spelled out (a `\S` inside a class stays PCRE2's).
std::string spell_out_spaces(std::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      if (escaped == 's') {
        out += in_class ? std::string(kSpaceSet) : concat("[", kSpaceSet, "]");
      } else if (escaped == 'S' && !in_class) {
        out += concat("[^", kSpaceSet, "]");
      } else {
        out += {c, escaped};
      }
      continue;
    }
    if (c == '[' && !in_class) {
      in_class = true;
      // A bracket right behind the opening one is an ordinary character.
      out += c;
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out += pattern[++i];
      continue;
    }
    if (c == ']') in_class = false;
    out += c;
  }
  return out;
}

std::string pcre2_message(int code) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

class PreTokenizer::Regex {
 public:
  explicit Regex(const std::string& pattern) {
    const std::string spelled = spell_out_spaces(pattern);
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelled.data()), spelled.size(),
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
    HADAL_INPUT_CHECK(code_ != nullptr, "pre-tokeniser: expression '", pattern,
                      "': ", pcre2_message(error), " (near byte ", offset, ")");
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // without JIT the interpreter runs
  }

  /// Appends matches and gaps of one piece.
  void split(std::string_view piece, std::vector<std::string_view>& out) const {
    const std::unique_ptr<pcre2_match_data, MatchDelete> match(
        pcre2_match_data_create_from_pattern(code_.get(), nullptr));
    HADAL_CHECK(match != nullptr, "pre-tokeniser: no memory for a match");
    size_t done = 0;   // everything before is written
    size_t start = 0;  // where to look next
    while (start < piece.size()) {
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(piece.data()),
                                    piece.size(), start, PCRE2_NO_UTF_CHECK, match.get(), nullptr);
      if (found == PCRE2_ERROR_NOMATCH) break;
      HADAL_INPUT_CHECK(found >= 0, "pre-tokeniser: matching failed: ", pcre2_message(found));
      const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(match.get());
      const size_t first = ends[0];
      const size_t last = ends[1];
      if (last <= first) {  // an empty match cuts nothing
        start = first + (first < piece.size() ? decode_utf8(piece, first).length : 1);
        continue;
      }
      if (first > done) out.push_back(piece.substr(done, first - done));
      out.push_back(piece.substr(first, last - first));
      done = start = last;
    }
    if (done < piece.size()) out.push_back(piece.substr(done));
  }

 private:
  struct CodeDelete {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  };
  struct MatchDelete {
    void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
  };
  std::unique_ptr<pcre2_code, CodeDelete> code_;
};

const std::vector<std::string>& PreTokenizer::official_patterns() {
  static const std::vector<std::string> patterns = {
      R"(\p{N}{1,3})", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
      R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^)"
      "\r\n"
      R"(\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[)"
      "\r\n"
      R"(]*|\s*[)"
      "\r\n"
      R"(]+|\s+(?!\S)|\s+)"};
  return patterns;
}

PreTokenizer::PreTokenizer(const std::vector<std::string>& patterns, bool use_fast_path)
    : official_(use_fast_path && patterns == official_patterns()) {
  if (official_) return;
  for (const std::string& pattern : patterns) stages_.emplace_back(pattern);
}

PreTokenizer::~PreTokenizer() = default;
PreTokenizer::PreTokenizer(PreTokenizer&&) noexcept = default;
PreTokenizer& PreTokenizer::operator=(PreTokenizer&&) noexcept = default;

std::vector<std::string_view> PreTokenizer::split(std::string_view text) const {
  std::vector<std::string_view> pieces;
  if (text.empty()) return pieces;
  if (official_) {
    OfficialSplitter splitter(text);
    std::string_view piece;
    while (splitter.next(piece)) pieces.push_back(piece);
    return pieces;
  }
  pieces.push_back(text);
  for (const Regex& stage : stages_) {
    std::vector<std::string_view> next;
    for (const std::string_view piece : pieces) stage.split(piece, next);
    pieces = std::move(next);
  }
  return pieces;
}

}  // namespace hadal::text
