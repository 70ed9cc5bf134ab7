#include "apps/bench_serve.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "apps/interrupt.h"
#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/progress.h"
#include "load/check.h"
#include "load/client.h"
#include "load/report.h"
#include "load/traffic.h"

namespace hadal::apps {
namespace {

using load::AnswerCheck;
using load::ClientOptions;
using load::ClientState;
using load::LoadClient;
using load::LoadReport;
using load::Outcome;
using load::Traffic;
using load::TrafficOptions;

struct BenchServeFlags {
  std::string url, endpoint = "chat", arrivals = "poisson";
  std::string prompt = "64", output = "64";
  std::string json, svg, record, expect;
  ClientOptions client;
  TrafficOptions traffic;
};

void check_share(const char* flag, double share) {
  HADAL_INPUT_CHECK(share >= 0 && share <= 1, "bench serve: ", flag, ": expected 0 to 1, found ",
                    share);
}

/// Fills in what the flags say together; an InputError names the flag that is wrong.
void complete(BenchServeFlags& options) {
  ClientOptions& client = options.client;
  TrafficOptions& traffic = options.traffic;
  client.url = server::Url::parse(options.url, "bench serve: --url");
  if (!client.url.path.ends_with("/v1")) client.url.path += "/v1";
  HADAL_INPUT_CHECK(options.endpoint == "chat" || options.endpoint == "completions",
                    "bench serve: --endpoint: expected chat or completions, found ",
                    options.endpoint);
  HADAL_INPUT_CHECK(options.arrivals == "poisson" || options.arrivals == "fixed",
                    "bench serve: --arrivals: expected poisson or fixed, found ", options.arrivals);
  traffic.chat = options.endpoint == "chat";
  traffic.poisson = options.arrivals == "poisson";
  traffic.prompt = LengthDistribution::parse(options.prompt, "bench serve: --prompt");
  traffic.output = LengthDistribution::parse(options.output, "bench serve: --output");
  HADAL_INPUT_CHECK((traffic.rate > 0) != (client.concurrency > 0),
                    "bench serve: expected one of --rate and --concurrency, above 0");
  HADAL_INPUT_CHECK(traffic.rate >= 0 && traffic.rate <= 1e6 && client.concurrency >= 0 &&
                        client.concurrency <= 100'000,
                    "bench serve: expected --rate up to 1e6 and --concurrency up to 100000, found ",
                    traffic.rate, " and ", client.concurrency);
  HADAL_INPUT_CHECK(client.requests >= 0 && client.duration >= 0,
                    "bench serve: --requests and --duration cannot be negative, found ",
                    client.requests, " and ", client.duration);
  if (client.requests == 0 && client.duration == 0) client.requests = 100;
  HADAL_INPUT_CHECK(client.timeout > 0 && client.timeout <= 1e7,
                    "bench serve: --timeout: expected seconds above 0, found ", client.timeout);
  HADAL_INPUT_CHECK(traffic.distinct >= 0 && traffic.shared_prefix >= 0 &&
                        traffic.shared_prefix <= LengthDistribution::kMax,
                    "bench serve: --distinct and --shared-prefix: found ", traffic.distinct,
                    " and ", traffic.shared_prefix);
  check_share("--shared-share", traffic.shared_share);
  check_share("--slow-readers", traffic.slow_share);
  check_share("--cancel", traffic.cancel_share);
}

std::string title(const BenchServeFlags& options) {
  const ClientOptions& client = options.client;
  const std::string load =
      client.concurrency > 0
          ? fmt::format("{} at a time", client.concurrency)
          : fmt::format("{} a second ({})", options.traffic.rate, options.arrivals);
  return fmt::format("{} {}, model {}: {}, prompts of {} words, answers of {} tokens, seed {}",
                     client.url.str(), options.endpoint, options.traffic.model, load,
                     options.prompt, options.output, options.traffic.seed);
}

std::string json_text(const BenchServeFlags& options,
                      const LoadReport& report,
                      const AnswerCheck* check) {
  const TrafficOptions& traffic = options.traffic;
  const std::string url = options.client.url.str();
  JsonWriter out;
  out.begin_object().key("load").begin_object();
  out.field("url", std::string_view(url)).field("endpoint", std::string_view(options.endpoint));
  out.field("model", std::string_view(traffic.model));
  if (options.client.concurrency > 0)
    out.field("concurrency", options.client.concurrency);
  else
    out.field("rate", traffic.rate).field("arrivals", std::string_view(options.arrivals));
  out.field("prompt_words", std::string_view(options.prompt));
  out.field("output_tokens", std::string_view(options.output));
  out.field("shared_prefix", traffic.shared_prefix).field("shared_share", traffic.shared_share);
  out.field("distinct", traffic.distinct).field("slow_readers", traffic.slow_share);
  out.field("cancel", traffic.cancel_share).field("temperature", traffic.temperature);
  out.field("seed", static_cast<int64_t>(traffic.seed)).end_object();
  report.write_json(out);
  if (check != nullptr)
    out.field("compared", check->compared())
        .field("wrong", check->wrong())
        .field("unknown", check->unknown());
  return out.end_object().str();
}

/// Progress in requests, or in seconds where only time ends the test.
class LoadProgress {
 public:
  explicit LoadProgress(const ClientOptions& options)
      : by_time_(options.requests == 0),
        total_(by_time_ ? static_cast<int64_t>(options.duration) : options.requests),
        progress_("load", total_, by_time_ ? "s" : "requests") {}

