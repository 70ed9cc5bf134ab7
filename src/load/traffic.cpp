#include "load/traffic.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/philox.h"

namespace hadal::load {
namespace {

using Json = nlohmann::json;

/// What random numbers are for; the words of each request have a stream of their own behind these.
enum Stream : uint64_t {
  kGaps,
  kContents,
  kPromptLengths,
  kOutputLengths,
  kShared,
  kSlow,
  kCancel,
  kPrefixWords,
  kWords = uint64_t{1} << 32,
};

/// Prompts are made of pieces of so many words from random places: prose to a model, yet two
/// requests agree in more than a piece only where they are meant to.
constexpr int64_t kPieceWords = 16;
constexpr int64_t kMaxCancelAfter = 8;
constexpr int64_t kMaxTextBytes = int64_t{64} << 20;

constexpr std::string_view kProse =
    "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money "
    "in "
    "my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world. It is a way I have of driving off the spleen and "
    "regulating the circulation. Whenever I find myself growing grim about the mouth; whenever it "
    "is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before "
    "coffin warehouses, and bringing up the rear of every funeral I meet; and especially whenever "
    "my hypos get such an upper hand of me, that it requires a strong moral principle to prevent "
    "me from deliberately stepping into the street, and methodically knocking people's hats off - "
    "then, I account it high time to get to sea as soon as I can. This is my substitute for pistol "
    "and ball. With a philosophical flourish Cato throws himself upon his sword; I quietly take to "
    "the ship. There is nothing surprising in this. If they but knew it, almost all men in their "
    "degree, some time or other, cherish very nearly the same feelings towards the ocean with me.";

std::vector<std::string_view> split_words(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\f\v";
  std::vector<std::string_view> words;
  while (true) {
    const size_t begin = text.find_first_not_of(kSpace);
    if (begin == std::string_view::npos) return words;
    text.remove_prefix(begin);
    const size_t end = std::min(text.find_first_of(kSpace), text.size());
    words.push_back(text.substr(0, end));
    text.remove_prefix(end);
  }
}

int64_t index_below(const Philox& random, int64_t counter, int64_t count) {
  const double u = random.uniform(static_cast<uint64_t>(counter));
  return std::min(count - 1, static_cast<int64_t>(u * static_cast<double>(count)));
}

}  // namespace

Traffic::Traffic(TrafficOptions options) : options_(std::move(options)) {
  text_ = options_.text.empty() ? std::string(kProse) : read_file(options_.text, kMaxTextBytes);
  words_ = split_words(text_);
  HADAL_INPUT_CHECK(!words_.empty(), options_.text, ": no words in it");
  if (!options_.extra.empty())
    HADAL_INPUT_CHECK(parse_json(options_.extra, "bench serve: --extra")->is_object(),
                      "bench serve: --extra: expected a JSON object, found ", options_.extra);
}

std::string Traffic::words(uint64_t stream, int64_t count) const {
  const Philox random(options_.seed, stream);
  const auto total = static_cast<int64_t>(words_.size());
  std::string result;
  int64_t next = 0;
  for (int64_t i = 0; i < count; ++i, ++next) {
    if (i % kPieceWords == 0) next = index_below(random, i / kPieceWords, total);
    if (i > 0) result += ' ';
    result += words_[static_cast<size_t>(next % total)];
  }
  return result;
}

std::string Traffic::body(int64_t content) const {
  const auto key = static_cast<uint64_t>(content);
  const Philox lengths(options_.seed, kPromptLengths), outputs(options_.seed, kOutputLengths);
  const std::string prompt = words(kWords + key, options_.prompt.draw(lengths.block(key)));
  std::string prefix;
  if (Philox(options_.seed, kShared).uniform(key) < options_.shared_share)
    prefix = words(kPrefixWords, options_.shared_prefix);

  Json json = {{"model", options_.model},
               {"max_tokens", options_.output.draw(outputs.block(key))},
               {"temperature", options_.temperature},
               {"seed", content},
               {"stream", true},
               {"stream_options", {{"include_usage", true}}}};
  if (options_.chat) {
    Json messages = Json::array();
    if (!prefix.empty()) messages.push_back({{"role", "system"}, {"content", prefix}});
    messages.push_back({{"role", "user"}, {"content", prompt}});
    json["messages"] = std::move(messages);
  } else {
    json["prompt"] = prefix.empty() ? prompt : prefix + ' ' + prompt;
  }
  if (!options_.extra.empty()) json.update(Json::parse(options_.extra));
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

PlannedRequest Traffic::request(int64_t index) const {
  const auto key = static_cast<uint64_t>(index);
  // Each of the distinct requests comes once before any comes again, so that a run over as many
  // requests as there are distinct ones records every answer.
  int64_t content = index;
  if (options_.distinct > 0 && index >= options_.distinct)
    content = index_below(Philox(options_.seed, kContents), index, options_.distinct);
  PlannedRequest request{.index = index, .body = body(content)};
  request.hash = fnv1a64(request.body);
  request.slow = Philox(options_.seed, kSlow).uniform(key) < options_.slow_share;
  const Philox cancel(options_.seed, kCancel);
  if (cancel.uniform(2 * key) < options_.cancel_share)
    request.cancel_after = 1 + index_below(cancel, 2 * index + 1, kMaxCancelAfter);
  return request;
}

double Traffic::gap(int64_t index) const {
  if (!options_.poisson) return index == 0 ? 0.0 : 1 / options_.rate;
  const double u = Philox(options_.seed, kGaps).uniform(static_cast<uint64_t>(index));
  return -std::log1p(-u) / options_.rate;
}

}  // namespace hadal::load
