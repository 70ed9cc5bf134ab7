// Between tokens and text: structure by ids, stop strings in what is visible, the end of the
// thinking.
#include "engine_core/answer/answer_text.h"

#include <gtest/gtest.h>

#include "engine_core/answer/answer_filters.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"

namespace hadal::engine_core {
namespace {

const text::Tokenizer& tokenizer() {
  static const text::Tokenizer tiny =
      text::Tokenizer::from_json(testing::byte_tokenizer_json(), "tiny");
  return tiny;
}

/// All that comes of a text whose literals are special tokens; `|` where the stop string ended it.
std::string read(const Request& request, std::string_view text) {
  AnswerText answer(tokenizer(), request);
  std::string out;
  for (const int32_t id : tokenizer().encode(text, text::SpecialTokens::kRecognise)) {
    out += answer.push(id);
    if (answer.stopped()) return out + "|";
  }
  return out + answer.finish();
}

TEST(AnswerText, StopStringsSeeTheContentOfAChat) {
  Request request;
  request.stop = {"ab", "\n\n"};
  request.structured = request.thinking = true;
  const std::string end(text::kThinkEnd), marker(text::kDsml);
  EXPECT_EQ(read(request, "ab\n\n" + end + "c\n\n<" + marker + "ab\n\n"), "ab\n\nc\n\n<ab\n\n");
  EXPECT_EQ(read(request, "a" + end + "b"), "ab");  // not across the thinking's end
  EXPECT_EQ(read(request, "x" + end + "c\n\nd"), "xc|");
  EXPECT_EQ(read(request, "x" + end + "c ab"), "xc |");
  EXPECT_EQ(read(request, "x" + end + "c\n\n"), "xc");
  // Where tokens are all text, so are these.
  request.structured = request.thinking = false;
  EXPECT_EQ(read(request, "x" + end + "a"), "x" + end + "a");
  EXPECT_EQ(read(request, "x\n\n" + end), "x|");
}

TEST(AnswerText, AThinkingBudgetForcesItsEnd) {
  TextFilters filters(tokenizer());
  Request request;
  request.structured = request.thinking = true;
  request.thinking_budget = 2;
  const int32_t end = tokenizer().id_of(text::kThinkEnd), letter = tokenizer().id_of("x");
  const auto filter = filters.create(request);
  for (int i = 0; i < 2; ++i) {
    EXPECT_TRUE(filter->masks({}).front().empty());
    filter->accept(letter);
  }
  const auto mask = filter->masks({}).front();
  for (int32_t id = 0; id < tokenizer().vocab_size(); ++id) {
    const auto word = static_cast<uint32_t>(mask[static_cast<size_t>(id) / 32]);
    EXPECT_EQ((word >> id % 32 & 1u) != 0, id == end) << id;
  }
  filter->accept(end);
  EXPECT_TRUE(filter->masks({}).front().empty());
}

// Along a draft a filter says what it would say had the draft been accepted, and forgets it again.
TEST(AnswerText, MasksAlongADraftAreThoseBehindItsTokens) {
  TextFilters filters(tokenizer());
  Request request;
  request.structured = request.thinking = true;
  request.thinking_budget = 3;
  request.grammar = {.kind = Grammar::Kind::kRegex, .text = "(ab|cd)*"};
  const auto copied = [](std::span<const int32_t> mask) {
    return std::vector<int32_t>(mask.begin(), mask.end());
  };
  const int64_t end = tokenizer().id_of(text::kThinkEnd);
  const auto letter = [](const char* text) { return int64_t{tokenizer().id_of(text)}; };
  const std::vector<int64_t> answer = {letter("x"), letter("y"), end,        letter("a"),
                                       letter("b"), letter("c"), letter("d")};
  const auto plain = filters.create(request), drafted = filters.create(request);
  for (size_t done = 0; done < answer.size(); ++done) {
    for (size_t length = 0; done + length <= answer.size(); ++length) {
      const auto draft = std::span(answer).subspan(done, length);
      const auto ahead = filters.create(request);
      for (size_t i = 0; i < done; ++i) ahead->accept(answer[i]);
      const auto masks = drafted->masks(draft);
      ASSERT_EQ(masks.size(), 1 + length);
      for (size_t i = 0; i <= length; ++i) {
        EXPECT_EQ(copied(masks[i]), copied(ahead->masks({}).front())) << done << " " << i;
        if (i < length) ahead->accept(draft[i]);
      }
    }
    // A draft that may not follow is no error, and changes nothing.
    const std::vector<int64_t> wrong = {done < 3 ? answer[done] : letter("z"), letter("z")};
    EXPECT_EQ(drafted->masks(wrong).size(), 3u);
    EXPECT_EQ(copied(drafted->masks({}).front()), copied(plain->masks({}).front()));
    plain->accept(answer[done]);
    drafted->accept(answer[done]);
  }
}

TEST(AnswerText, AnEndInsideTheReasoningClosesItWhereAsked) {
  TextFilters filters(tokenizer());
  Request request;
  request.structured = request.thinking = true;
  const int32_t end = tokenizer().id_of(text::kThinkEnd), eos = tokenizer().id_of(text::kEos);
  EXPECT_EQ(filters.create(request)->decide(eos), eos);
  request.close_reasoning = true;
  const auto filter = filters.create(request);
  EXPECT_EQ(filter->decide(eos), end);
  filter->accept(end);
  EXPECT_EQ(filter->decide(eos), eos);  // the content ends as ever
}

}  // namespace
}  // namespace hadal::engine_core
