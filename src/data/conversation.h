// Conversations to tokens, with the tokens marked that a model is trained to write.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace hadal::data {

struct MarkedTokens {
  std::vector<int32_t> ids;
  std::vector<uint8_t> scored;  ///< 1: written by the assistant, its end of sentence included
};

/// One line of chat data: {"messages": [...], "tools"?: [...], "thinking_mode"?: "chat" or
/// "thinking" (default "chat")} in the message form of text/chat_format.h. Tokens of the official
/// encoding; what the messages hold never becomes a special token. Scored is what follows an
/// assistant mark and its thinking mark, up to and with the end of sentence. `origin` begins
/// messages of InputErrors.
MarkedTokens encode_conversation(std::string_view json,
                                 const std::string& origin,
                                 const text::Tokenizer& tokenizer);

}  // namespace hadal::data
