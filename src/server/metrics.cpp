#include "server/metrics.h"

#include <fmt/format.h>

#include "base/memory.h"

namespace hadal::server {
namespace {

void family(std::string& out, std::string_view name, std::string_view type, std::string_view help) {
  out += fmt::format("# HELP hadal_{0} {1}\n# TYPE hadal_{0} {2}\n", name, help, type);
}
template <typename Number>
void single(std::string& out,
            std::string_view name,
            std::string_view type,
            std::string_view help,
            Number value) {
  family(out, name, type, help);
  out += fmt::format("hadal_{} {}\n", name, value);
}

}  // namespace

void Histogram::observe(std::chrono::steady_clock::duration duration) {
  const double seconds = std::chrono::duration<double>(duration).count();
  size_t bucket = 0;
  while (bucket < kBounds.size() && seconds > kBounds[bucket]) ++bucket;
  buckets_[bucket].add();
  micros_.add(std::chrono::duration_cast<std::chrono::microseconds>(duration).count());
}

void Histogram::write(std::string& out, std::string_view name, std::string_view help) const {
  family(out, name, "histogram", help);
  int64_t sum = 0;
  for (size_t i = 0; i < kBounds.size(); ++i) {
    sum += buckets_[i].value();
    out += fmt::format("hadal_{}_bucket{{le=\"{}\"}} {}\n", name, kBounds[i], sum);
  }
  sum += buckets_.back().value();
  out += fmt::format("hadal_{0}_bucket{{le=\"+Inf\"}} {1}\nhadal_{0}_count {1}\n", name, sum);
  out += fmt::format("hadal_{}_sum {}\n", name, static_cast<double>(micros_.value()) * 1e-6);
}

void ApiMetrics::count_response(std::string_view route, int status) {
  const std::lock_guard lock(mutex_);
  ++responses_[{std::string(route), status}];
}

std::string ApiMetrics::text(const engine_core::EngineStats& engine, const HttpStats& http) const {
  std::string out;
  family(out, "http_requests_total", "counter", "requests by route and status of refusals");
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, count] : responses_)
      out += fmt::format("hadal_http_requests_total{{route=\"{}\",status=\"{}\"}} {}\n", key.first,
                         key.second, count);
  }
  const auto gauge = [&](const char* name, const char* help, int64_t value) {
    single(out, name, "gauge", help, value);
  };
  const auto total = [&](const char* name, const char* help, auto value) {
    single(out, name, "counter", help, value);
  };
  gauge("connections", "open connections", http.connections);
  gauge("http_active", "answers under way", http.active);
  total("connections_total", "accepted connections", http.accepted);
  total("connections_refused_total", "connections over the limit", http.refused);
  total("slow_clients_dropped_total", "clients dropped for not reading", http.slow_dropped);
  total("clients_left_total", "clients that left before the end", http.left);
  total("generations_finished_total", "answers completed", finished.value());
  total("generations_failed_total", "answers that failed", failed.value());
  total("generations_cancelled_total", "answers whose client left", cancelled.value());
  total("queue_full_total", "requests refused by the engine's queue", queue_full.value());
  total("key_over_limit_total", "requests over a key's concurrency", over_limit.value());
  total("unauthorised_total", "requests without a valid key", unauthorised.value());
  total("malformed_answers_total", "answers in which something of the model's is missing",
        malformed.value());
  total("irregular_answers_total", "answers with irregular markup, delivered in full",
        irregular.value());
  total("open_reasoning_answers_total", "answers that ended inside the reasoning",
        open_reasoning.value());
  first_token.write(out, "time_to_first_token_seconds", "from request to the first token");
  duration.write(out, "generation_seconds", "from request to the last token");

  gauge("engine_running", "sequences in the batch", engine.running);
  gauge("engine_waiting", "sequences waiting", engine.waiting);
  gauge("pages", "cache pages", engine.pages_total);
  gauge("pages_free", "free cache pages", engine.pages_free);
  gauge("pages_cached", "pages only the prefix tree holds", engine.pages_cached);
  gauge("state_slots", "state slots", engine.state_slots_total);
  gauge("state_slots_free", "free state slots", engine.state_slots_free);
  gauge("states", "kept states: places to go on from", engine.states);
  gauge("snapshot_pages", "cache pages that hold kept states", engine.snapshot_pages);
  gauge("pinned_keys", "cache keys that hold prefixes", engine.pinned_keys);
  gauge("pinned_pages", "cache pages that keys hold", engine.pinned_pages);
  gauge("snapshot_bytes", "bytes of kept states", engine.snapshot_bytes);
  total("states_evicted_total", "kept states given up for others", engine.states_evicted);
  gauge("context_tokens_capacity", "tokens that fit into all cache pages", engine.context_tokens);
  gauge("weights_bytes", "bytes of weights in memory", engine.weights_bytes);
  gauge("cache_bytes", "bytes of the cache: pages, state slots, books, tokens of answers",
        engine.cache_bytes);
  gauge("workspace_bytes", "bytes of the process at rest beside weights and cache",
        engine.workspace_bytes);
  gauge("grammar_bytes", "bytes of compiled grammars, beside the workspace", engine.grammar_bytes);
  gauge("resident_bytes", "bytes of the process in memory", resident_bytes());
  gauge("disk_bytes", "bytes of the disk store", engine.disk_bytes);
  total("prompt_tokens_total", "tokens of prompts", engine.prompt_tokens);
  total("cached_tokens_total", "prompt tokens found in caches", engine.cached_tokens);
  total("disk_tokens_total", "prompt tokens found on disk", engine.disk_tokens);
  total("generated_tokens_total", "tokens generated", engine.generated_tokens);
  total("preemptions_total", "sequences preempted", engine.preemptions);
  total("steps_total", "steps of the model", engine.steps);
  total("drafted_tokens_total", "tokens drafted", engine.drafted);
  total("accepted_tokens_total", "drafted tokens accepted", engine.accepted);
  total("disk_hits_total", "disk entries found", engine.disk_hits);
  total("disk_misses_total", "disk entries not found", engine.disk_misses);
  total("disk_errors_total", "disk entries unusable", engine.disk_errors);
  total("model_seconds_total", "seconds inside the model", engine.model_seconds);
  total("sampling_seconds_total", "seconds inside the sampler", engine.sampling_seconds);
  total("overhead_seconds_total", "seconds of steps outside model and sampler",
        engine.overhead_seconds);
  total("overhead_cpu_seconds_total", "processor seconds of steps outside model and sampler",
        engine.overhead_cpu_seconds);
  return out;
}

}  // namespace hadal::server
