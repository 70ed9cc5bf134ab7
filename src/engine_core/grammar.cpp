#include "engine_core/grammar.h"

#include <algorithm>
#include <array>
#include <condition_variable>
#include <future>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <variant>
#include <xgrammar/xgrammar.h>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/json.h"
#include "engine_core/grammar_log.h"
#include "engine_core/grammar_marker.h"
#include "engine_core/grammar_pattern.h"
#include "engine_core/grammar_schema.h"
#include "engine_core/grammar_tools.h"
#include "text/chat_tokens.h"

namespace hadal::engine {
namespace {

constexpr std::string_view kEnd = text::kThinkEnd;
constexpr size_t kEndLength = kEnd.size();
constexpr std::string_view kMarker = text::kDsml;
constexpr size_t kMaxCompiling = 2;

/// A token that, with so much of kEnd before it, ends the thinking and brings more.
struct Border {
  int32_t token;
  size_t rest;  ///< where its bytes behind kEnd begin
};

/// Where a text stands between two characters (kWhole) or inside one: what may follow is UTF-8 or
/// it is not (Unicode 16, table 3-7). -1: it cannot be.
enum Utf8State : int8_t {
  kBroken = -1,
  kWhole,
  kOne,
  kTwo,
  kThree,
  kAfterE0,
  kAfterEd,
  kAfterF0,
  kAfterF4
};
constexpr int kUtf8States = 8;

int8_t step_utf8(int8_t state, uint8_t byte) {
  const auto in = [byte](uint8_t first, uint8_t last, int8_t next) {
    return byte >= first && byte <= last ? next : int8_t{kBroken};
  };
  switch (state) {
    case kWhole:
      if (byte < 0x80) return kWhole;
      if (byte >= 0xC2 && byte <= 0xDF) return kOne;
      if (byte == 0xE0) return kAfterE0;
      if (byte == 0xED) return kAfterEd;
      if (byte >= 0xE1 && byte <= 0xEF) return kTwo;
      if (byte == 0xF0) return kAfterF0;
      if (byte >= 0xF1 && byte <= 0xF3) return kThree;
      return byte == 0xF4 ? kAfterF4 : kBroken;
    case kOne:
      return in(0x80, 0xBF, kWhole);
    case kTwo:
      return in(0x80, 0xBF, kOne);
    case kThree:
      return in(0x80, 0xBF, kTwo);
    case kAfterE0:
      return in(0xA0, 0xBF, kOne);
    case kAfterEd:
      return in(0x80, 0x9F, kOne);
    case kAfterF0:
      return in(0x90, 0xBF, kTwo);
    case kAfterF4:
      return in(0x80, 0x8F, kTwo);
    default:
      return kBroken;
  }
}

/// The state behind `bytes`; a token without bytes (an added one) stands between characters only.
int8_t step_utf8(int8_t state, std::string_view bytes) {
  if (bytes.empty()) return state == kWhole ? kWhole : kBroken;
  for (const char byte : bytes) state = step_utf8(state, static_cast<uint8_t>(byte));
  return state;
}

/// What follows from the tokenizer alone.
struct Vocabulary {
  int64_t size = 0;
  int32_t eos = -1;
  std::vector<std::string> bytes;       ///< empty: never part of a match
  std::vector<uint32_t> thinking_mask;  ///< ordinary tokens and kEnd
  std::array<std::vector<Border>, kEndLength> borders;
  std::optional<xgrammar::TokenizerInfo> plain, with_dsml;

