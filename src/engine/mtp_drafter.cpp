#include "engine/mtp_drafter.h"

#include <vector>

#include <ATen/ATen.h>

namespace hadal::engine {

void MtpDrafter::draft(std::span<DraftRequest> requests) {
  std::vector<DraftStep> steps;
  std::vector<DraftRequest*> asked;
  for (DraftRequest& request : requests) {
    request.drafts.clear();
    const auto pos = static_cast<int64_t>(request.tokens.size()) - 1;
    if (request.max_drafts < 1 || pos < 1 || !runner_.can_draft(request.slot, pos)) continue;
    steps.push_back(
        {.slot = request.slot, .pos = pos, .token = request.tokens.back(), .pages = request.pages});
    asked.push_back(&request);
  }
  if (steps.empty()) return;
  const at::Tensor best = runner_.draft(steps).argmax(1);  // [steps]
  for (size_t i = 0; i < asked.size(); ++i)
    asked[i]->drafts.push_back(best.const_data_ptr<int64_t>()[i]);
}

}  // namespace hadal::engine
