// The conversation of a /v1/messages request, as its clients send it.
#pragma once

#include <string>
#include <vector>

#include "server/chat_job.h"

namespace hadal::server {

struct MessagesRequest {
  ChatJob chat;
  /// What was asked for and is left out: tools that would run on the server.
  std::vector<std::string> notes;
  bool omit_thinking = false;  ///< the reasoning goes into the signature alone
  bool context_edits = false;  ///< the client asked for edits of its context; none are made
};

/// Messages, tools, thinking and format. What the model cannot see (images, files) stands in the
/// prompt as "[Unsupported image]", as the official encoder writes it. Errors: RequestError.
///
/// A system message behind the first user message stays at its place: between an answer and a user
/// message it is what the official encoding knows, inside a user's turn it becomes a part of that
/// turn, since nothing else may stand between a turn and its answer.
MessagesRequest read_messages_request(const Context& context, const Fields& body);

}  // namespace hadal::server