  size_t mask_words() const { return static_cast<size_t>((size + 31) / 32); }
  std::string_view bytes_with_dsml(size_t place) const {
    if (static_cast<int64_t>(place) == dsml) return kMarker;
    return place < bytes.size() ? std::string_view(bytes[place]) : std::string_view();
  }
  int64_t dsml = -1;  ///< the marker's own token
  /// The tokens that complete the marker, by how much of it the text ends with.
  std::array<std::vector<int32_t>, kMarker.size()> marker_ends;
  /// By Utf8State: the tokens behind which the text is still UTF-8.
  std::array<std::vector<uint32_t>, kUtf8States> utf8_masks;
};

std::shared_ptr<const Vocabulary> make_vocabulary(const text::Tokenizer& tokenizer, int64_t size) {
  auto result = std::make_shared<Vocabulary>();
  Vocabulary& vocabulary = *result;
  vocabulary.size = size == 0 ? tokenizer.vocab_size() : size;
  HADAL_CHECK(vocabulary.size >= tokenizer.vocab_size(), "grammar: a vocabulary of ", size,
              " tokens, the tokenizer has ", tokenizer.vocab_size());
  vocabulary.eos = tokenizer.id_of(text::kEos);
  const std::optional<int32_t> dsml = tokenizer.find(text::kDsml);
  const std::optional<int32_t> end = tokenizer.find(kEnd);
  vocabulary.bytes.resize(static_cast<size_t>(tokenizer.vocab_size()));
  vocabulary.thinking_mask.resize(vocabulary.mask_words());
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    if (tokenizer.is_added(id) && id != end) continue;
    const auto place = static_cast<size_t>(id);
    const std::string_view bytes = tokenizer.token_bytes(id);
    if (bytes.empty()) continue;
    vocabulary.thinking_mask[place / 32] |= 1u << place % 32;
    if (id == end && tokenizer.is_added(id)) continue;
    vocabulary.bytes[place] = bytes;
    if (bytes.find(kEnd.back()) == std::string_view::npos) continue;
    for (size_t before = 0; before < kEndLength; ++before) {
      size_t matched = before;
      for (size_t pos = 0; pos + 1 < bytes.size(); ++pos) {
        matched = step_match(kEnd, matched, bytes[pos]);
        if (matched < kEndLength) continue;
        vocabulary.borders[before].push_back({.token = id, .rest = pos + 1});
        break;
      }
    }
  }
  for (int8_t state = 0; state < kUtf8States; ++state) {
    std::vector<uint32_t>& mask = vocabulary.utf8_masks[static_cast<uint8_t>(state)];
    mask.resize(vocabulary.mask_words());
    for (size_t place = 0; place < static_cast<size_t>(vocabulary.size); ++place) {
      const std::string_view bytes =
          place < vocabulary.bytes.size() ? vocabulary.bytes[place] : std::string_view();
      if (step_utf8(state, bytes) != kBroken) mask[place / 32] |= 1u << place % 32;
    }
  }
  vocabulary.dsml = dsml.value_or(-1);
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    const std::string_view bytes = vocabulary.bytes_with_dsml(static_cast<size_t>(id));
    if (bytes.find(kMarker.back()) == std::string_view::npos) continue;
    for (size_t before = 0; before < kMarker.size(); ++before) {
      size_t matched = before;
      for (size_t pos = 0; pos < bytes.size() && matched < kMarker.size(); ++pos)
        matched = step_match(kMarker, matched, bytes[pos]);
      if (matched == kMarker.size()) vocabulary.marker_ends[before].push_back(id);
    }
  }
  const auto info = [&](const std::vector<std::string>& bytes) {
    return xgrammar::TokenizerInfo(bytes, xgrammar::VocabType::RAW,
                                   static_cast<int>(vocabulary.size),
                                   std::vector<int32_t>{vocabulary.eos});
  };
  vocabulary.plain = info(vocabulary.bytes);
  if (dsml.has_value()) {
    std::vector<std::string> bytes = vocabulary.bytes;
    bytes[static_cast<size_t>(*dsml)] = text::kDsml;
    vocabulary.with_dsml = info(bytes);
  } else {
    vocabulary.with_dsml = vocabulary.plain;
  }
  return result;
}

const char* kind_name(Grammar::Kind kind) {
  switch (kind) {
    case Grammar::Kind::kJsonObject:
      return "JSON object";
    case Grammar::Kind::kJsonSchema:
      return "JSON schema";
    case Grammar::Kind::kRegex:
      return "regular expression";
    case Grammar::Kind::kEbnf:
      return "EBNF grammar";
    case Grammar::Kind::kToolCalls:
      return "tools";
    case Grammar::Kind::kNone:
      break;
  }
  return "none";
}

