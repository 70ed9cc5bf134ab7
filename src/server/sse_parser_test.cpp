#include "server/sse_parser.h"

#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::server {
namespace {

using Events = std::vector<std::pair<std::string, std::string>>;

Events parse(const std::vector<std::string_view>& pieces) {
  Events events;
  SseParser parser;
  for (const std::string_view piece : pieces)
    parser.feed(piece, [&](const SseEvent& event) { events.emplace_back(event.type, event.data); });
  return events;
}

constexpr std::string_view kStream =
    "\xef\xbb\xbf"
    "data: one\n\n"
    ": a comment\r\n\r\n"
    "event: delta\rdata:two\rdata:  three\r\r"
    "id: 7\nretry: 10\nunknown: x\ndata\n\n"
    "event: nothing\n\n"
    "data: {\"a\": \"b:c\"}\r\n\r\n"
    "data: never ended\n";
const Events kEvents = {{"", "one"}, {"delta", "two\n three"}, {"", ""}, {"", "{\"a\": \"b:c\"}"}};

TEST(SseParser, ReadsEveryFormOfLine) { EXPECT_EQ(parse({kStream}), kEvents); }

TEST(SseParser, IsTheSameAtEverySplit) {
  for (size_t i = 0; i <= kStream.size(); ++i)
    for (size_t j = i; j <= kStream.size(); ++j)
      ASSERT_EQ(parse({kStream.substr(0, i), kStream.substr(i, j - i), kStream.substr(j)}), kEvents)
          << i << " " << j;
  std::vector<std::string_view> bytes;
  for (size_t i = 0; i < kStream.size(); ++i) bytes.push_back(kStream.substr(i, 1));
  EXPECT_EQ(parse(bytes), kEvents);
}

TEST(SseParser, KnowsWhenAnEventIsUnfinished) {
  SseParser parser;
  const SseParser::Sink ignore = [](const SseEvent&) {};
  EXPECT_FALSE(parser.in_event());
  parser.feed("da", ignore);
  EXPECT_TRUE(parser.in_event());
  parser.feed("ta: x\n", ignore);
  EXPECT_TRUE(parser.in_event());
  parser.feed("\n", ignore);
  EXPECT_FALSE(parser.in_event());
}

TEST(SseParser, RefusesWhatGrowsWithoutEnd) {
  const SseParser::Sink ignore = [](const SseEvent&) {};
  SseParser line(100);
  EXPECT_THROW(line.feed(std::string(101, 'x'), ignore), InputError);
  SseParser event(100);
  const auto repeat = [&] {
    for (int i = 0; i < 20; ++i) event.feed("data: 0123456789\n", ignore);
  };
  EXPECT_THROW(repeat(), InputError);
}

}  // namespace
}  // namespace hadal::server
