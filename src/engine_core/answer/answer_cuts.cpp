#include "engine_core/answer/answer_cuts.h"

#include <algorithm>
#include <mutex>
#include <string_view>

namespace hadal::engine_core {
namespace {

uint64_t chain(uint64_t state, int64_t token) {
  state = (state ^ static_cast<uint64_t>(token)) * 0x9e3779b97f4a7c15ull;
  return state ^ (state >> 29);
}

}  // namespace

int64_t AnswerCuts::bytes_of(const std::vector<int32_t>& answer) {
  return std::ssize(answer) * 4 + 128;  // with its places in list, map and order
}

void AnswerCuts::remember(std::span<const int64_t> prompt, std::span<const int64_t> answer) {
  uint64_t hash = 0;
  for (const int64_t token : prompt) hash = chain(hash, token);
  std::vector<int32_t> tokens(answer.begin(), answer.end());
  const std::unique_lock lock(mutex_);
  Answers& same = answers_[hash];
  if (const auto known = std::ranges::find(same, tokens); known != same.end()) {
    same.splice(same.begin(), same, known);
    return;
  }
  bytes_ += bytes_of(tokens);
  same.push_front(std::move(tokens));
  order_.push_back(hash);
  while (bytes_ > max_bytes_) {
    const auto oldest = answers_.find(order_.front());
    order_.pop_front();
    bytes_ -= bytes_of(oldest->second.back());
    oldest->second.pop_back();
    if (oldest->second.empty()) answers_.erase(oldest);
  }
}

int64_t AnswerCuts::num_bytes() const {
  const std::shared_lock lock(mutex_);
  return bytes_;
}

AnswerCuts::Aligned AnswerCuts::align(std::span<const int32_t> answer,
                                      std::span<const int64_t> text) const {
  Aligned now, best;
  std::string_view mine, theirs;  // bytes of the last token of each that are left
  const auto is_text = [&](int64_t token) {
    return !tokenizer_.is_added(static_cast<int32_t>(token));
  };
  for (;;) {
    if (mine.empty() && theirs.empty()) {
      best = now;
      if (now.answer == answer.size() || now.text == text.size()) return best;
      if (!is_text(answer[now.answer]) || !is_text(text[now.text])) {
        if (answer[now.answer++] != text[now.text++]) return best;
        continue;
      }
    }
    if (mine.empty()) {
      if (now.answer == answer.size() || !is_text(answer[now.answer])) return best;
      mine = tokenizer_.token_bytes(answer[now.answer++]);
    }
    if (theirs.empty()) {
      if (now.text == text.size() || !is_text(text[now.text])) return best;
      theirs = tokenizer_.token_bytes(static_cast<int32_t>(text[now.text++]));
    }
    const size_t both = std::min(mine.size(), theirs.size());
    if (both == 0 || mine.substr(0, both) != theirs.substr(0, both)) return best;
    mine.remove_prefix(both);
    theirs.remove_prefix(both);
  }
}

std::vector<int64_t> AnswerCuts::recall(std::span<const int64_t> prompt) const {
  const std::shared_lock lock(mutex_);
  std::vector<int64_t> out;
  out.reserve(prompt.size());
  uint64_t hash = 0;
  const auto add = [&](int64_t token) {
    out.push_back(token);
    hash = chain(hash, token);
  };
  while (!prompt.empty()) {
    Aligned best;
    const std::vector<int32_t>* written = nullptr;
    const auto known = out.empty() ? answers_.end() : answers_.find(hash);
    if (known != answers_.end()) {
      for (const std::vector<int32_t>& answer : known->second) {
        const Aligned aligned = align(answer, prompt);
        if (aligned.text <= best.text) continue;
        best = aligned;
        written = &answer;
      }
    }
    if (written != nullptr) {
      for (size_t i = 0; i < best.answer; ++i) add((*written)[i]);
      prompt = prompt.subspan(best.text);
      continue;
    }
    add(prompt.front());
    prompt = prompt.subspan(1);
  }
  return out;
}

}  // namespace hadal::engine_core