xgrammar::Grammar read_grammar(const Grammar& grammar, const Vocabulary& vocabulary) {
  const std::string what = concat("grammar: ", kind_name(grammar.kind));
  switch (grammar.kind) {
    case Grammar::Kind::kJsonObject:
      return xgrammar::Grammar::FromJSONSchema(R"({"type":"object","additionalProperties":true})",
                                               true, std::nullopt, std::nullopt, true,
                                               kMaxWhitespace);
    case Grammar::Kind::kJsonSchema: {
      check_schema(*parse_json(grammar.text, what), what);
      auto schema = nlohmann::ordered_json::parse(grammar.text);
      const bool changed = prepare_strings(schema, false, what);
      return xgrammar::Grammar::FromJSONSchema(changed ? schema.dump() : grammar.text, true,
                                               std::nullopt, std::nullopt, true, kMaxWhitespace);
    }
    case Grammar::Kind::kRegex:
      check_pattern(grammar.text, what);
      return xgrammar::Grammar::FromRegex(grammar.text);
    case Grammar::Kind::kEbnf:
      check_pattern(grammar.text, what);
      return xgrammar::Grammar::FromEBNF(grammar.text);
    case Grammar::Kind::kToolCalls: {
      auto result = xgrammar::Grammar::FromStructuralTag(tool_calls_structural_tag(grammar.text),
                                                         vocabulary.with_dsml);
      if (const auto* error = std::get_if<xgrammar::StructuralTagError>(&result)) {
        std::visit([](const auto& e) { throw InputError(concat("grammar: tools: ", e.what())); },
                   *error);
      }
      return std::get<xgrammar::Grammar>(result);
    }
    case Grammar::Kind::kNone:
      break;
  }
  throw Error("grammar: nothing to compile");
}

}  // namespace

class CompiledGrammar {
 public:
  CompiledGrammar(std::shared_ptr<const Vocabulary> tokens,
                  xgrammar::CompiledGrammar grammar,
                  bool calls)
      : vocabulary(std::move(tokens)), compiled(std::move(grammar)), has_calls(calls) {}

  std::shared_ptr<const Vocabulary> vocabulary;
  xgrammar::CompiledGrammar compiled;
  bool has_calls;  ///< of tools: the marker has its place, which xgrammar's free text does not know
};

// --- GrammarCompiler
// -------------------------------------------------------------------------------

namespace {
using Key = std::pair<Grammar::Kind, std::string>;
using Result = std::shared_ptr<const CompiledGrammar>;

/// A grammar that is compiled or will be.
struct Entry {
  std::shared_future<Result> result;
  size_t bytes = 0;  ///< 0: not yet
  std::list<Key>::iterator use;
};
}  // namespace

struct GrammarCompiler::Impl {
  std::shared_ptr<const Vocabulary> vocabulary;
  GrammarLimits limits;
  // One each for plain text and for text with the markup's marker, without caches of their own.
  std::optional<xgrammar::GrammarCompiler> plain, with_dsml;

  mutable std::mutex mutex;
  std::condition_variable slot;
  size_t compiling = 0;
  std::map<Key, Entry> entries;
  std::list<Key> uses;  ///< most recent first
  Stats stats;
  std::list<std::thread> threads;                       ///< that compile
  std::vector<std::list<std::thread>::iterator> ended;  ///< of them, those to join

  Result build(const Grammar& grammar) {
    try {
      const GrammarWarnings warnings;
      const xgrammar::Grammar read = read_grammar(grammar, *vocabulary);
      auto& compiler = grammar.kind == Grammar::Kind::kToolCalls ? *with_dsml : *plain;
      auto result = std::make_shared<const CompiledGrammar>(
          vocabulary, compiler.CompileGrammar(read), grammar.kind == Grammar::Kind::kToolCalls);
      HADAL_INPUT_CHECK(warnings.first().empty(), "grammar: ", kind_name(grammar.kind), ": ",
                        warnings.first());
      HADAL_INPUT_CHECK(result->compiled.MemorySizeBytes() <= limits.compiled_bytes,
                        "grammar: ", kind_name(grammar.kind), ": compiled, it takes ",
                        result->compiled.MemorySizeBytes(), " bytes, at most ",
                        limits.compiled_bytes, " are allowed");
      return result;
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      throw InputError(concat("grammar: ", kind_name(grammar.kind), ": ", grammar_message(error)));
    }
  }

