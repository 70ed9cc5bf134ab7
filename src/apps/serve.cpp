// hadal serve: the model behind the APIs that clients know.
#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <memory>
#include <sstream>

#include <ATen/Context.h>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/flags.h"
#include "apps/loaded_model.h"
#include "base/check.h"
#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "checkpoint/digest.h"
#include "engine/local_engine.h"
#include "server/page.h"
#include "server/server.h"
#include "server/url.h"

namespace hadal::apps {
namespace {

struct ServeFlags {
  std::string model, numerics, key_file, effort_levels;
  std::vector<std::string> names;
  std::string disk_policy = "periodic", device = "cpu";
  double cache_gib = 0.5, disk_gib = 16, ping_seconds = 15, response_gib = 0.25;
  engine::LocalEngineOptions engine;
  server::ServerOptions server;
};

engine_core::WindowPolicy parse_policy(const std::string& name) {
  if (name == "full") return engine_core::WindowPolicy::kFull;
  if (name == "periodic") return engine_core::WindowPolicy::kPeriodic;
  if (name == "zero") return engine_core::WindowPolicy::kZero;
  throw InputError("--disk-policy: expected full, periodic or zero, found " + name);
}

std::vector<std::string> read_keys(const std::string& path) {
  std::istringstream file(read_file(path, int64_t{1} << 24));
  std::vector<std::string> keys;
  for (std::string line; std::getline(file, line);) {
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.pop_back();
    if (!line.empty()) keys.push_back(line);
  }
  HADAL_INPUT_CHECK(!keys.empty(), "--api-keys: ", path, " holds no key");
  return keys;
}

/// SIGINT and SIGTERM wait for sigwait(), in this thread and in those that it starts.
sigset_t block_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  return set;
}

/// All that tells of something going on: unchanged while nobody asks for anything.
std::array<int64_t, 5> activity(const server::Server& server, engine_core::Engine& engine) {
  const server::HttpStats http = server.stats();
  const engine_core::EngineStats stats = engine.stats();
  return {http.requests, http.connections, http.active, stats.steps, stats.finished};
}

/// What was freed, and code of libraries that only steps need.
void rest() {
  give_back_freed_memory();
  drop_library_code();
}

/// Waits for SIGINT or SIGTERM. Meanwhile the process rests whenever nothing has gone on for a
/// second, and gives back what was freed now and then where something always does.
int wait_for_signal(const sigset_t& signals,
                    const server::Server& server,
                    engine_core::Engine& engine) {
  constexpr timespec kAtRest{.tv_sec = 1, .tv_nsec = 0}, kBusy{.tv_sec = 0, .tv_nsec = 500'000'000};
  constexpr int kQuietLooks = 2, kBusyLooks = 120;
  auto seen = activity(server, engine);
  bool busy = true;  // the start
  for (int quiet = 0, looks = 0;;) {
    const int signal = sigtimedwait(&signals, nullptr, busy ? &kBusy : &kAtRest);
    if (signal > 0) return signal;
    const auto now = activity(server, engine);
    quiet = now == seen ? quiet + 1 : 0;
    if (now != seen) busy = true;
    seen = now;
    if (!busy) continue;
    ++looks;
    if (quiet >= kQuietLooks) {
      rest();
      busy = false;
    } else if (looks >= kBusyLooks) {
      give_back_freed_memory();
    } else {
      continue;
    }
    looks = 0;
  }
}

int run(ServeFlags flags) {
  std::signal(SIGPIPE, SIG_IGN);
  const sigset_t signals = block_signals();
  if (flags.device == "cuda") {
    HADAL_INPUT_CHECK(at::globalContext().hasCUDA(),
                      "--device cuda: this build or machine has no CUDA device");
    flags.engine.device = at::kCUDA;
  }
  LoadedModel loaded = load_with_tokenizer(flags.model, flags.numerics, flags.engine.device);
  if (!flags.effort_levels.empty())
    loaded.effort = choose_effort_levels(loaded.folder, loaded.config(), flags.effort_levels);
  flags.server.effort_levels = loaded.effort.levels;
  flags.engine.numerics = loaded.numerics;
  flags.server.default_thinking = loaded.defaults.thinking;
  flags.server.default_sampling = loaded.defaults.sampling;
  flags.server.default_max_tokens = loaded.defaults.max_tokens;
  flags.engine.cache_bytes = static_cast<int64_t>(flags.cache_gib * (int64_t{1} << 30));
  flags.engine.disk.policy = parse_policy(flags.disk_policy);
  flags.engine.disk.max_bytes = static_cast<int64_t>(flags.disk_gib * (int64_t{1} << 30));
  flags.server.response_bytes = static_cast<int64_t>(flags.response_gib * (int64_t{1} << 30));
  flags.server.ping_interval =
      std::chrono::milliseconds(static_cast<int64_t>(flags.ping_seconds * 1000));
  if (!flags.key_file.empty()) flags.server.api_keys = read_keys(flags.key_file);
  // The first name is the model's own, the others are answered to.
  if (!flags.names.empty()) {
    flags.engine.model_name = flags.names.front();
    flags.server.model_aliases.assign(flags.names.begin() + 1, flags.names.end());
  } else {
    std::string folder = loaded.folder;
    while (folder.size() > 1 && folder.back() == '/') folder.pop_back();
    flags.engine.model_name = folder.substr(folder.find_last_of('/') + 1);
  }
  const std::string digest = checkpoint::weights_digest(loaded.folder);
  flags.engine.warm_up = true;
  drop_file_pages();  // what reading the weights once more for the digest needed
  engine::LocalEngine local(loaded.model, loaded.tokenizer, digest, flags.engine);
  flags.server.texts = local.texts();
  server::Server server(local.engine(), loaded.tokenizer, flags.server);
  server.api().add_page("/", "text/html; charset=utf-8", std::string(server::page()),
                        {{"Content-Security-Policy",
                          concat("default-src 'self'; script-src '", server::page_script_hash(),
                                 "'; style-src 'unsafe-inline'")}});
  // Browsers ask for it; an empty one is enough.
  server.api().add_page("/favicon.ico", "image/x-icon", "");
  server.start();
  const auto effort_line =
      concat("reasoning effort has the levels of ", text::effort_levels_name(loaded.effort.levels),
             " (", loaded.effort.reason, ")");
  loaded.effort.certain ? log::info("serve", effort_line) : log::warn("serve", effort_line);
  touch_own_code();
  const int64_t working = resident_bytes();
  rest();
  local.state_workspace();
  const engine_core::EngineStats memory = local.engine().stats();
  log::info("serve", "memory: ", memory.weights_bytes >> 20, " MiB of weights, ",
            memory.cache_bytes >> 20, " MiB of cache, ", memory.workspace_bytes >> 20,
            " MiB of workspace: ", resident_bytes() >> 20, " MiB at rest, ", working >> 20,
            " MiB with the code that answers need; beside it at most ",
            memory.grammar_bytes_most >> 20, " MiB of compiled grammars");
  const server::Url url{!flags.server.tls_certificate.empty(), flags.server.host, server.port(),
                        ""};
  std::fprintf(stderr, "hadal: %s at %s, a page to chat at /; Ctrl-C ends it\n",
               flags.engine.model_name.c_str(), url.str().c_str());
  const int signal = wait_for_signal(signals, server, local.engine());
  log::info("serve", "signal ", signal, ": open answers may end");
  server.stop();
  return 0;
}

}  // namespace

