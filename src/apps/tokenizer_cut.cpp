// hadal tokenizer-cut: a small tokenizer.json out of a large one and the texts it is meant for.
#include "text/tokenizer_cut.h"

#include <memory>

#include <CLI/CLI.hpp>

#include "apps/flags.h"
#include "apps/text_commands.h"
#include "apps/text_io.h"
#include "base/file.h"

namespace hadal::apps {
namespace {

struct CutFlags {
  std::string tokenizer;
  std::string out;
  int64_t vocab_size = 8192;
  int64_t min_count = 5;
  std::vector<std::string> texts;
};

int cut(const CutFlags& options) {
  size_t next = 0;
  const std::string result = text::cut_tokenizer(read_input(options.tokenizer), options.tokenizer,
                                                 {.vocab_size = options.vocab_size,
                                                  .min_count = options.min_count,
                                                  .added_tokens = text::chat_token_names()},
                                                 [&](std::string& text) {
                                                   if (next == options.texts.size()) return false;
                                                   text = read_input(options.texts[next++]);
                                                   return true;
                                                 });
  write_file_atomic(options.out, result);
  return 0;
}

}  // namespace

std::function<int()> define_tokenizer_cut(CLI::App& app) {
  auto options = std::make_shared<CutFlags>();
  app.add_option("--tokenizer", options->tokenizer, "the large tokenizer.json")->required();
  app.add_option("--vocab-size", options->vocab_size, "ids of the result, added tokens included")
      ->check(between(1, 1 << 24))
      ->capture_default_str();
  app.add_option("--min-count", options->min_count, "how often a merge must occur in the texts")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--out", options->out, "file to write")->required();
  app.add_option("text", options->texts, "plain text files")->required();
  return [options] { return cut(*options); };
}

}  // namespace hadal::apps
