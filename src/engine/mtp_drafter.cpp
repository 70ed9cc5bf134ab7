#include "engine/mtp_drafter.h"

#include <vector>

#include <ATen/ATen.h>

namespace hadal::engine {

void MtpDrafter::draft(std::span<engine_core::DraftRequest> requests) {
  std::vector<DraftStep> steps;
  std::vector<engine_core::DraftRequest*> asked;
  for (engine_core::DraftRequest& request : requests) {
    request.drafts.clear();
    const auto pos = static_cast<int64_t>(request.tokens.size()) - 1;
    if (request.max_drafts < 1 || pos < 1 || !runner_.can_draft(request.slot, pos)) continue;
    steps.push_back({.slot = request.slot, .tokens = request.tokens, .pages = request.pages});
    asked.push_back(&request);
  }
  if (steps.empty()) return;
  const at::Tensor logits = runner_.draft(steps);  // [steps, vocab]
  const auto vocab = static_cast<size_t>(logits.size(1));
  const std::span rows(logits.const_data_ptr<float>(), asked.size() * vocab);
  std::vector<engine_core::DrawInput> inputs;
  for (size_t i = 0; i < asked.size(); ++i)
    inputs.push_back({.draw = asked[i]->next, .logits = rows.subspan(i * vocab, vocab)});
  std::vector<engine_core::Sampled> sampled(inputs.size());
  sampler_.sample(inputs, sampled);
  for (size_t i = 0; i < asked.size(); ++i) asked[i]->drafts.push_back(sampled[i].token);
}

}  // namespace hadal::engine
