// What the formats of chat and text completions share: errors in the middle of a stream and its
// end. Included by them only.
#pragma once

#include <string>
#include <utility>

#include "server/openai_types.h"

namespace hadal::server {

class OpenAiFormat : public Format {
 public:
  OpenAiFormat(const text::Tokenizer& tokenizer, OpenAiFormatOptions options)
      : tokenizer_(tokenizer), options_(std::move(options)) {}
  HttpResponse error(const RequestError& error) override { return openai_error(error); }
  void stream_error(const RequestError& error, std::string& out) override {
    out += "data: " + openai_error(error).body + "\n\ndata: [DONE]\n\n";
  }

 protected:
  void write_chunk(const Answer& answer, const char* object, Json choices, std::string& out) const {
    Json chunk = frame(answer, object);
    chunk.set("choices", std::move(choices));
    if (options_.usage_in_chunks) {
      chunk.set("usage", openai_usage(answer));
    } else if (options_.include_usage) {
      chunk.set("usage", Json());
    }
    write_sse(out, chunk);
  }
  void write_end(const Answer& answer, const char* object, std::string& out) const {
    if (options_.include_usage) {
      Json chunk = frame(answer, object);
      chunk.set("choices", Json::array());
      chunk.set("usage", openai_usage(answer));
      write_sse(out, chunk);
    }
    out += "data: [DONE]\n\n";
  }
  Json frame(const Answer& answer, const char* object) const {
    return Json::object({{"id", js(answer.id)},
                         {"object", js(object)},
                         {"created", js(answer.created)},
                         {"model", js(answer.model)},
                         {"system_fingerprint", options_.fingerprint}});
  }
  /// Beyond OpenAI's: which stop string or token ended the choice.
  static void add_stop_reason(const Choice& choice, Json& entry) {
    if (!choice.matched_stop.empty()) entry.set("stop_reason", js(choice.matched_stop));
    if (choice.stop_token >= 0) entry.set("stop_reason", js(choice.stop_token));
  }
  /// Of choice `index`.
  const TextPrompt& prompt_of(size_t index) const {
    return options_.prompts.at(index / static_cast<size_t>(options_.choices_per_prompt));
  }

  const text::Tokenizer& tokenizer_;
  const OpenAiFormatOptions options_;
};

}  // namespace hadal::server
