// hadal eval perplexity: bits per byte of a text, or of every document of a JSON lines file.
// hadal eval selection: what the indexer's choice keeps of the attention.
// hadal eval tool-calls: the form of the calls that a model makes in recorded dialogues.
// hadal eval choice and generate: eval_tasks.h.
#include <cstdio>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/Context.h>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "apps/eval_tasks.h"
#include "apps/flags.h"
#include "apps/perplexity.h"
#include "apps/tool_call_eval.h"
#include "base/check.h"
#include "base/json.h"
#include "base/log.h"
#include "base/progress.h"
#include "data/text_source.h"
#include "text/utf8.h"
#include "train/objective.h"

namespace hadal::apps {
namespace {

constexpr int64_t kDefaultContext = 4096;

struct EvalFlags {
  std::string file, model, numerics, field = "text", device = "cpu";
  int64_t context = 0, max_bytes = 0, max_documents = 0, step_tokens = 8192;
  bool json = false;
};

struct Document {
  std::string name, text;
};

/// The beginning of a text, at most max_bytes of it and no half character; 0 means all.
std::string beginning(std::string text, int64_t max_bytes) {
  if (max_bytes > 0 && static_cast<int64_t>(text.size()) > max_bytes) {
    auto size = static_cast<size_t>(max_bytes);
    while (size > 0 && (static_cast<unsigned char>(text[size]) & 0xC0) == 0x80) --size;
    text.resize(size);
  }
  return text;
}

bool holds_documents(const EvalFlags& flags) {
  return data::without_compression(flags.file).ends_with(".jsonl");
}

std::vector<Document> read_documents(const EvalFlags& flags) {
  std::vector<Document> documents;
  data::for_each_document(flags.file, flags.field, [&](std::string text) {
    if (flags.max_documents > 0 && static_cast<int64_t>(documents.size()) >= flags.max_documents)
      return;
    const std::string name = concat("document ", documents.size() + 1);
    documents.push_back({name, beginning(std::move(text), flags.max_bytes)});
    check_text(documents.back().text,
               holds_documents(flags) ? flags.file + ": " + name : flags.file);
  });
  HADAL_INPUT_CHECK(!documents.empty(), flags.file, ": holds no document");
  return documents;
}

int64_t context_of(const EvalFlags& flags, const model::ModelConfig& config) {
  const int64_t context = flags.context > 0           ? flags.context
                          : config.trained_length > 0 ? config.trained_length
                                                      : kDefaultContext;
  HADAL_INPUT_CHECK(context >= 2 && context <= config.max_position_embeddings, "--context ",
                    context, ": expected 2 to ", config.max_position_embeddings,
                    ", the model's max_position_embeddings");
  return context;
}

void write_score(JsonWriter& out, const TextScore& score) {
  out.field("tokens", score.tokens).field("bytes", score.bytes);
  out.field("nats_per_token", score.nats_per_token()).field("bits_per_byte", score.bits_per_byte());
}

std::string score_line(const TextScore& score) {
  char nats[32];
  std::snprintf(nats, sizeof(nats), "%.6f", score.nats_per_token());
  return concat(score.tokens, " tokens, ", score.bytes, " bytes, ", nats, " nats per token");
}

int run(const EvalFlags& flags) {
  const std::vector<Document> documents = read_documents(flags);
  const bool cuda = flags.device == "cuda";
  HADAL_INPUT_CHECK(!cuda || at::globalContext().hasCUDA(),
                    "--device cuda: this build or machine has no CUDA device");
  const LoadedModel loaded =
      load_with_tokenizer(flags.model, flags.numerics, cuda ? at::kCUDA : at::kCPU);
  const PerplexityOptions options{.context = context_of(flags, loaded.config()),
                                  .step_tokens = flags.step_tokens,
                                  .cuda = cuda};
  AnswerEngine engine(loaded, scoring_engine(options));
  const bool many = holds_documents(flags);
  int64_t total_bytes = 0;
  for (const Document& document : documents) total_bytes += std::ssize(document.text);
  Progress bar("eval", total_bytes, "bytes");
  bar.update(0);

  JsonWriter json;
  if (flags.json) {
    json.begin_object().field("file", std::string_view(flags.file));
    json.field("model", std::string_view(loaded.folder));
    json.field("numerics", ops::numerics_name(loaded.numerics)).field("context", options.context);
    if (many) json.key("documents").begin_array();
  }
  int64_t done_bytes = 0;
  double sum = 0.0;
  TextScore total;
  for (const Document& document : documents) {
    const TextScore score = score_text(engine, loaded, document.text, options, [&](int64_t bytes) {
      bar.update(done_bytes + bytes, document.name);
    });
    done_bytes += score.bytes;
    sum += score.bits_per_byte();
    total.tokens += score.tokens;
    total.bytes += score.bytes;
    total.nats += score.nats;
    if (many && flags.json) {
      write_score(json.begin_object(), score);
      json.end_object();
    } else if (many) {
      std::printf("%s: %s, %.6f bits per byte\n", document.name.c_str(), score_line(score).c_str(),
                  score.bits_per_byte());
      std::fflush(stdout);
    }
  }
  bar.finish();
  const double mean = sum / static_cast<double>(documents.size());
  if (flags.json) {
    if (many) json.end_array().field("mean_bits_per_byte", mean);
    write_score(json, total);
    std::fputs(json.end_object().str().c_str(), stdout);
    return 0;
  }
  std::printf("model %s, numerics %s, windows of %lld tokens\n", loaded.folder.c_str(),
              ops::numerics_name(loaded.numerics), static_cast<long long>(options.context));
  std::printf("%s\n", score_line(total).c_str());
  if (many) {
    std::printf("mean over %zu documents: %.6f bits per byte\n", documents.size(), mean);
  } else {
    std::printf("%.6f bits per byte\n", mean);
  }
  return 0;
}

struct SelectionFlags {
  EvalFlags text;
  int64_t windows = 4;
};

/// The first windows of every document, whole ones only.
int run_selection(const SelectionFlags& flags) {
  const std::vector<Document> documents = read_documents(flags.text);
  const LoadedModel loaded = load_with_tokenizer(flags.text.model, flags.text.numerics);
  const int64_t context = context_of(flags.text, loaded.config());
  std::vector<train::PackedRows> rows;
  for (const Document& document : documents) {
    const std::vector<int32_t> ids =
        loaded.tokenizer.encode(document.text, text::SpecialTokens::kAsText);
    for (int64_t window = 0; window < flags.windows; ++window) {
      const int64_t first = window * (context - 1);
      if (first + context - 1 > std::ssize(ids)) break;
      train::PackedRows row{.rows = 1,
                            .row_length = context,
                            .tokens = {static_cast<int32_t>(loaded.config().bos_token_id)},
                            .scored = std::vector<uint8_t>(static_cast<size_t>(context), 1),
                            .sample_lengths = {context}};
      row.tokens.insert(row.tokens.end(), ids.begin() + first, ids.begin() + first + context - 1);
      rows.push_back(std::move(row));
    }
  }
  HADAL_INPUT_CHECK(!rows.empty(), flags.text.file, ": no document has ", context, " tokens");
  const int64_t windows = std::ssize(rows);
  Progress bar("eval", windows, "windows");
  bar.update(0);
  train::Evaluation result;
  int64_t done = 0;
  for (const train::PackedRows& row : rows) {
    train::evaluate(loaded.model, train::MicroBatch(row, at::kCPU), model::AttentionMode::kSparse,
                    loaded.numerics, result);
    bar.update(++done);
  }
  bar.finish();
  HADAL_INPUT_CHECK(result.mass_queries > 0, loaded.folder,
                    ": nothing is selected: no CSA layer, or index_topk covers every block of ",
                    context, " tokens");
  std::printf("%lld windows of %lld tokens, index_topk %lld\n", static_cast<long long>(windows),
              static_cast<long long>(context), static_cast<long long>(loaded.config().index_topk));
  std::printf("the best choice keeps %.4f of the attention mass over blocks\n", result.best_mass());
  std::printf("the indexer keeps %.4f of the attention mass over blocks\n", result.selected_mass());
  return 0;
}

void define_selection(CLI::App& app, const std::shared_ptr<SelectionFlags>& flags) {
  app.footer("Example:\n  hadal eval selection books.jsonl.xz --windows 8");
  app.add_option("FILE", flags->text.file, "a text, or .jsonl with one document a line")
      ->required();
  app.add_option("--model", flags->text.model,
                 "checkpoint folder with tokenizer.json; default: the shipped model");
  app.add_option("--context", flags->text.context,
                 "tokens a window; default: trained_length in config.json, else 4096")
      ->check(above(0));
  app.add_option("--windows", flags->windows, "windows at the beginning of every document")
      ->check(above(0))
      ->capture_default_str();
  app.add_option("--field", flags->text.field, "of a .jsonl line: the text")->capture_default_str();
  app.add_option("--numerics", flags->text.numerics,
                 "ideal, bf16, released or fp8; default: by the checkpoint's storage");
}

struct ToolCallFlags {
  std::string file, model, numerics;
  ToolCallOptions options;
  bool json = false;
};

int run_tool_calls(const ToolCallFlags& flags) {
  log::set_level(log::Level::kWarn);  // the terminal is for the result
  const LoadedModel loaded = load_with_tokenizer(flags.model, flags.numerics);
  std::optional<Progress> bar;  // once it is known that there is something to do
  const ToolCallScore score =
      score_tool_calls(loaded, flags.file, flags.options, [&](const ToolCallScore& so_far) {
        if (!bar) bar.emplace("eval", flags.options.turns, "turns");
        bar->update(so_far.turns);
      });
  bar->finish();
  if (flags.json) {
    JsonWriter json;
    json.begin_object().field("turns", score.turns).field("well_formed", score.well_formed);
    json.field("known_tool", score.known_tool).field("same_tool", score.same_tool);
    json.field("same_arguments", score.same_arguments);
    std::fputs(json.end_object().str().c_str(), stdout);
    return 0;
  }
  const auto line = [&](int64_t count, const char* what) {
    std::printf("%lld of %lld turns %s\n", static_cast<long long>(count),
                static_cast<long long>(score.turns), what);
  };
  line(score.well_formed, "parse");
  line(score.same_arguments, "call the recorded tool with the recorded arguments");
  line(score.same_tool, "call the recorded tool");
  line(score.known_tool, "parse and call known tools only");
  return 0;
}

void define_tool_calls(CLI::App& app, const std::shared_ptr<ToolCallFlags>& flags) {
  app.footer("Example:\n  hadal eval tool-calls dialogues.jsonl --turns 100");
  app.add_option("FILE", flags->file,
                 "dialogues, one JSON object a line: messages, tools, thinking_mode")
      ->required();
  app.add_option("--model", flags->model,
                 "checkpoint folder with tokenizer.json; default: the shipped model");
  app.add_option("--turns", flags->options.turns, "turns to try, one of every dialogue")
      ->check(above(0))
      ->capture_default_str();
  app.add_option("--max-tokens", flags->options.max_tokens, "tokens of an answer at most")
      ->check(above(0))
      ->capture_default_str();
  app.add_option("--numerics", flags->numerics,
                 "ideal, bf16, released or fp8; default: by the checkpoint's storage");
  app.add_flag("--json", flags->json, "print JSON");
}

}  // namespace

std::function<int()> define_eval(CLI::App& app) {
  app.require_subcommand(1);
  CLI::App* tool_calls = app.add_subcommand(
      "tool-calls", "whether a model calls tools in the right form in recorded dialogues");
  auto tool_flags = std::make_shared<ToolCallFlags>();
  define_tool_calls(*tool_calls, tool_flags);
  CLI::App* selection = app.add_subcommand(
      "selection", "the share of the attention over blocks that the indexer's choice keeps");
  auto selection_flags = std::make_shared<SelectionFlags>();
  define_selection(*selection, selection_flags);
  CLI::App* choice = app.add_subcommand(
      "choice", "multiple choice: whether the right one of several continuations is likeliest");
  const std::function<int()> run_choice = define_eval_choice(*choice);
  CLI::App* generate =
      app.add_subcommand("generate", "whether the answers that a model writes are the right ones");
  const std::function<int()> run_generate = define_eval_generate(*generate);
  CLI::App* perplexity = app.add_subcommand(
      "perplexity", "bits per byte of a text: what a model has to be told of it");
  perplexity->footer(
      "Example:\n  hadal eval perplexity book.txt --model DIR\n"
      "  hadal eval perplexity books.jsonl.xz --field text --max-bytes 1000000");
  auto flags = std::make_shared<EvalFlags>();
  perplexity
      ->add_option("FILE", flags->file,
                   "a text, or .jsonl with one document a line; either as .xz or .zst, too")
      ->required();
  perplexity->add_option("--model", flags->model,
                         "checkpoint folder with tokenizer.json; default: the shipped model");
  perplexity
      ->add_option("--context", flags->context,
                   "tokens a window; default: trained_length in config.json, else 4096")
      ->check(above(0));
  perplexity->add_option("--field", flags->field, "of a .jsonl line: the text")
      ->capture_default_str();
  perplexity->add_option("--max-bytes", flags->max_bytes, "score the beginning of every document")
      ->check(above(0));
  perplexity->add_option("--max-documents", flags->max_documents, "score the first documents only")
      ->check(above(0));
  perplexity->add_option("--numerics", flags->numerics,
                         "ideal, bf16, released or fp8; default: by the checkpoint's storage");
  perplexity->add_option("--step-tokens", flags->step_tokens, "tokens a forward pass, for memory")
      ->check(above(0))
      ->capture_default_str();
  perplexity->add_option("--device", flags->device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  perplexity->add_flag("--json", flags->json, "print JSON");
  return [=] {
    if (choice->parsed()) return run_choice();
    if (generate->parsed()) return run_generate();
    if (tool_calls->parsed()) return run_tool_calls(*tool_flags);
    if (selection->parsed()) return run_selection(*selection_flags);
    return run(*flags);
  };
}

}  // namespace hadal::apps