  /// Drops what was not used for longest; the mutex is held.
  void trim() {
    auto use = uses.end();
    while (stats.bytes > limits.cache_bytes && use != uses.begin()) {
      --use;
      const auto entry = entries.find(*use);
      if (entry->second.bytes == 0) continue;
      stats.bytes -= entry->second.bytes;
      entries.erase(entry);
      use = uses.erase(use);
    }
    stats.grammars = static_cast<int64_t>(entries.size());
  }

  void run(const Grammar& grammar,
           std::promise<Result>& promise,
           std::list<std::thread>::iterator self) {
    size_t bytes = 0;
    Result result;
    std::exception_ptr failure;
    try {
      result = build(grammar);
      bytes = std::max<size_t>(1, result->compiled.MemorySizeBytes());
    } catch (...) {
      failure = std::current_exception();
    }
    // The books first: whoever waits for the result may look at them next.
    const std::lock_guard<std::mutex> lock(mutex);
    const auto entry = entries.find(Key(grammar.kind, grammar.text));
    if (bytes > 0) {
      entry->second.bytes = bytes;
      stats.bytes += bytes;
    } else {
      uses.erase(entry->second.use);
      entries.erase(entry);
    }
    trim();
    --compiling;
    ended.push_back(self);
    slot.notify_all();
    if (failure) {
      promise.set_exception(failure);
    } else {
      promise.set_value(result);
    }
  }

  void join_ended() {
    for (const auto thread : ended) {
      thread->join();
      threads.erase(thread);
    }
    ended.clear();
  }
};

GrammarCompiler::GrammarCompiler(const text::Tokenizer& tokenizer,
                                 int64_t vocab_size,
                                 GrammarLimits limits)
    : impl_(std::make_unique<Impl>()) {
  impl_->vocabulary = make_vocabulary(tokenizer, vocab_size);
  impl_->limits = limits;
  impl_->plain.emplace(*impl_->vocabulary->plain, 1, false);
  impl_->with_dsml.emplace(*impl_->vocabulary->with_dsml, 1, false);
}

GrammarCompiler::~GrammarCompiler() {
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->slot.wait(lock, [&] { return impl_->compiling == 0; });
  impl_->join_ended();
}

std::shared_ptr<const CompiledGrammar> GrammarCompiler::compile(const Grammar& grammar) {
  if (grammar.kind == Grammar::Kind::kNone) return nullptr;
  Impl& impl = *impl_;
  const char* const what = kind_name(grammar.kind);
  HADAL_INPUT_CHECK(grammar.text.size() <= impl.limits.text_bytes, "grammar: ", what, ": ",
                    grammar.text.size(), " bytes, at most ", impl.limits.text_bytes,
                    " are allowed");
  const auto deadline = std::chrono::steady_clock::now() + impl.limits.time;
  const Key key(grammar.kind,
                grammar.kind == Grammar::Kind::kJsonObject ? std::string() : grammar.text);
  std::shared_future<Result> result;
  {
    std::unique_lock<std::mutex> lock(impl.mutex);
    impl.join_ended();
    const auto find = [&] {
      const auto found = impl.entries.find(key);
      if (found == impl.entries.end()) return false;
      impl.uses.splice(impl.uses.begin(), impl.uses, found->second.use);
      result = found->second.result;
      return true;
    };
    if (find()) {
      ++impl.stats.hits;
    } else {
      const bool free = impl.slot.wait_until(
          lock, deadline, [&] { return find() || impl.compiling < kMaxCompiling; });
      HADAL_INPUT_CHECK(free, "grammar: ", what, ": others are being compiled, try again");
      ++impl.stats.misses;
    }
    if (!result.valid()) {
      std::promise<Result> promise;
      result = promise.get_future().share();
      impl.uses.push_front(key);
      impl.entries[key] = {.result = result, .bytes = 0, .use = impl.uses.begin()};
      ++impl.compiling;
      impl.threads.emplace_front();
      const auto self = impl.threads.begin();
      *self = std::thread(
          [&impl, self, promise = std::move(promise),
           copy = Grammar{key.first, key.second}]() mutable { impl.run(copy, promise, self); });
    }
  }
  HADAL_INPUT_CHECK(result.wait_until(deadline) == std::future_status::ready, "grammar: ", what,
                    ": compiling takes more than ", impl.limits.time.count(), " ms");
  return result.get();
}

