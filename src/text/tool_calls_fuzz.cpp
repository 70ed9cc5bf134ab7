// libFuzzer target: parse_completion() and CompletionParser agree on any bytes and any cutting, and
// nothing crashes. The first byte chooses mode and cuts, the second seeds the random cuts.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "text/completion_check.h"

namespace {

using hadal::text::ThinkingMode;

void require(const std::string& wrong) {
  if (wrong.empty()) return;
  std::fprintf(stderr, "%s\n", wrong.c_str());
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 2, size - 2);
  const std::string text =
      (data[0] & 1) != 0 ? hadal::text::expand_markup(rest) : std::string(rest);
  const ThinkingMode mode = (data[0] & 2) != 0 ? ThinkingMode::kThinking : ThinkingMode::kChat;
  const hadal::text::Completion whole = hadal::text::parse_completion(text, mode);
  require(check_cutting(text, mode, {}, whole));
  std::minstd_rand random(data[1] + 1u);
  std::vector<size_t> cuts;
  const size_t stride = 1 + random() % 32;  // 1: byte by byte
  for (size_t cut = random() % stride; cut < text.size(); cut += 1 + random() % stride)
    cuts.push_back(cut);
  require(check_cutting(text, mode, cuts, whole));
  // A few of the places where the text falls into two; where it is short, all of them.
  const size_t step = 1 + text.size() / 4;
  for (size_t cut = random() % step; cut < text.size(); cut += text.size() <= 40 ? 1 : step)
    require(check_cutting(text, mode, {cut}, whole));
  return 0;
}
