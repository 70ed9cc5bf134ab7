// hadal eval choice: multiple choice by likelihood. hadal eval generate: answers written out.
#include "apps/eval_tasks.h"

#include <cstdio>
#include <memory>

#include <CLI/CLI.hpp>

#include "apps/choice_eval.h"
#include "apps/flags.h"
#include "apps/generate_eval.h"
#include "base/json.h"
#include "base/log.h"
#include "base/progress.h"

namespace hadal::apps {
namespace {

double share(int64_t part, int64_t whole) {
  return static_cast<double>(part) / static_cast<double>(whole);
}

struct ChoiceFlags {
  std::string file, model, numerics;
  ChoiceOptions options;
  bool no_bos = false, json = false;
};

int run_choice(ChoiceFlags flags) {
  log::set_level(log::Level::kWarn);  // the terminal is for the result
  const LoadedModel loaded = load_with_tokenizer(flags.model, flags.numerics);
  flags.options.bos = !flags.no_bos;
  int64_t questions = 0, right = 0, right_by_length = 0;
  double sum = 0;
  JsonWriter json;
  if (flags.json) json.begin_object().key("questions").begin_array();
  Progress bar("eval", 0, "questions");
  score_choices(loaded, flags.file, flags.options, [&](const Question& question) {
    ++questions;
    right += question.best() == question.answer ? 1 : 0;
    right_by_length += question.best_by_length() == question.answer ? 1 : 0;
    sum += question.choices[static_cast<size_t>(question.answer)].logprob;
    if (flags.json) {
      json.begin_object().field("answer", question.answer).field("best", question.best());
      json.field("best_by_length", question.best_by_length()).key("choices").begin_array();
      for (const ChoiceScore& choice : question.choices) {
        json.begin_object().field("logprob", choice.logprob).field("tokens", choice.tokens);
        json.field("greedy", choice.greedy).end_object();
      }
      json.end_array().end_object();
    }
    bar.update(questions);
  });
  bar.finish();
  if (flags.json) {
    json.end_array().field("model", std::string_view(loaded.folder));
    json.field("numerics", ops::numerics_name(loaded.numerics));
    json.field("acc", share(right, questions)).field("acc_norm", share(right_by_length, questions));
    json.field("answers_logprob", sum).end_object();
    std::fputs(json.str().c_str(), stdout);
    return 0;
  }
  std::printf("model %s, numerics %s, %lld questions\n", loaded.folder.c_str(),
              ops::numerics_name(loaded.numerics), static_cast<long long>(questions));
  std::printf("%.6f nats: the right answers, all together\n", sum);
  std::printf("%.4f of the questions by the sum for each character\n",
              share(right_by_length, questions));
  std::printf("%.4f of the questions by the sum\n", share(right, questions));
  return 0;
}

struct GenerateTaskFlags {
  std::string file, model, numerics;
  GenerateOptions options;
  bool no_bos = false, json = false;
};

int run_generate(GenerateTaskFlags flags) {
  log::set_level(log::Level::kWarn);  // the terminal is for the result
  const LoadedModel loaded = load_with_tokenizer(flags.model, flags.numerics);
  flags.options.bos = !flags.no_bos;
  int64_t answers = 0, exact = 0, same = 0;
  JsonWriter json;
  if (flags.json) json.begin_object().key("answers").begin_array();
  Progress bar("eval", 0, "answers");
  generate_answers(loaded, flags.file, flags.options, [&](const GeneratedAnswer& answer) {
    ++answers;
    exact += answer.exact() ? 1 : 0;
    same += answer.same_words() ? 1 : 0;
    if (flags.json) {
      json.begin_object().field("text", std::string_view(answer.text));
      json.field("finish", std::string_view(answer.finish)).field("tokens", answer.tokens);
      json.field("exact", answer.exact()).end_object();
    }
    bar.update(answers);
  });
  bar.finish();
  if (flags.json) {
    json.end_array().field("model", std::string_view(loaded.folder));
    json.field("numerics", ops::numerics_name(loaded.numerics));
    json.field("exact_match", share(exact, answers));
    json.field("same_words", share(same, answers)).end_object();
    std::fputs(json.str().c_str(), stdout);
    return 0;
  }
  std::printf("model %s, numerics %s, %lld answers\n", loaded.folder.c_str(),
              ops::numerics_name(loaded.numerics), static_cast<long long>(answers));
  std::printf("%.4f are right but for white space around them\n", share(same, answers));
  std::printf("%.4f are right to the byte\n", share(exact, answers));
  return 0;
}

void add_common(CLI::App& app, std::string& model, std::string& numerics, bool& json) {
  app.add_option("--model", model,
                 "checkpoint folder with tokenizer.json; default: the shipped model");
  app.add_option("--numerics", numerics,
                 "ideal, bf16, released or fp8; default: by the checkpoint's storage");
  app.add_flag("--json", json, "print JSON, every line's result included");
}

}  // namespace

std::function<int()> define_eval_choice(CLI::App& app) {
  auto flags = std::make_shared<ChoiceFlags>();
  app.footer(
      "Example:\n  hadal eval choice questions.jsonl\n"
      "  {\"context\": \"A cat is\", \"choices\": [\"an animal\", \"a stone\"], \"answer\": 0}");
  app.add_option("FILE", flags->file,
                 "questions, one JSON object a line: context, choices, answer (a number or the "
                 "choice)")
      ->required();
  app.add_option("--delimiter", flags->options.delimiter, "between a context and a choice")
      ->capture_default_str();
  app.add_flag("--no-bos", flags->no_bos,
               "no BOS before a context, as programs do that send ids without it");
  app.add_flag("--special-tokens", flags->options.special_tokens,
               "special tokens that stand in the texts are recognised");
  app.add_option("--max-questions", flags->options.max_lines, "only the first")->check(above(0));
  app.add_option("--step-tokens", flags->options.step_tokens, "tokens a forward pass, for memory")
      ->check(above(0))
      ->capture_default_str();
  add_common(app, flags->model, flags->numerics, flags->json);
  return [flags] { return run_choice(*flags); };
}

std::function<int()> define_eval_generate(CLI::App& app) {
  auto flags = std::make_shared<GenerateTaskFlags>();
  app.footer(
      "Example:\n  hadal eval generate questions.jsonl --chat --max-tokens 64\n"
      "  {\"context\": \"What is 2 + 2?\", \"answer\": \"4\", \"until\": [\"\\n\"]}");
  app.add_option("FILE", flags->file,
                 "questions, one JSON object a line: context, answer, until (texts that end it)")
      ->required();
  app.add_flag("--chat", flags->options.chat, "the context is a user's message, not plain text");
  app.add_flag("--thinking", flags->options.thinking, "with --chat: the model thinks first");
  app.add_option("--until", flags->options.until, "a text that ends the answer; repeatable");
  app.add_option("--max-tokens", flags->options.max_tokens, "tokens of an answer at most")
      ->check(above(0))
      ->capture_default_str();
  app.add_flag("--no-bos", flags->no_bos, "no BOS before a plain context");
  app.add_option("--max-questions", flags->options.max_lines, "only the first")->check(above(0));
  add_common(app, flags->model, flags->numerics, flags->json);
  return [flags] { return run_generate(*flags); };
}

}  // namespace hadal::apps
