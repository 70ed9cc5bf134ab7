// hadal bench: what this machine reads and multiplies; bench_step.h: steps without the model,
// bench_model.h: steps of a model on a GPU, bench_serve.h: the load test.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <CLI/CLI.hpp>

#include "apps/bench_model.h"
#include "apps/bench_serve.h"
#include "apps/bench_step.h"
#include "apps/command.h"
#include "apps/flags.h"
#include "base/check.h"
#include "base/json.h"
#include "base/parallel.h"
#include "base/philox.h"
#include "ops/gemm/linear.h"

namespace hadal::apps {
namespace {

using ops::GemmRole;
using ops::Panels;

constexpr int64_t kGiB = int64_t{1} << 30;

struct BenchFlags {
  std::string what;
  int64_t out = 4096, in = 4096;
  double gib = 1.0, seconds = 1.0;
  bool json = false;
  StepBenchOptions step;
  ModelBenchOptions model;
};

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

at::Tensor random_bytes(const std::vector<int64_t>& shape, uint64_t stream) {
  const at::Tensor bytes = at::empty(shape, at::kByte);
  auto* data = bytes.mutable_data_ptr<uint8_t>();
  const Philox random(1, stream);
  parallel_for(bytes.numel() / 16, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto words = random.block(static_cast<uint64_t>(i));
      std::memcpy(data + i * 16, words.data(), 16);
    }
  });
  return bytes;
}

/// The exclusive or of all words; `words` is a multiple of 64 and the memory aligned to 64 bytes.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
uint64_t
read_all(const uint64_t* data, int64_t words) {
  using Vector = uint64_t __attribute__((vector_size(64)));
  const auto* v = reinterpret_cast<const Vector*>(data);
  Vector a{}, b{}, c{}, d{};
  for (int64_t i = 0; i < words / 8; i += 4) {
    a ^= v[i];
    b ^= v[i + 1];
    c ^= v[i + 2];
    d ^= v[i + 3];
  }
  a ^= b ^ c ^ d;
  uint64_t result = 0;
  for (int i = 0; i < 8; ++i) result ^= a[i];
  return result;
}

/// Bytes a second that all threads together read out of `memory`.
class ReadBench {
 public:
  explicit ReadBench(int64_t bytes) : memory_(at::ones({bytes}, at::kByte)) {}

  double pass() {
    const int64_t chunk = int64_t{1} << 20, chunks = memory_.numel() / chunk;
    const auto* data = memory_.const_data_ptr<uint8_t>();
    std::atomic<uint64_t> result{0};
    const double seconds = seconds_of([&] {
      parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
        result ^= read_all(reinterpret_cast<const uint64_t*>(data + begin * chunk),
                           (end - begin) * chunk / 8);
      });
    });
    result_ = result_ ^ result.load();
    return static_cast<double>(chunks * chunk) / seconds;
  }

 private:
  at::Tensor memory_;
  volatile uint64_t result_ = 0;  ///< nobody asks for it, but the reads must stay
};

struct Format {
  const char* name;
  GemmRole role;
  at::ScalarType rows;
};
constexpr Format kFormats[] = {{"fp4", GemmRole::kFp4, at::kBFloat16},
                               {"fp8", GemmRole::kFp8, at::kBFloat16},
                               {"bf16", GemmRole::kBf16, at::kBFloat16},
                               {"fp32", GemmRole::kFp32, at::kFloat}};

Panels make_panels(const std::string& format, int64_t out, int64_t in, uint64_t stream) {
  if (format == "fp4") {
    const at::Tensor scale = at::full({out, in / 32}, 120, at::kByte);
    return ops::pack_fp4({random_bytes({out, in / 2}, stream)}, {scale}).value();
  }
  if (format == "fp8") {
    // Without the codes of NaN.
    const at::Tensor codes = random_bytes({out, in}, stream).bitwise_and_(0xf7);
    const at::Tensor scale = at::full({(out + 127) / 128, (in + 127) / 128}, 120, at::kByte);
    return ops::pack_fp8({codes.view(at::kFloat8_e4m3fn)}, {scale}).value();
  }
  const at::Tensor w = at::full({out, in}, 0.01, format == "bf16" ? at::kBFloat16 : at::kFloat);
  return ops::pack_panels(w);
}

