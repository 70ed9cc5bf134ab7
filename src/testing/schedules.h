// Random schedules of an engine without its thread: company, chunks, preemption, drafts, hits in
// memory and on disk. The full logits behind every token must be those of the request alone.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <c10/core/Device.h>

#include "engine_core/disk/disk_store.h"
#include "engine_core/request.h"
#include "model/transformer.h"
#include "ops/op.h"

namespace hadal::testing {

/// What a token came from: a digest of its logits, all of them, and the choice.
struct Drawn {
  uint64_t logits = 0;
  int64_t token = 0;
  friend bool operator==(const Drawn&, const Drawn&) = default;
};

struct ScheduleShape {
  int num_requests = 56;         ///< that schedules are drawn from
  int max_company = 64;          ///< sequences together
  int64_t shared = 600;          ///< tokens of the beginning that prompts share parts of
  int64_t max_own = 60;          ///< tokens of a prompt behind it
  int64_t max_answer = 24;       ///< tokens
  int64_t small_memory = 6;      ///< pages that force preemption
  int64_t large_memory = 72;     ///< pages
  int64_t max_context = 4096;    ///< tokens that a request alone has memory for, at most
  int64_t max_chunk = 420;       ///< tokens of a step of prompts alone
  bool scores = true;            ///< some requests ask for their prompts' log-probabilities
  at::Device device = at::kCPU;  ///< where the model's parameters are
};

/// What the schedules went through; a test asks that none of it is 0.
struct ScheduleCounts {
  int64_t schedules = 0, tokens = 0, preempted = 0, cached = 0, drafted = 0, accepted = 0;
  int64_t scored = 0;                        ///< tokens of prompts
  int64_t full = 0, periodic = 0, zero = 0;  ///< tokens from disk under each policy
  int64_t largest_company = 0;
  std::string to_string() const;
};

class Schedules {
 public:
  using Key = std::tuple<uint64_t, int64_t, int64_t>;  ///< seed, choice, position

  /// `model` must outlive it. Draws requests from `seed` and records each alone.
  Schedules(const model::Transformer& model,
            ops::Numerics numerics,
            const ScheduleShape& shape,
            uint64_t seed);
  ~Schedules();

  /// One more random schedule; reports differences as failures of the running test.
  void run();
  const ScheduleCounts& counts() const { return counts_; }

 private:
  struct Machine;
  engine_core::Request draw_request(uint64_t seed, const std::vector<int64_t>& shared);
  int64_t random(int64_t least, int64_t most);

  const model::Transformer& model_;
  ops::Numerics numerics_;
  ScheduleShape shape_;
  std::mt19937_64 random_;
  std::string folder_;
  std::vector<engine_core::Request> requests_;
  std::map<Key, Drawn> alone_;
  std::vector<std::map<int64_t, std::vector<int64_t>>> tokens_;
  std::vector<std::shared_ptr<const std::vector<engine_core::TokenScore>>> scores_;
  ScheduleCounts counts_;
};

/// HADAL_SCHEDULES, or `usual`.
int64_t schedules_wanted(int64_t usual);

}  // namespace hadal::testing
