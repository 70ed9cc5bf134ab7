// What the formats of chat and text completions share: errors in the middle of a stream and its
// end. Included by them only.
#pragma once

#include <algorithm>
#include <string>
#include <utility>

#include "base/check.h"
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
  /// As write_sse() of a frame with choices and usage, without making again what all chunks share.
  void write_chunk(const Answer& answer,
                   const char* object,
                   const Json& choices,
                   std::string& out) {
    out += "data: ";
    out += head_of(answer, object);
    out += ", \"choices\": ";
    choices.dump_to(out);
    if (options_.usage_in_chunks) {
      out += ", \"usage\": ";
      openai_usage(answer).dump_to(out);
    } else if (options_.include_usage) {
      out += ", \"usage\": null";
    }
    out += "}\n\n";
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
                         {"system_fingerprint", fingerprint_of(answer)}});
  }
  /// Of the weights, where the engine has told which.
  static Json fingerprint_of(const Answer& answer) {
    const auto& weights = answer.choices.front().weights;
    if (weights == nullptr || weights->digest.empty()) return {};
    return js(concat("fp_", weights->digest.substr(0, 16)));
  }
  /// Beyond OpenAI's: which stop string or token ended the choice.
  static void add_stop_reason(const Choice& choice, Json& entry) {
    if (!choice.matched_stop.empty()) entry.set("stop_reason", js(choice.matched_stop));
    if (choice.stop_token >= 0) entry.set("stop_reason", js(choice.stop_token));
  }
  /// Beyond OpenAI's, once a choice is whole: which weights it is of.
  static void add_weights(const Choice& choice, Json& entry) {
    if (choice.weights != nullptr) entry.set("weights_version", js(choice.weights->number));
  }
  /// Lists of what was drawn since the first so many.
  void add_drawn(const Choice& choice, size_t from, Json& entry) const {
    if (options_.token_ids) entry.set("token_ids", id_list(choice.token_ids, from));
    if (options_.sampled_logprobs)
      entry.set("sampled_logprobs", number_list(choice.sampled_logprobs, from));
  }
  /// How many have been drawn.
  static size_t num_drawn(const Choice& choice) {
    return std::max(choice.token_ids.size(), choice.sampled_logprobs.size());
  }
  /// Of choice `index`.
  const TextPrompt& prompt_of(size_t index) const {
    return options_.prompts.at(index / static_cast<size_t>(options_.choices_per_prompt));
  }

  const text::Tokenizer& tokenizer_;
  const OpenAiFormatOptions options_;

 private:
  /// frame() without its last brace.
  const std::string& head_of(const Answer& answer, const char* object) {
    const auto& weights = answer.choices.front().weights;
    if (head_.empty() || weights != head_weights_) {
      head_ = frame(answer, object).dump();
      head_.pop_back();
      head_weights_ = weights;
    }
    return head_;
  }
  std::string head_;  ///< of chunks of one kind: a format writes no others
  std::shared_ptr<const engine_core::WeightsVersion> head_weights_;
};

}  // namespace hadal::server
