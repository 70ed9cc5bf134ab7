#include "engine_core/answer/answer_text.h"

#include <algorithm>
#include <utility>

#include "text/chat_tokens.h"
#include "text/completion_parser.h"

namespace hadal::engine_core {
namespace {

std::shared_ptr<const StopSet> stops_of(const Request& request) {
  if (request.stop.empty()) return nullptr;
  return std::make_shared<const StopSet>(request.stop);
}

}  // namespace

AnswerText::AnswerText(const text::Tokenizer& tokenizer, const Request& request)
    : tokenizer_(tokenizer), structured_(request.structured), stream_(stops_of(request)) {
  if (!structured_) return;
  const auto added = [&](std::string_view token) {
    const std::optional<int32_t> id = tokenizer.find(token);
    return id && tokenizer.is_added(*id) ? int64_t{*id} : int64_t{-1};
  };
  think_end_ = added(text::kThinkEnd);
  marker_ = added(text::kDsml);
  if (request.thinking) part_ = Part::kReasoning;
}

std::string AnswerText::push(int64_t token) {
  if (stopped()) return {};
  const auto id = static_cast<int32_t>(token);
  const std::string_view bytes = tokenizer_.token_bytes(id);
  if (!structured_) return stream_.push(bytes);
  if (part_ == Part::kReasoning) ++reasoning_tokens_;
  if (!tokenizer_.is_added(id))
    return part_ == Part::kContent ? push_content(bytes) : plain_.push(bytes);
  std::string out;
  if (token == marker_ && part_ == Part::kContent) {
    // What is held back is the call's.
    out = stream_.flush();
    if (!stopped()) out += std::exchange(gap_, {});
  } else {
    out = flush();
  }
  if (token == marker_) part_ = Part::kMarkup;
  if (token == think_end_ && part_ == Part::kReasoning) part_ = Part::kContent;
  return out;
}

std::string AnswerText::push_content(std::string_view bytes) {
  if (!stream_.watches()) return stream_.push(bytes);
  // The gap is ASCII, so it ends where a character does.
  gap_ += bytes;
  const size_t held = text::bytes_before_tag(gap_);
  std::string out = stream_.push(std::string_view(gap_).substr(0, gap_.size() - held));
  gap_.erase(0, gap_.size() - held);
  return out;
}

std::string AnswerText::flush() {
  std::string out = plain_.flush();
  out += stream_.push(std::exchange(gap_, {}));
  out += stream_.flush();
  return out;
}

std::string AnswerText::finish() {
  std::string out = plain_.flush();
  out += stream_.push(std::exchange(gap_, {}));
  return out + stream_.finish();
}

}  // namespace hadal::engine_core