GrammarCompiler::Stats GrammarCompiler::stats() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->stats;
}

size_t GrammarCompiler::mask_words() const { return impl_->vocabulary->mask_words(); }

// --- GrammarSession
// --------------------------------------------------------------------------------

struct GrammarSession::Impl {
  /// What one token changed.
  struct Step {
    bool thinking;   ///< before it
    size_t matched;  ///< of kEnd, before it
    int8_t utf8;     ///< before it
    int matcher_steps;
    MarkerGuard marker;  ///< before it
  };

  explicit Impl(const std::shared_ptr<const CompiledGrammar>& grammar, bool is_thinking)
      : vocabulary(grammar->vocabulary),
        matcher(grammar->compiled),
        thinking(is_thinking),
        marker(grammar->has_calls) {}

  Step step(int matcher_steps) const {
    return {.thinking = thinking,
            .matched = matched,
            .utf8 = utf8,
            .matcher_steps = matcher_steps,
            .marker = marker};
  }

  bool accept_thinking(int64_t token) {
    const auto place = static_cast<size_t>(token);
    if ((vocabulary->thinking_mask[place / 32] >> place % 32 & 1u) == 0) return false;
    Step before = step(0);
    const std::string& bytes = vocabulary->bytes[place];
    if (bytes.empty()) {  // kEnd as an added token
      thinking = false;
      matched = 0;
      steps.push_back(std::move(before));
      return true;
    }
    size_t now = matched;
    for (size_t pos = 0; pos < bytes.size(); ++pos) {
      now = step_match(kEnd, now, bytes[pos]);
      if (now < kEndLength) continue;
      if (pos + 1 < bytes.size()) {
        const std::string rest = bytes.substr(pos + 1);
        const int8_t behind = step_utf8(kWhole, rest);
        if (behind == kBroken || !marker.allows(rest) || !matcher.AcceptString(rest)) return false;
        utf8 = behind;
        marker.add(rest);
        before.matcher_steps = 1;
      }
      thinking = false;
      now = 0;
      break;
    }
    matched = now;
    steps.push_back(std::move(before));
    return true;
  }

  std::shared_ptr<const Vocabulary> vocabulary;
  xgrammar::GrammarMatcher matcher;
  bool thinking;
  size_t matched = 0;
  int8_t utf8 = kWhole;  ///< of the text that the grammar has seen
  MarkerGuard marker;    ///< of the same text
  std::vector<Step> steps;
};

// NOLINTNEXTLINE(performance-unnecessary-value-param): the interface moves
GrammarSession::GrammarSession(std::shared_ptr<const CompiledGrammar> grammar, bool thinking) {
  HADAL_CHECK(grammar != nullptr, "grammar: a session without a grammar");
  impl_ = std::make_unique<Impl>(std::move(grammar), thinking);
}
GrammarSession::~GrammarSession() = default;
GrammarSession::GrammarSession(GrammarSession&&) noexcept = default;
GrammarSession& GrammarSession::operator=(GrammarSession&&) noexcept = default;

