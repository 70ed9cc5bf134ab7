#include "engine/dspark_drafter.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

namespace hadal::engine {
namespace {

using engine_core::DraftRequest;
using engine_core::Draw;

/// A sequence and its block, while more of it is to be drawn.
struct Drafting {
  DraftRequest* request;
  int64_t block;
};

/// How the token behind the drafts so far is drawn; false where none may be.
bool next_draw(DraftRequest& request, Draw& draw) {
  draw = request.next;
  draw.pos += std::ssize(request.drafts);
  draw.ahead = request.drafts;
  if (request.drafts.empty() || request.filter == nullptr) return true;
  try {
    draw.mask = request.filter->masks(request.drafts).back();
  } catch (const std::exception&) {
    return false;  // the answer ends there, if these drafts are right
  }
  return true;
}

bool goes_on(const DraftRequest& request) {
  return std::ssize(request.drafts) < request.max_drafts &&
         std::ranges::find(request.ends, request.drafts.back()) == request.ends.end();
}

}  // namespace

void DsparkDrafter::draft(std::span<DraftRequest> requests) {
  std::vector<DraftStep> steps;
  std::vector<Drafting> open;
  for (DraftRequest& request : requests) {
    request.drafts.clear();
    const auto pos = std::ssize(request.tokens) - 1;
    if (request.max_drafts < 1 || !runner_.can_draft(request.slot, pos)) continue;
    open.push_back({.request = &request, .block = std::ssize(steps)});
    steps.push_back({.slot = request.slot, .tokens = request.tokens, .pages = request.pages});
  }
  if (steps.empty()) return;
  const model::DraftedBlocks blocks = runner_.draft_blocks(steps);
  for (int64_t i = 0; i < runner_.block_size() && !open.empty(); ++i) {
    std::vector<int64_t> rows, previous;
    for (const Drafting& each : open) {
      const DraftRequest& request = *each.request;
      rows.push_back(each.block * runner_.block_size() + i);
      previous.push_back(i == 0 ? request.tokens.back() : request.drafts.back());
    }
    const model::DraftScores scores = runner_.draft_scores(blocks, rows, previous);
    const auto vocab = static_cast<size_t>(scores.logits.size(1));
    const std::span logits(scores.logits.const_data_ptr<float>(), open.size() * vocab);
    const auto* confidence = scores.confidence.const_data_ptr<float>();
    std::vector<Draw> draws;
    std::vector<Drafting> drawn;
    std::vector<std::span<const float>> of_draws;
    draws.reserve(open.size());
    for (size_t at = 0; at < open.size(); ++at) {
      const double survives = 1 / (1 + std::exp(-static_cast<double>(confidence[at])));
      Draw draw;
      if ((i > 0 && survives < threshold_) || !next_draw(*open[at].request, draw)) continue;
      draws.push_back(draw);
      drawn.push_back(open[at]);
      of_draws.push_back(logits.subspan(at * vocab, vocab));
    }
    std::vector<engine_core::DrawInput> inputs;
    for (size_t at = 0; at < draws.size(); ++at)
      inputs.push_back({.draw = draws[at], .logits = of_draws[at]});
    std::vector<engine_core::Sampled> sampled(inputs.size());
    sampler_.sample(inputs, sampled);
    open.clear();
    for (size_t at = 0; at < drawn.size(); ++at) {
      if (sampled[at].token < 0) continue;
      drawn[at].request->drafts.push_back(sampled[at].token);
      if (goes_on(*drawn[at].request)) open.push_back(drawn[at]);
    }
  }
}

}  // namespace hadal::engine
