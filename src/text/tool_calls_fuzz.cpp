// libFuzzer target: parse_completion() and CompletionParser agree on any bytes and any cutting, and
// nothing crashes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "text/chat_tokens.h"
#include "text/completion_check.h"

namespace hadal::text {
namespace {

/// Bytes that never occur in UTF-8 stand for pieces of markup, so that the fuzzer reaches the
/// grammar quickly.
std::string expand(std::string_view data) {
  static const std::string pieces[] = {std::string(tool_block_start()),
                                       std::string(dsml::kInvoke),
                                       std::string(dsml::kInvokeEnd),
                                       std::string(dsml::kParameter),
                                       "<" + std::string(dsml::kParameterEnd),
                                       std::string(dsml::kBlockEnd),
                                       " name=\"a\"",
                                       " string=\"true\"",
                                       std::string(dsml::kTagEnd),
                                       std::string(kEos),
                                       std::string(kThinkEnd)};
  std::string text;
  for (const char c : data) {
    const auto byte = static_cast<uint8_t>(c);
    if (byte >= 0xF5) {
      text += pieces[byte - 0xF5];
    } else {
      text += c;
    }
  }
  return text;
}

}  // namespace
}  // namespace hadal::text

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 2, size - 2);
  const std::string text = (data[0] & 1) != 0 ? hadal::text::expand(rest) : std::string(rest);
  const hadal::text::ThinkingMode mode =
      (data[0] & 2) != 0 ? hadal::text::ThinkingMode::kThinking : hadal::text::ThinkingMode::kChat;
  std::minstd_rand random(data[1] + 1u);
  std::vector<size_t> cuts;
  const size_t stride = 1 + data[1] % 32;
  for (size_t cut = random() % stride; cut < text.size(); cut += 1 + random() % stride)
    cuts.push_back(cut);
  if (const std::string wrong = hadal::text::check_cutting(text, mode, cuts); !wrong.empty()) {
    std::fprintf(stderr, "%s\n", wrong.c_str());
    std::abort();
  }
  return 0;
}
