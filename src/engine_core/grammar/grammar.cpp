#include "engine_core/grammar/grammar.h"

#include <algorithm>
#include <bit>
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
#include "base/thread_time.h"
#include "engine_core/grammar/grammar_calls.h"
#include "engine_core/grammar/grammar_deadline.h"
#include "engine_core/grammar/grammar_ends.h"
#include "engine_core/grammar/grammar_log.h"
#include "engine_core/grammar/grammar_marker.h"
#include "engine_core/grammar/grammar_pattern.h"
#include "engine_core/grammar/grammar_schema.h"
#include "engine_core/grammar/grammar_tools.h"
#include "engine_core/grammar/grammar_vocabulary.h"
#include "text/chat_tokens.h"

namespace hadal::engine_core {
namespace {

constexpr size_t kMaxCompiling = 2;

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

xgrammar::Grammar read_grammar(const Grammar& grammar,
                               const GrammarVocabulary& vocabulary,
                               const ToolGrammar& tools) {
  const std::string what = concat("grammar: ", kind_name(grammar.kind));
  switch (grammar.kind) {
    case Grammar::Kind::kJsonObject:
      return xgrammar::Grammar::FromJSONSchema(R"({"type":"object","additionalProperties":true})",
                                               true, std::nullopt, std::nullopt, true,
                                               kMaxWhitespace);
    case Grammar::Kind::kJsonSchema: {
      check_schema(*parse_json(grammar.text, what), what);
      auto schema = nlohmann::ordered_json::parse(grammar.text);
      const bool changed = prepare_strings(schema, what);
      return xgrammar::Grammar::FromJSONSchema(changed ? schema.dump() : grammar.text, true,
                                               std::nullopt, std::nullopt, true, kMaxWhitespace,
                                               false, true);
    }
    case Grammar::Kind::kRegex:
      check_pattern(grammar.text, what);
      json_pattern(grammar.text, what);  // classes of no characters
      return xgrammar::Grammar::FromRegex(grammar.text);
    case Grammar::Kind::kEbnf:
      check_pattern(grammar.text, what);
      return xgrammar::Grammar::FromEBNF(grammar.text);
    case Grammar::Kind::kToolCalls: {
      auto result =
          xgrammar::Grammar::FromStructuralTag(tools.structural_tag, vocabulary.with_dsml);
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
  CompiledGrammar(std::shared_ptr<const GrammarVocabulary> tokens,
                  xgrammar::CompiledGrammar grammar,
                  const ToolGrammar& tools,
                  const GrammarLimits& all_limits)
      : vocabulary(std::move(tokens)),
        compiled(std::move(grammar)),
        watch(tools.watch),
        limits(all_limits) {
    if (!tools.calls.empty())
      calls = std::make_shared<const std::vector<CallParameters>>(tools.calls);
  }

  std::shared_ptr<const GrammarVocabulary> vocabulary;
  xgrammar::CompiledGrammar compiled;
  MarkerGuard::Watch watch;  ///< the marker has its place, which free text does not know
  std::shared_ptr<const std::vector<CallParameters>> calls;  ///< null: no tools
  GrammarLimits limits;
};

// --- GrammarCompiler ---

namespace {
using Key = std::pair<Grammar::Kind, std::string>;
using Result = std::shared_ptr<const CompiledGrammar>;

/// A grammar that is compiled or will be.
struct Entry {
  std::shared_future<Result> result;
  std::shared_ptr<GrammarDeadline> deadline;
  size_t bytes = 0;  ///< 0: not yet
  std::list<Key>::iterator use;
};
}  // namespace

struct GrammarCompiler::Impl {
  std::shared_ptr<const GrammarVocabulary> vocabulary;
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
    const auto checked = [&](bool prefer, bool& has_preferences) {
      try {
        const GrammarWarnings warnings;
        const bool calls = grammar.kind == Grammar::Kind::kToolCalls;
        const ToolGrammar tools = calls ? read_tool_grammar(grammar.text, prefer) : ToolGrammar();
        has_preferences = tools.has_preferences;
        const xgrammar::Grammar read = read_grammar(grammar, *vocabulary, tools);
        check_ends(read.ToString(), concat("grammar: ", kind_name(grammar.kind)));
        auto result = std::make_shared<const CompiledGrammar>(
            vocabulary, (calls ? *with_dsml : *plain).CompileGrammar(read), tools, limits);
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
        throw InputError(
            concat("grammar: ", kind_name(grammar.kind), ": ", grammar_message(error)));
      }
    };
    bool has_preferences = false;
    try {
      return checked(true, has_preferences);
    } catch (const InputError&) {
      if (!has_preferences) throw;
    }
    return checked(false, has_preferences);
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
           const GrammarDeadline& deadline,
           std::promise<Result>& promise,
           std::list<std::thread>::iterator self) {
    size_t bytes = 0;
    Result result;
    std::exception_ptr failure;
    try {
      const GrammarDeadlineScope scope(deadline);
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
  const std::string too_long =
      concat("grammar: ", what, ": compiling takes more than ", impl.limits.time.count(), " ms");
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
      found->second.deadline->extend(deadline);
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
      const auto until = std::make_shared<GrammarDeadline>(deadline, too_long);
      impl.entries[key] = {
          .result = result, .deadline = until, .bytes = 0, .use = impl.uses.begin()};
      ++impl.compiling;
      impl.threads.emplace_front();
      const auto self = impl.threads.begin();
      *self = std::thread([&impl, self, until, promise = std::move(promise),
                           copy = Grammar{key.first, key.second}]() mutable {
        impl.run(copy, *until, promise, self);
      });
    }
  }
  HADAL_INPUT_CHECK(result.wait_until(deadline) == std::future_status::ready, too_long);
  return result.get();
}

GrammarCompiler::Stats GrammarCompiler::stats() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->stats;
}

size_t GrammarCompiler::mask_words() const { return impl_->vocabulary->mask_words(); }

// --- GrammarSession ---

struct GrammarSession::Impl {
  /// What one token changed.
  struct Step {
    bool thinking;  ///< before it
    int8_t utf8;    ///< before it
    int matcher_steps;
    MarkerGuard marker;  ///< before it
    CallTracker calls;   ///< before it
  };