std::function<int()> define_serve(CLI::App& app) {
  auto flags = std::make_shared<ServeFlags>();
  engine::LocalEngineOptions& engine = flags->engine;
  server::ServerOptions& server = flags->server;
  app.add_option("--model", flags->model, "checkpoint folder; default: the shipped model");
  app.add_option("--numerics", flags->numerics, "released, fp8, bf16 or ideal; default: as stored");
  app.add_option("--name", flags->names,
                 "model name in the APIs; given again: further names that it answers to; "
                 "default: the folder's")
      ->allow_extra_args(false);
  app.add_flag("--any-model", server.any_model, "answer to every model name");
  app.add_option("--effort-levels", flags->effort_levels,
                 "preview or 0731: what a reasoning effort means; default: the model's (hadal "
                 "inspect tells)");
  app.add_option("--host", server.host, "address to listen on")->capture_default_str();
  app.add_option("--port", server.port, "0: any free one")->capture_default_str();
  app.add_option("--api-keys", flags->key_file, "file with one key a line; default: no keys");
  app.add_option("--cors", server.cors,
                 "origin whose pages may call the server from a browser, or *; may be given again")
      ->allow_extra_args(false);
  app.add_option("--allow-host", server.allowed_hosts,
                 "host name that requests may use beside this machine's; may be given again")
      ->allow_extra_args(false);
  app.add_option("--tls-certificate", server.tls_certificate, "PEM file");
  app.add_option("--tls-key", server.tls_key, "PEM file");
  app.add_option("--ping-seconds", flags->ping_seconds,
                 "a stream silent for so long gets a ping; 0: never")
      ->check(between(0, 1e6))
      ->capture_default_str();
  app.add_option("--cache-gib", flags->cache_gib, "memory of all that is remembered of texts")
      ->check(between(1e-6, 1e6))
      ->capture_default_str();
  app.add_option("--max-running", engine.max_running, "sequences in a step, at most")
      ->check(between(1, 65536))
      ->capture_default_str();
  app.add_option("--max-waiting", engine.max_waiting, "requests in the queue")
      ->check(between(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--max-context", engine.max_context, "tokens of prompt and answer; 0: all")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--step-tokens", engine.step_tokens,
                 "rows of a step while answers run, at most; 0: 256, on a GPU 1,024")
      ->check(between(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--prompt-step-ms", engine.prompt_step_ms,
                 "a step of running answers may take so long for prompts beside them, or four "
                 "times as long as without: less, and answers flow more evenly; more, and long "
                 "prompts are read faster")
      ->check(between(0, 60'000))
      ->capture_default_str();
  app.add_option("--max-drafts", engine.max_drafts, "tokens drafted ahead; 0: no speculation")
      ->check(between(0, 8))
      ->capture_default_str();
  app.add_option("--draft-threshold", engine.draft_threshold,
                 "a DSpark drafter's blocks end before a draft less probable to be right")
      ->check(between(0, 1))
      ->capture_default_str();
  app.add_flag("--always-draft", engine.always_draft, "drafts even where they do not pay");
  app.add_option("--disk-cache", engine.disk.folder, "folder of the prefix store; default: none");
  app.add_option("--disk-gib", flags->disk_gib, "its budget")
      ->check(between(1e-6, 1e6))
      ->capture_default_str();
  app.add_option("--disk-policy", flags->disk_policy,
                 "full: all windows; periodic: a snapshot a page; zero: states are computed again")
      ->capture_default_str();
  app.add_option("--response-store", server.response_folder,
                 "folder that keeps responses for previous_response_id; default: they are kept in "
                 "--disk-cache, if there is one");
  app.add_option("--response-gib", flags->response_gib, "its budget")
      ->check(between(0, 1e6))
      ->capture_default_str();
  app.add_option("--device", flags->device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  return [flags] { return run(*flags); };
}

}  // namespace hadal::apps