struct BenchLine {
  std::string format;
  int64_t rows;
  double gigabytes, gigaflops, read_share;
};

/// Times every row count over one set of matrices; bandwidth is measured in turn with them.
std::vector<BenchLine> bench_format(const Format& format,
                                    const BenchFlags& options,
                                    ReadBench& read) {
  std::vector<Panels> weights;
  int64_t bytes = 0;
  while (weights.empty() || static_cast<double>(bytes) < options.gib * kGiB) {
    weights.push_back(make_panels(format.name, options.out, options.in, weights.size()));
    bytes += weights.back().num_bytes();
  }
  std::vector<BenchLine> lines;
  for (const int64_t rows : {1, 4, 16, 64, 256}) {
    // Activations as the role gets them: quantised ones for FP8 and FP4.
    const at::Tensor x =
        ops::quantise_input(at::randn({rows, options.in}), format.role, ops::Numerics::kReleased)
            .to(format.rows);
    std::vector<double> seconds, bandwidth;
    double total = 0;
    // Every pass begins where the last one ended, so that all matrices take their turn.
    for (size_t next = 0; total < options.seconds || seconds.size() < 3;) {
      bandwidth.push_back(read.pass());
      size_t count = 0;
      const double budget = options.seconds / 5;
      double pass = 0;
      while (count < weights.size() && (pass < budget || count < 2)) {
        pass += seconds_of([&] { ops::linear(x, weights[next], format.role); });
        next = (next + 1) % weights.size();
        ++count;
      }
      seconds.push_back(pass / static_cast<double>(count));
      total += pass;
    }
    const double time = median(seconds);
    const auto per_matrix = static_cast<double>(weights[0].num_bytes());
    lines.push_back(
        {.format = format.name,
         .rows = rows,
         .gigabytes = per_matrix / time / 1e9,
         .gigaflops = 2.0 * static_cast<double>(rows * options.out * options.in) / time / 1e9,
         .read_share = per_matrix / time / median(bandwidth)});
  }
  return lines;
}

void print(const BenchFlags& options, double read, const std::vector<BenchLine>& lines) {
  if (options.json) {
    JsonWriter out;
    out.begin_object().field("threads", num_threads()).field("read_gb_per_s", read / 1e9);
    if (!lines.empty()) {
      out.field("out", options.out).field("in", options.in).key("gemm").begin_array();
      for (const BenchLine& line : lines)
        out.begin_object()
            .field("weights", std::string_view(line.format))
            .field("rows", line.rows)
            .field("gb_per_s", line.gigabytes)
            .field("gflops", line.gigaflops)
            .field("share_of_read", line.read_share)
            .end_object();
      out.end_array();
    }
    std::fputs(out.end_object().str().c_str(), stdout);
    return;
  }
  std::printf("read %.1f GB/s on %d threads\n", read / 1e9, num_threads());
  if (lines.empty()) return;
  std::printf("\n%-8s %5s %10s %10s %8s\n", "weights", "rows", "GB/s", "GFLOP/s", "of read");
  for (const BenchLine& line : lines)
    std::printf("%-8s %5lld %10.2f %10.1f %7.0f%%\n", line.format.c_str(),
                static_cast<long long>(line.rows), line.gigabytes, line.gigaflops,
                100 * line.read_share);
}

