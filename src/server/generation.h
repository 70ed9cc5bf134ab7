// One answer under way: from a checked job to the bytes of an API, fed by the engine's updates.
//
// A Generation lives on its connection's strand; the engine's thread only posts to it. A Format
// turns what happens into the events of one API, or the whole answer into its JSON.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine_core/engine.h"
#include "server/call_memory.h"
#include "server/http.h"
#include "server/json_reader.h"
#include "server/metrics.h"
#include "text/completion_parser.h"
#include "text/tokenizer.h"

namespace hadal::server {

struct CallRecord {
  std::string id, name;
  std::string arguments;  ///< JSON text of an object, as far as it is known
};

/// How an answer ended, for the APIs to put in their words.
enum class Ending : uint8_t {
  kStop,
  kStopString,
  kToolCalls,  ///< there are complete calls; Choice::malformed may be set beside them
  kLength,
  kMalformed,  ///< the model ended it, but what it began is not there (Choice::malformed): a call
               ///< that is incomplete, or reasoning without an end. Never told as a plain stop
};

/// What is known of one choice so far.
struct Choice {
  std::string reasoning, content;
  std::vector<CallRecord> calls;        ///< complete ones
  std::optional<CallRecord> open_call;  ///< under way, or what is there of it where the answer ends
  std::vector<engine_core::OutputToken> reasoning_tokens_info,
      content_tokens_info;               ///< with logprobs
  std::vector<int64_t> token_ids;        ///< all that were drawn, with Job::keep_token_ids
  std::vector<double> sampled_logprobs;  ///< theirs, with Job::keep_sampled_logprobs
  std::shared_ptr<const engine_core::WeightsVersion>
      weights;  ///< that drew them, from the first on
  std::shared_ptr<const std::vector<engine_core::TokenScore>> prompt_scores;  ///< where asked for
  std::optional<engine_core::FinishReason> finish;
  std::string matched_stop;
  int64_t stop_token = -1;  ///< one of the request's that ended it
  std::string malformed;    ///< what the model wrote that could not be delivered, and why; or empty
  bool open_reasoning = false;  ///< EOS came inside the reasoning (malformed says so, too)
  /// Calls that were begun in a stream and dropped (Format::call_dropped): clients number on.
  int64_t dropped_calls = 0;
  int64_t completion_tokens = 0, reasoning_tokens = 0;

