// hadal bench serve: load on any OpenAI-compatible server, and how it bears it.
//
// Open loop (--rate): every request has a planned time, fixed by the seed, and is sent then,
// whatever the server does meanwhile; latencies count from the planned time, so that a server that
// stalls cannot hide behind requests that were never sent ("coordinated omission"). Closed loop
// (--concurrency): so many clients, each of which sends its next request when the last one has
// ended; there the planned time is that moment. Latencies include connecting where no kept
// connection is free.
//
// A token's time is that of the piece of the stream (SSE event with text, reasoning or a tool call)
// that brought it; gaps are between pieces. Percentiles are nearest ranks of all values measured.
//
// Exit code: 0 done, with or without failed requests, which are listed; 1 an answer differs from
// the recorded one or not one request was answered; 2 bad usage.
#pragma once

#include <functional>

namespace CLI {  // NOLINT(readability-identifier-naming)
class App;
}  // namespace CLI

namespace hadal::apps {

/// Adds the flags and returns what runs after parsing.
std::function<int()> define_bench_serve(CLI::App& app);

}  // namespace hadal::apps
