// The requests of a load test, made from a seed: the same options give the same requests at the
// same times, whatever the server answers and whoever runs beside.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/distribution.h"

namespace hadal::load {

struct TrafficOptions {
  bool chat = true;  ///< /v1/chat/completions, else /v1/completions
  std::string model;
  uint64_t seed = 0;
  double rate = 1;                    ///< requests a second
  bool poisson = true;                ///< else at equal distances
  LengthDistribution prompt, output;  ///< words of the prompt, tokens of the answer at most
  int64_t shared_prefix = 0;          ///< words in front of the prompts that share them
  double shared_share = 1;
  int64_t distinct = 0;  ///< so many different requests; 0: all differ
  double slow_share = 0, cancel_share = 0;
  double temperature = 0;
  std::string extra;  ///< a JSON object whose members are added to every request; may be empty
  std::string text;   ///< the file that words come from; empty: built-in prose
};

struct PlannedRequest {
  int64_t index = 0;
  std::string body;          ///< JSON
  uint64_t hash = 0;         ///< of the body
  bool slow = false;         ///< its client reads slowly
  int64_t cancel_after = 0;  ///< its client leaves after so many pieces of the answer; 0: never
};

class Traffic {
 public:
  /// An InputError for a text without words or an `extra` that is no object.
  explicit Traffic(TrafficOptions options);

  PlannedRequest request(int64_t index) const;
  /// Seconds between the planned times of the request before and this one, at the options' rate.
  double gap(int64_t index) const;

  const TrafficOptions& options() const { return options_; }

 private:
  std::string words(uint64_t stream, int64_t count) const;
  std::string body(int64_t content) const;

  TrafficOptions options_;
  std::string text_;
  std::vector<std::string_view> words_;  ///< of text_
};

}  // namespace hadal::load