  /// Once finished.
  Ending ending() const;
};

struct Answer {
  std::string id, model;
  int64_t created = 0;  ///< seconds since 1970
  std::vector<Choice> choices;
  int64_t prompt_tokens = 0, cached_tokens = 0, disk_tokens = 0;
  double first_token_seconds = 0, seconds = 0;  ///< since the request, once known
  std::string miss;
  int64_t completion_tokens() const;
  int64_t reasoning_tokens() const;
};

/// Writes one API's answer. `out` takes the stream's bytes.
class Format {
 public:
  using Kind = text::CompletionEvent::Kind;
  virtual ~Format() = default;
  /// What the answer's headers call the request.
  virtual void name_request(const std::string& /*id*/) {}
  /// Whether begin() comes as soon as the engine has the request, for APIs whose clients want to
  /// hear that it waits. Else it comes with the first token, when it is known what the cache gave,
  /// and clients measure when an answer begins instead of when it was asked for.
  virtual bool begins_at_once() const { return false; }
  virtual void begin(const Answer&, std::string& /*out*/) {}
  /// Reasoning or content, already part of the answer.
  virtual void text(const Answer&, size_t, Kind, const std::string&, std::string& /*out*/) {}
  /// The choice's open call is new, its arguments still empty.
  virtual void call_begun(const Answer&, size_t, std::string& /*out*/) {}
  /// More of its arguments; the pieces of a complete call add up to JSON.
  virtual void call_arguments(const Answer&,
                              size_t,
                              const std::string& /*arguments*/,
                              std::string& /*out*/) {}
  /// It is complete: the last of the choice's calls now.
  virtual void call_ended(const Answer&, size_t, std::string& /*out*/) {}
  /// It was begun and will not be completed; the answer goes on. Still the choice's open call.
  virtual void call_dropped(const Answer&, size_t, std::string& /*out*/) {}
  virtual void finished(const Answer&, size_t, std::string& /*out*/) {}
  virtual void end(const Answer&, std::string& /*out*/) {}
  virtual std::string whole(const Answer&) = 0;
  virtual HttpResponse error(const RequestError&) = 0;
  virtual void stream_error(const RequestError&, std::string& out) = 0;
  /// What clients pass over: keeps a stream alive on which nothing is sent. A comment of SSE.
  virtual void ping(std::string& out) { out += ": ping\n\n"; }
};

/// A request that passed all checks.
struct Job {
  std::vector<engine_core::Request> requests;  ///< one a prompt; choices are numbered through
  bool chat = false;                           ///< the answer is reasoning, content and calls
  text::ThinkingMode mode = text::ThinkingMode::kChat;
  bool one_call = false;              ///< the answer ends behind its first call
  std::shared_ptr<CallMemory> calls;  ///< gets what is called; may be null
  bool certain_calls = false;         ///< a grammar makes sure that calls become complete
  /// What values may be; null: nothing is known of the tools.
  std::shared_ptr<const text::ToolSchemas> tools;
  bool stream = false;
  bool keep_token_ids = false;  ///< the format shows them
  bool keep_sampled_logprobs = false;
  std::string id, model;
  std::unique_ptr<Format> format;
  /// Gets the context view of the first choice, where its requests ask for one.
  std::function<void(const engine_core::ContextView&)> on_view;
};

/// Counts a key's generations: given back when destroyed.
using Lease = std::shared_ptr<void>;

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  Generation(engine_core::Engine& engine,
             const text::Tokenizer& tokenizer,
             ApiMetrics& metrics,
             std::shared_ptr<Responder> responder,
             Job job,
             Lease lease,
             std::chrono::milliseconds ping_interval = {});
  /// Submits the job, of many prompts the first; a stream's head leaves as soon as the engine has
  /// accepted them. The others follow as those before them end. Errors: RequestError where it
  /// refuses.
  void start();

 private:
  struct Progress {
    std::optional<text::CompletionParser> parser;
    std::vector<engine_core::OutputToken> pending;  ///< tokens whose text is held back
    bool in_reasoning = false, started = false, done = false;
  };
  /// One of the job's requests.
  struct Part {
    size_t first_choice = 0;
    int64_t running = 0;  ///< choices that the engine has not ended
  };
  class PostingSink;

  uint64_t submit_next();
  void submit_more();
  void update(size_t part, const engine_core::Update& update);
  void take_token(size_t index, const engine_core::OutputToken& token);
  void take_special(int64_t token,
                    text::CompletionParser& parser,
                    std::vector<text::CompletionEvent>& events);
  void take_events(size_t index, std::vector<text::CompletionEvent>& events);
  void take_call_event(size_t index, const text::CompletionEvent& event);
  void finish_choice(size_t index, engine_core::FinishReason reason);
  void fail(const RequestError& error);
  void accepted(std::vector<uint64_t> ids);
  void begin_stream();
  void ping();
  void close();
  void cancel_all();

  engine_core::Engine& engine_;
  const text::Tokenizer& tokenizer_;
  ApiMetrics& metrics_;
  const std::shared_ptr<Responder> responder_;
  Job job_;
  Lease lease_;
  const std::chrono::milliseconds ping_interval_;  ///< of a silent stream; 0: none
  const std::chrono::steady_clock::time_point began_;
  int64_t think_end_ = -1, marker_ = -1;
  Answer answer_;
  std::vector<Progress> progress_;
  std::vector<Part> parts_;
  size_t num_submitted_ = 0;
  int64_t running_parts_ = 0;  ///< submitted and not ended
  std::vector<uint64_t> ids_;
  std::vector<std::pair<size_t, engine_core::Update>> early_;  ///< of parts; came before acceptance
  std::string out_;
  size_t open_choices_ = 0;
  bool accepted_ = false, streaming_ = false, begun_ = false, over_ = false, first_ = true;
};

/// "prefix" and 24 random characters.
std::string random_id(std::string_view prefix);
uint64_t random_seed();

}  // namespace hadal::server