int run_step(const BenchFlags& options) {
  StepBenchOptions step = options.step;
  step.seconds = options.seconds;
  const std::vector<StepBenchLine> lines = bench_step(step);
  if (options.json) {
    JsonWriter out;
    out.begin_object().field("threads", num_threads()).key("step").begin_array();
    for (const StepBenchLine& line : lines)
      out.begin_object()
          .field("what", std::string_view(line.what))
          .field("us", line.microseconds)
          .end_object();
    std::fputs(out.end_array().end_object().str().c_str(), stdout);
    return 0;
  }
  for (const StepBenchLine& line : lines)
    std::printf("%10.1f us  %s\n", line.microseconds, line.what.c_str());
  return 0;
}

void print(const LongRun& run, int64_t layers) {
  const auto context = static_cast<double>(run.context), answer = static_cast<double>(run.answer);
  std::printf(
      "context of %.0f: prefill %.1f s, %.0f tokens/s, a chunk of 4,096 %.1f ms at first, %.1f at "
      "last (%.2f, %.2f a layer)\n",
      context, run.prefill_seconds, context / run.prefill_seconds, run.first_chunk_ms,
      run.last_chunk_ms, run.first_chunk_ms / static_cast<double>(layers),
      run.last_chunk_ms / static_cast<double>(layers));
  std::printf("answer of %.0f: %.2f ms a token, %.2f in its first tenth, %.2f in its last\n",
              answer, run.decode_ms, run.early_ms, run.late_ms);
  std::printf("cache %.0f bytes, %.4f of the formula's %.0f\n", run.cache_bytes,
              run.cache_bytes / run.formula_bytes, run.formula_bytes);
}

int run_model(const BenchFlags& options) {
  const ModelBench bench = bench_model(options.model);
  if (options.json) {
    JsonWriter out;
    out.begin_object()
        .field("layers", bench.layers)
        .field("weights_gib", bench.weights_gib)
        .field("kv_gib", bench.kv_gib)
        .key("model")
        .begin_array();
    for (const ModelBenchLine& line : bench.lines)
      out.begin_object()
          .field("what", std::string_view(line.what))
          .field("ms", line.milliseconds)
          .field("us_per_layer", line.layer_us)
          .field("host_us", line.host_us)
          .field("tokens_per_s", static_cast<double>(line.tokens) / line.milliseconds * 1e3)
          .end_object();
    out.end_array().key("long").begin_array();
    for (const LongRun& one : bench.long_runs)
      out.begin_object()
          .field("context", one.context)
          .field("answer", one.answer)
          .field("prefill_s", one.prefill_seconds)
          .field("first_chunk_ms", one.first_chunk_ms)
          .field("last_chunk_ms", one.last_chunk_ms)
          .field("decode_ms", one.decode_ms)
          .field("early_ms", one.early_ms)
          .field("late_ms", one.late_ms)
          .field("cache_bytes", one.cache_bytes)
          .field("formula_bytes", one.formula_bytes)
          .end_object();
    std::fputs(out.end_array().end_object().str().c_str(), stdout);
    return 0;
  }
  std::printf("%s, %lld layers, %.1f GiB of random weights, %.1f GiB of cache\n",
              options.model.preset.c_str(), static_cast<long long>(bench.layers), bench.weights_gib,
              bench.kv_gib);
  for (const LongRun& one : bench.long_runs) print(one, bench.layers);
  if (bench.lines.empty()) return 0;
  std::printf("%-44s %10s %12s %12s %12s\n", "", "ms", "us a layer", "us of host", "tokens/s");
  for (const ModelBenchLine& line : bench.lines)
    std::printf("%-44s %10.2f %12.1f %12.1f %12.0f\n", line.what.c_str(), line.milliseconds,
                line.layer_us, line.host_us,
                static_cast<double>(line.tokens) / line.milliseconds * 1e3);
  return 0;
}

