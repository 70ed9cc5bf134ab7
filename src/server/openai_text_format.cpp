// /v1/completions: text, with the prompt's own where it is wanted.
#include "server/openai_format.h"

namespace hadal::server {
namespace {

class TextFormat final : public OpenAiFormat {
 public:
  using OpenAiFormat::OpenAiFormat;
  static constexpr const char* kObject = "text_completion";

  void begin(const Answer& answer, std::string& out) override {
    sent_.resize(answer.choices.size());
    for (Sent& sent : sent_) sent.logprobs.emplace(tokenizer_, options_);
    for (size_t i = 0; i < answer.choices.size(); ++i) {
      // The prompt's log probabilities come with the first token.
      const bool now = options_.echo && !options_.logprobs && !prompt_of(i).text.empty();
      if (now) write(answer, i, prompt_of(i).text, Json(), Json(), out);
      sent_[i].echoed = now || !options_.echo;
    }
  }
  void text(const Answer& answer,
            size_t index,
            Kind,
            const std::string& text,
            std::string& out) override {
    const std::string shown = echo_of(index) + text;
    write(answer, index, shown, logprobs_since(answer, index), Json(), out);
  }
  void finished(const Answer& answer, size_t index, std::string& out) override {
    const std::string shown = echo_of(index);
    write(answer, index, shown, logprobs_since(answer, index),
          js(openai_finish(answer.choices[index])), out);
  }
  void end(const Answer& answer, std::string& out) override { write_end(answer, kObject, out); }

  std::string whole(const Answer& answer) override {
    Json choices = Json::array();
    for (size_t i = 0; i < answer.choices.size(); ++i) {
      const Choice& choice = answer.choices[i];
      TextLogprobs lists(tokenizer_, options_);
      if (options_.logprobs) {
        if (options_.echo) add_prompt(choice, i, lists);
        for (const engine_core::OutputToken& token : choice.content_tokens_info) lists.add(token);
      }
      const std::string echo = options_.echo ? prompt_of(i).text : std::string();
      Json entry = Json::object({{"index", js(static_cast<int64_t>(i))},
                                 {"text", js(echo + choice.content)},
                                 {"logprobs", lists.take()},
                                 {"finish_reason", js(openai_finish(choice))}});
      add_stop_reason(choice, entry);
      if (options_.prompt_logprobs >= 0 && choice.prompt_scores) {
        entry.set("prompt_logprobs",
                  prompt_logprobs_json(tokenizer_, options_, prompt_of(i), *choice.prompt_scores));
      }
      add_weights(choice, entry);
      add_drawn(choice, 0, entry);
      if (options_.token_ids) entry.set("prompt_token_ids", id_list(prompt_of(i).tokens));
      choices.items().push_back(std::move(entry));
    }
    Json body = frame(answer, kObject);
    body.set("choices", std::move(choices));
    body.set("usage", openai_usage(answer));
    return body.dump();
  }

 private:
  struct Sent {
    bool echoed = false;
    bool any = false;  ///< a chunk
    size_t tokens = 0, drawn = 0;
    std::optional<TextLogprobs> logprobs;
  };

  void add_prompt(const Choice& choice, size_t index, TextLogprobs& lists) const {
    HADAL_CHECK(choice.prompt_scores != nullptr, "server: no log probabilities of the prompt");
    lists.add_prompt(prompt_of(index), *choice.prompt_scores);
  }
  /// The prompt, once.
  std::string echo_of(size_t index) const {
    return sent_[index].echoed ? std::string() : prompt_of(index).text;
  }
  Json logprobs_since(const Answer& answer, size_t index) {
    Sent& sent = sent_[index];
    const Choice& choice = answer.choices[index];
    const bool echoes = !std::exchange(sent.echoed, true);
    if (!options_.logprobs) return {};
    if (echoes) add_prompt(choice, index, *sent.logprobs);
    const auto& tokens = choice.content_tokens_info;
    for (; sent.tokens < tokens.size(); ++sent.tokens) sent.logprobs->add(tokens[sent.tokens]);
    return sent.logprobs->take();
  }
  void write(const Answer& answer,
             size_t index,
             const std::string& text,
             Json logprobs,
             Json finish,
             std::string& out) {
    const Choice& choice = answer.choices[index];
    Sent& sent = sent_[index];
    Json entry = Json::object({{"index", js(static_cast<int64_t>(index))},
                               {"text", js(text)},
                               {"logprobs", std::move(logprobs)},
                               {"finish_reason", std::move(finish)}});
    if (choice.finish) add_stop_reason(choice, entry);
    if (choice.finish) add_weights(choice, entry);
    if (options_.token_ids && !sent.any)
      entry.set("prompt_token_ids", id_list(prompt_of(index).tokens));
    add_drawn(choice, sent.drawn, entry);
    sent.drawn = num_drawn(choice);
    sent.any = true;
    write_chunk(answer, kObject, Json::array({std::move(entry)}), out);
  }

  std::vector<Sent> sent_;
};

}  // namespace

std::unique_ptr<Format> text_completion_format(const text::Tokenizer& tokenizer,
                                               OpenAiFormatOptions options) {
  return std::make_unique<TextFormat>(tokenizer, std::move(options));
}

}  // namespace hadal::server