  explicit Impl(const std::shared_ptr<const CompiledGrammar>& grammar, bool is_thinking)
      : vocabulary(grammar->vocabulary),
        matcher(grammar->compiled),
        thinking(is_thinking),
        marker(grammar->watch),
        calls(grammar->calls),
        limits(grammar->limits) {}

  /// Notes what a mask took.
  void spend(std::chrono::nanoseconds time) {
    spent += time;
    ++masks;
    HADAL_INPUT_CHECK(spent <= limits.masks || spent <= masks * limits.mean_mask,
                      "grammar: what may follow takes ", spent.count() / masks / 1000,
                      " us a token to find out, at most ", limits.mean_mask.count(),
                      " ms are allowed");
  }

  Step step(int matcher_steps) const {
    return {.thinking = thinking,
            .utf8 = utf8,
            .matcher_steps = matcher_steps,
            .marker = marker,
            .calls = calls};
  }

  bool accept_thinking(int64_t token) {
    const auto place = static_cast<size_t>(token);
    if ((vocabulary->thinking_mask[place / 32] >> place % 32 & 1u) == 0) return false;
    steps.push_back(step(0));
    thinking = token != vocabulary->think_end;
    return true;
  }

  bool allows_marker() const { return marker.allows_marker() && calls.allows_marker(); }

  /// Clears the tokens that only the calls before them forbid.
  void forbid_calls(std::span<uint32_t> words) const {
    for (size_t word = 0; word < words.size(); ++word) {
      for (uint32_t bits = words[word]; bits != 0; bits &= bits - 1) {
        const auto bit = static_cast<size_t>(std::countr_zero(bits));
        const size_t place = word * 32 + bit;
        if (place < vocabulary->bytes.size() && !calls.allows(vocabulary->bytes[place]))
          words[word] &= ~(1u << bit);
      }
    }
  }

  std::shared_ptr<const GrammarVocabulary> vocabulary;
  xgrammar::GrammarMatcher matcher;
  bool thinking;
  int8_t utf8 = kWhole;  ///< of the text that the grammar has seen
  MarkerGuard marker;    ///< of the same text
  CallTracker calls;     ///< of the same text
  std::vector<Step> steps;
  GrammarLimits limits;
  std::chrono::nanoseconds spent{0};
  int64_t masks = 0;
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
  const bool is_marker = token == impl_->vocabulary->dsml;
  if (behind == kBroken || (is_marker && !impl_->allows_marker()) ||
      (!is_marker && place < bytes.size() && !impl_->calls.allows(bytes[place])) ||
      !impl_->matcher.AcceptToken(static_cast<int32_t>(token)))
    return false;
  impl_->steps.push_back(impl_->step(1));
  impl_->utf8 = behind;
  if (is_marker) {
    impl_->marker.add_marker();
    impl_->calls.add_marker();
  } else if (place < bytes.size()) {
    impl_->marker.add(bytes[place]);
    impl_->calls.add(bytes[place]);
  }
  return true;
}

void GrammarSession::rollback(int64_t count) {
  HADAL_CHECK(count >= 0 && count <= length(), "grammar: taking back ", count, " of ", length(),
              " tokens");
  int matcher_steps = 0;
  for (; count > 0; --count) {
    const Impl::Step& step = impl_->steps.back();
    impl_->thinking = step.thinking;
    impl_->utf8 = step.utf8;
    impl_->marker = step.marker;
    impl_->calls = step.calls;
    matcher_steps += step.matcher_steps;
    impl_->steps.pop_back();
  }
  if (matcher_steps > 0) impl_->matcher.Rollback(matcher_steps);
}

bool GrammarSession::mask(std::span<uint32_t> words) {
  const GrammarVocabulary& vocabulary = *impl_->vocabulary;
  HADAL_CHECK(words.size() == vocabulary.mask_words(), "grammar: a mask of ", words.size(),
              " words, expected ", vocabulary.mask_words());
  if (impl_->thinking) {
    std::copy(vocabulary.thinking_mask.begin(), vocabulary.thinking_mask.end(), words.begin());
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
  const std::chrono::nanoseconds begun = thread_time();
  if (!impl_->matcher.FillNextTokenBitmask(&tensor))
    std::fill(words.begin(), words.end(), ~uint32_t{0});
  impl_->spend(thread_time() - begun);
  const std::vector<uint32_t>& utf8 = vocabulary.utf8_masks[static_cast<uint8_t>(impl_->utf8)];
  for (size_t i = 0; i < words.size(); ++i) words[i] &= utf8[i];
  if (impl_->calls.watches()) impl_->forbid_calls(words);
  if (vocabulary.dsml >= 0 && !impl_->allows_marker()) {
    const auto place = static_cast<size_t>(vocabulary.dsml);
    words[place / 32] &= ~(1u << place % 32);
  }
  return true;
}

bool GrammarSession::completed() const {
  return !impl_->thinking && impl_->utf8 == kWhole &&
         (impl_->matcher.IsTerminated() || impl_->matcher.IsCompleted());
}

int64_t GrammarSession::length() const { return static_cast<int64_t>(impl_->steps.size()); }

}  // namespace hadal::engine_core