int run(const BenchFlags& options) {
  HADAL_INPUT_CHECK(options.what == "read" || options.what == "gemm" || options.what == "step" ||
                        options.what == "model",
                    "bench: expected read, gemm, step, model or serve, found ",
                    options.what.empty() ? "nothing" : options.what);
  if (options.what == "step") return run_step(options);
  if (options.what == "model") return run_model(options);
  HADAL_INPUT_CHECK(options.in % 32 == 0, "bench: --in must be a multiple of 32, found ",
                    options.in);
  const at::NoGradGuard no_grad;
  ReadBench read(static_cast<int64_t>(options.gib * kGiB));
  std::vector<double> bandwidth;
  double total = 0;
  for (total = 0; total < options.seconds || bandwidth.size() < 5;)
    total += seconds_of([&] { bandwidth.push_back(read.pass()); });
  std::vector<BenchLine> lines;
  if (options.what == "gemm") {
    for (const Format& format : kFormats) {
      for (BenchLine& line : bench_format(format, options, read)) lines.push_back(std::move(line));
    }
  }
  print(options, median(bandwidth), lines);
  return 0;
}

void define_model_bench(CLI::App& app, ModelBenchOptions& options) {
  app.add_option("--preset", options.preset, "model: v4-flash or v4-pro")->capture_default_str();
  app.add_option("--layers", options.layers, "model: from the first on; 0: as many as fit")
      ->check(between(0, 1024))
      ->capture_default_str();
  app.add_option("--batch", options.batches, "model: sequences of a decode step")
      ->check(between(1, 4096))
      ->capture_default_str();
  app.add_option("--contexts", options.contexts, "model: tokens before the step")
      ->check(between(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--chunk", options.chunks, "model: tokens of a prefill step")
      ->check(between(1, 1 << 16))
      ->capture_default_str();
  app.add_option("--drafts", options.drafts, "model: tokens more in each sequence of a step")
      ->check(between(1, 8));
  app.add_option("--steps", options.steps, "model: that are timed")
      ->check(between(5, 100'000))
      ->capture_default_str();
  app.add_flag("--whole-prefill", options.whole_prefill,
               "model: compute whole contexts, not the first 8,192 tokens alone");
  app.add_option("--answer", options.answer,
                 "model: one sequence alone, that computes each context whole and goes on by so "
                 "many tokens as it draws them; 0: steps")
      ->check(between(0, 1 << 20))
      ->capture_default_str();
  app.add_option(
      "--text", options.text,
      "model, with --answer: file that the context begins with, by the shipped model's tokenizer");
}

}  // namespace

std::function<int()> define_bench(CLI::App& app) {
  auto options = std::make_shared<BenchFlags>();  // outlives define(), shared with the parser
  app.add_option(
      "what", options->what,
      "read: bandwidth of this machine's memory; gemm: the CPU's matrix kernel; step: what a "
      "decode step costs beside the model; model: steps of a released model's layers with random "
      "weights on a GPU");
  app.add_option("--out", options->out, "outputs of each matrix")
      ->check(between(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--in", options->in, "inputs of each matrix")
      ->check(between(32, 1 << 20))
      ->capture_default_str();
  app.add_option("--sequences", options->step.sequences, "step: sequences that are planned")
      ->check(between(1, 4096))
      ->capture_default_str();
  app.add_option("--context", options->step.context, "step: tokens of each")
      ->check(between(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--vocab", options->step.vocab, "step: logits of a row")
      ->check(between(100, 1 << 20))
      ->capture_default_str();
  define_model_bench(app, options->model);
  app.add_option("--gib", options->gib, "distinct memory to go through")
      ->check(between(0.001, 1024))
      ->capture_default_str();
  app.add_option("--seconds", options->seconds, "measured at least so long for each line")
      ->check(between(0, 86400))
      ->capture_default_str();
  app.add_flag("--json", options->json, "print JSON");
  CLI::App* serve = app.add_subcommand("serve", "load on an OpenAI-compatible server");
  const std::function<int()> run_serve = define_bench_serve(*serve);
  return [options, serve, run_serve] { return serve->parsed() ? run_serve() : run(*options); };
}

}  // namespace hadal::apps