  void update(const ClientState& state) {
    const double seconds = state.seconds - last_.seconds;
    if (seconds < 1 && last_.seconds > 0) return;
    const double rate = static_cast<double>(state.pieces - last_.pieces) / seconds;
    // After the last request is sent, time does not tell when the last answer comes.
    progress_.update(
        by_time_ ? std::min(static_cast<int64_t>(state.seconds), total_) : state.ended,
        fmt::format("{} open, {} tokens/s", state.sent - state.ended, short_number(rate)));
    last_ = state;
  }

 private:
  bool by_time_;
  int64_t total_;
  Progress progress_;
  ClientState last_;
};

int run(BenchServeFlags options) {
  complete(options);
  std::optional<AnswerCheck> check;
  if (!options.record.empty() || !options.expect.empty()) check.emplace(options.expect);
  LoadClient client(options.client);
  if (options.traffic.model.empty()) options.traffic.model = client.first_model();
  const Traffic traffic(options.traffic);
  const InterruptFlag interrupt;
  LoadReport report;
  ClientState state;
  {
    LoadProgress progress(options.client);
    state = client.run(
        traffic,
        [&](const Outcome& outcome) {
          report.add(outcome);
          if (check) check->add(outcome);
        },
        [&](const ClientState& now) {
          progress.update(now);
          return !interrupt.raised();
        });
  }
  report.finish(state.seconds, state.sent);

  if (!options.record.empty()) check->write(options.record);
  if (!options.svg.empty()) write_file_atomic(options.svg, report.draw());
  const std::string json = json_text(options, report, check ? &*check : nullptr);
  if (options.json == "-") {
    std::fputs(json.c_str(), stdout);
  } else {
    if (!options.json.empty()) write_file_atomic(options.json, json);
    report.print(title(options));
    if (check)
      std::printf("\n  answers: %lld compared, %lld wrong, %lld without a recorded one\n",
                  static_cast<long long>(check->compared()), static_cast<long long>(check->wrong()),
                  static_cast<long long>(check->unknown()));
  }
  if (check && check->wrong() + check->unknown() > 0) return 1;
  return report.answered() == 0 && report.failed() > 0 ? 1 : 0;
}

}  // namespace

std::function<int()> define_bench_serve(CLI::App& app) {
  auto options = std::make_shared<BenchServeFlags>();  // outlives define(), shared with the parser
  options->traffic.rate = 0;
  ClientOptions& client = options->client;
  TrafficOptions& traffic = options->traffic;
  app.footer(
      "Requests are sent at their planned times whatever the server does, and latencies count "
      "from\n"
      "those times. Lengths: N, A:B (uniform) or lognormal:MEDIAN:SIGMA.\n"
      "Exit code: 0 done, failed requests included; 1 wrong answers, or none at all; 2 bad usage.\n"
      "Example:\n"
      "  hadal bench serve --url http://127.0.0.1:8000 --rate 2 --duration 60 --prompt 100:2000\n"
      "  hadal bench serve --url http://127.0.0.1:8000 --concurrency 1 --requests 200 \\\n"
      "    --distinct 200 --record answers.jsonl\n"
      "  hadal bench serve --url http://127.0.0.1:8000 --concurrency 1000 --duration 1800 \\\n"
      "    --distinct 200 --expect answers.jsonl --cancel 0.1 --slow-readers 0.1");
  app.add_option("--url", options->url, "http(s)://host:port of the server")->required();
  app.add_option("--endpoint", options->endpoint, "chat or completions")->capture_default_str();
  app.add_option("--model", traffic.model, "default: the first that the server lists");
  app.add_option("--api-key", client.api_key, "sent as bearer token");
  app.add_flag("--insecure", client.insecure, "take any certificate of an https server");
  app.add_option("--rate", traffic.rate, "open loop: requests a second");
  app.add_option("--arrivals", options->arrivals, "of the open loop: poisson or fixed")
      ->capture_default_str();
  app.add_option("--concurrency", client.concurrency, "closed loop: clients at a time");
  app.add_option("--requests", client.requests, "end after so many (default 100)");
  app.add_option("--duration", client.duration, "begin requests for so many seconds");
  app.add_option("--timeout", client.timeout, "seconds from the planned time to the last token")
      ->capture_default_str();
  app.add_option("--prompt", options->prompt, "words of a prompt")->capture_default_str();
  app.add_option("--output", options->output, "tokens of an answer, at most")
      ->capture_default_str();
  app.add_option("--text", traffic.text, "file that prompts are made of; default: prose");
  app.add_option("--shared-prefix", traffic.shared_prefix, "words in front of prompts, the same");
  app.add_option("--shared-share", traffic.shared_share, "share of prompts that have them")
      ->capture_default_str();
  app.add_option("--distinct", traffic.distinct, "draw from so many different requests");
  app.add_option("--temperature", traffic.temperature, "of sampling; every request has a seed")
      ->capture_default_str();
  app.add_option("--extra", traffic.extra, "a JSON object added to every request");
  app.add_option("--seed", traffic.seed, "of arrivals, lengths and words")->capture_default_str();
  app.add_option("--slow-readers", traffic.slow_share, "share of clients that read slowly");
  app.add_option("--cancel", traffic.cancel_share, "share that leave after a few tokens");
  app.add_option("--record", options->record, "write the answers here, JSON lines");
  app.add_option("--expect", options->expect, "compare the answers with these, byte for byte");
  app.add_option("--json", options->json, "write the figures here; - prints them instead");
  app.add_option("--svg", options->svg, "write charts of the latencies here");
  return [options] { return run(*options); };
}

}  // namespace hadal::apps
