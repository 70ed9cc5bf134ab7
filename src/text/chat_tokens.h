// The special strings of the chat encoding (chat_encoding.md 1). Ids are looked up by string in the
// tokenizer at hand.
#pragma once

#include <array>
#include <string_view>

namespace hadal::text {

inline constexpr std::string_view kBos = "<\uff5cbegin\u2581of\u2581sentence\uff5c>";
inline constexpr std::string_view kEos = "<\uff5cend\u2581of\u2581sentence\uff5c>";
inline constexpr std::string_view kPad = "<\uff5c\u2581pad\u2581\uff5c>";
inline constexpr std::string_view kUser = "<\uff5cUser\uff5c>";
inline constexpr std::string_view kAssistant = "<\uff5cAssistant\uff5c>";
inline constexpr std::string_view kThinkStart = "<think>";
inline constexpr std::string_view kThinkEnd = "</think>";
inline constexpr std::string_view kDsml = "\uff5cDSML\uff5c";
inline constexpr std::string_view kLatestReminder = "<\uff5clatest_reminder\uff5c>";

/// Quick-instruction tasks: the value of a message's `task` and its token.
struct TaskToken {
  std::string_view task;
  std::string_view token;
};
inline constexpr std::array<TaskToken, 6> kTaskTokens = {{{"action", "<\uff5caction\uff5c>"},
                                                          {"query", "<\uff5cquery\uff5c>"},
                                                          {"authority", "<\uff5cauthority\uff5c>"},
                                                          {"domain", "<\uff5cdomain\uff5c>"},
                                                          {"title", "<\uff5ctitle\uff5c>"},
                                                          {"read_url", "<\uff5cread_url\uff5c>"}}};
/// Never written by the encoder; callers embed it in the content of a read_url task.
inline constexpr std::string_view kExtractedUrl = "<\uff5cextracted_url\uff5c>";

/// Every token above beyond the three ids 0 to 2, in the order of the official ids.
inline constexpr std::array<std::string_view, 13> kChatTokens = {kUser,
                                                                 kAssistant,
                                                                 kThinkStart,
                                                                 kThinkEnd,
                                                                 kDsml,
                                                                 kLatestReminder,
                                                                 kTaskTokens[0].token,
                                                                 kTaskTokens[1].token,
                                                                 kTaskTokens[2].token,
                                                                 kTaskTokens[3].token,
                                                                 kTaskTokens[4].token,
                                                                 kExtractedUrl,
                                                                 kTaskTokens[5].token};

}  // namespace hadal::text