bool GrammarSession::accept(int64_t token) {
  HADAL_CHECK(token >= 0 && token < impl_->vocabulary->size, "grammar: token ", token, " of ",
              impl_->vocabulary->size);
  if (impl_->thinking) return impl_->accept_thinking(token);
  const int8_t utf8 = impl_->utf8;
  if (impl_->matcher.IsTerminated()) {
    if (token != impl_->vocabulary->eos) return false;
    impl_->steps.push_back(impl_->step(0));
    return true;
  }
  const auto place = static_cast<size_t>(token);
  const std::vector<std::string>& bytes = impl_->vocabulary->bytes;
  const int8_t behind =
      step_utf8(utf8, place < bytes.size() ? std::string_view(bytes[place]) : std::string_view());
  const std::string_view text = impl_->vocabulary->bytes_with_dsml(place);
  if (behind == kBroken || !impl_->marker.allows(text) ||
      !impl_->matcher.AcceptToken(static_cast<int32_t>(token)))
    return false;
  impl_->steps.push_back(impl_->step(1));
  impl_->utf8 = behind;
  impl_->marker.add(text);
  return true;
}

void GrammarSession::rollback(int64_t count) {
  HADAL_CHECK(count >= 0 && count <= length(), "grammar: taking back ", count, " of ", length(),
              " tokens");
  int matcher_steps = 0;
  for (; count > 0; --count) {
    const Impl::Step& step = impl_->steps.back();
    impl_->thinking = step.thinking;
    impl_->matched = step.matched;
    impl_->utf8 = step.utf8;
    impl_->marker = step.marker;
    matcher_steps += step.matcher_steps;
    impl_->steps.pop_back();
  }
  if (matcher_steps > 0) impl_->matcher.Rollback(matcher_steps);
}

bool GrammarSession::mask(std::span<uint32_t> words) {
  const Vocabulary& vocabulary = *impl_->vocabulary;
  HADAL_CHECK(words.size() == vocabulary.mask_words(), "grammar: a mask of ", words.size(),
              " words, expected ", vocabulary.mask_words());
  if (impl_->thinking) {
    std::copy(vocabulary.thinking_mask.begin(), vocabulary.thinking_mask.end(), words.begin());
    for (const Border& border : vocabulary.borders[impl_->matched]) {
      const auto place = static_cast<size_t>(border.token);
      const std::string rest = vocabulary.bytes[place].substr(border.rest);
      if (step_utf8(kWhole, rest) != kBroken && impl_->marker.allows(rest) &&
          impl_->matcher.AcceptString(rest)) {
        impl_->matcher.Rollback(1);
      } else {
        words[place / 32] &= ~(1u << place % 32);
      }
    }
    return true;
  }
  if (impl_->matcher.IsTerminated()) {
    std::fill(words.begin(), words.end(), 0);
    const auto place = static_cast<size_t>(vocabulary.eos);
    words[place / 32] |= 1u << place % 32;
    return true;
  }
  auto shape = static_cast<int64_t>(words.size());
  int64_t stride = 1;
  DLTensor tensor{};
  tensor.data = words.data();
  tensor.device = {kDLCPU, 0};
  tensor.ndim = 1;
  tensor.dtype = xgrammar::GetBitmaskDLType();
  tensor.shape = &shape;
  tensor.strides = &stride;
  if (!impl_->matcher.FillNextTokenBitmask(&tensor))
    std::fill(words.begin(), words.end(), ~uint32_t{0});
  const std::vector<uint32_t>& utf8 = vocabulary.utf8_masks[static_cast<uint8_t>(impl_->utf8)];
  for (size_t i = 0; i < words.size(); ++i) words[i] &= utf8[i];
  if (!impl_->marker.watches()) return true;
  for (const int32_t token : vocabulary.marker_ends[impl_->marker.matched()]) {
    const auto place = static_cast<size_t>(token);
    if (!impl_->marker.allows(vocabulary.bytes_with_dsml(place)))
      words[place / 32] &= ~(1u << place % 32);
  }
  return true;
}

bool GrammarSession::completed() const {
  return !impl_->thinking && impl_->utf8 == kWhole &&
         (impl_->matcher.IsTerminated() || impl_->matcher.IsCompleted());
}

int64_t GrammarSession::length() const { return static_cast<int64_t>(impl_->steps.size()); }

}  // namespace hadal::engine
