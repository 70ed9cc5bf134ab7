// hadal tokenize, hadal detokenize: text to ids and back, plain or one JSON object a line.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <memory>

#include <CLI/CLI.hpp>

#include "apps/text_commands.h"
#include "apps/text_io.h"
#include "base/check.h"
#include "text/python_json.h"
#include "text/tokenizer.h"

namespace hadal::apps {
namespace {

using text::PyJson;

struct TokenizeFlags {
  std::string tokenizer;
  std::string input;
  bool jsonl = false;
  bool as_text = false;
  bool speed = false;
};

std::shared_ptr<TokenizeFlags> define_tokens(CLI::App& app) {
  auto options = std::make_shared<TokenizeFlags>();
  app.add_option("--tokenizer", options->tokenizer, "tokenizer.json")->required();
  app.add_flag("--jsonl", options->jsonl, R"({"text": ...} and {"ids": [...]} lines)");
  app.add_option("file", options->input, "input (default: standard input)");
  return options;
}

/// The member of a line's object. Errors: InputError naming the line.
PyJson member_of_line(const std::string& line, long number, const char* key) {
  const std::string where = concat("line ", number);
  const PyJson object = PyJson::parse(text::repair_utf8(line), where);
  const PyJson* value = object.find(key);
  HADAL_INPUT_CHECK(value != nullptr, where, ": expected an object with '", key, "', found ",
                    object.is_object() ? "none of that name" : object.kind_name());
  return *value;
}

int32_t parse_id(std::string_view word) {
  int32_t id = 0;
  const auto result = std::from_chars(word.data(), word.data() + word.size(), id);
  HADAL_INPUT_CHECK(result.ec == std::errc() && result.ptr == word.data() + word.size(), "'", word,
                    "' is no token id");
  return id;
}

std::string join(const std::vector<int32_t>& ids, std::string_view separator) {
  std::string out;
  for (const int32_t id : ids) {
    if (!out.empty()) out += separator;
    out += std::to_string(id);
  }
  return out;
}

/// Sums up what encoding took, for --speed.
class Meter {
 public:
  std::vector<int32_t> encode(const text::Tokenizer& tokenizer,
                              std::string_view text,
                              bool as_text) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<int32_t> ids = tokenizer.encode(
        text, as_text ? text::SpecialTokens::kAsText : text::SpecialTokens::kRecognise);
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    bytes_ += text.size();
    tokens_ += ids.size();
    return ids;
  }
  void report() const {
    std::fprintf(stderr, "%zu bytes, %zu tokens, %.3f s, %.1f MB/s\n", bytes_, tokens_, seconds_,
                 static_cast<double>(bytes_) / seconds_ / 1e6);
  }

 private:
  double seconds_ = 0;
  size_t bytes_ = 0;
  size_t tokens_ = 0;
};

int tokenize(const TokenizeFlags& options) {
  const text::Tokenizer tokenizer = text::Tokenizer::from_file(options.tokenizer);
  Meter meter;
  if (options.jsonl) {
    for_each_line(options.input, [&](const std::string& line, long number) {
      const PyJson text = member_of_line(line, number, "text");
      HADAL_INPUT_CHECK(text.is_string(), "line ", number, ": 'text' is ", text.kind_name(),
                        ", expected a string");
      const std::vector<int32_t> ids = meter.encode(tokenizer, text.text(), options.as_text);
      write_output(concat("{\"ids\": [", join(ids, ", "), "]}\n"));
    });
  } else {
    write_output(join(meter.encode(tokenizer, read_input(options.input), options.as_text), " ") +
                 "\n");
  }
  if (options.speed) meter.report();
  return 0;
}

int detokenize(const TokenizeFlags& options) {
  const text::Tokenizer tokenizer = text::Tokenizer::from_file(options.tokenizer);
  if (options.jsonl) {
    for_each_line(options.input, [&](const std::string& line, long number) {
      const PyJson list = member_of_line(line, number, "ids");
      HADAL_INPUT_CHECK(list.is_array(), "line ", number, ": 'ids' is ", list.kind_name(),
                        ", expected a list");
      std::vector<int32_t> ids;
      try {
        for (const PyJson& item : list.items()) ids.push_back(parse_id(item.dump()));
        write_output(concat("{\"text\": ", text::quote_json(tokenizer.decode(ids)), "}\n"));
      } catch (const InputError& error) {
        throw InputError(concat("line ", number, ": ", error.what()));
      }
    });
    return 0;
  }
  const std::string input = read_input(options.input);
  std::vector<int32_t> ids;
  constexpr std::string_view kBetween = " \t\r\n,";
  for (size_t begin = input.find_first_not_of(kBetween); begin < input.size();) {
    const size_t end = std::min(input.find_first_of(kBetween, begin), input.size());
    ids.push_back(parse_id(std::string_view(input).substr(begin, end - begin)));
    begin = input.find_first_not_of(kBetween, end);
  }
  write_output(tokenizer.decode(ids));
  return 0;
}

}  // namespace

std::function<int()> define_tokenize(CLI::App& app) {
  auto options = define_tokens(app);
  app.add_flag("--as-text", options->as_text, "special tokens in the text are ordinary text");
  app.add_flag("--speed", options->speed,
               "print bytes, tokens and MB/s of encoding on standard error");
  return [options] { return tokenize(*options); };
}

std::function<int()> define_detokenize(CLI::App& app) {
  auto options = define_tokens(app);
  return [options] { return detokenize(*options); };
}

}  // namespace hadal::apps
