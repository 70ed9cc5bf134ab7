#include "train/part_sums.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "ops/tensor_sums.h"

namespace hadal::train {
namespace {

/// Elements of one message at most.
constexpr int64_t kMessage = int64_t{1} << 22;

/// Elements of one node's gradient.
struct Range {
  size_t node;
  int64_t begin, end;
};

/// What goes to a member, message after message: the same list on all members.
std::vector<std::vector<Range>> messages_to(int64_t member,
                                            std::span<const CollectedPiece> pieces,
                                            const std::vector<PartNode>& nodes) {
  std::vector<std::vector<Range>> messages;
  int64_t room = 0;
  const auto add = [&](size_t node, int64_t begin, int64_t end) {
    while (begin < end) {
      if (room == 0) {
        messages.emplace_back();
        room = kMessage;
      }
      const int64_t count = std::min(room, end - begin);
      messages.back().push_back({node, begin, begin + count});
      begin += count;
      room -= count;
    }
  };
  for (size_t node = 0; node < nodes.size(); ++node) {
    if (!nodes[node].gradient.defined()) continue;
    for (const CollectedPiece& piece :
         std::ranges::equal_range(pieces, nodes[node].parameter, {}, &CollectedPiece::parameter))
      if (piece.member == member) add(node, piece.begin, piece.end);
  }
  return messages;
}

at::Tensor slice(const std::vector<PartNode>& nodes, const Range& range) {
  return nodes[range.node].gradient.view(-1).narrow(0, range.begin, range.end - range.begin);
}

at::Tensor packed(const std::vector<PartNode>& nodes, const std::vector<Range>& ranges) {
  std::vector<at::Tensor> parts;
  for (const Range& range : ranges) parts.push_back(slice(nodes, range));
  return at::cat(parts);
}

/// Members whose graphs differ would wait for each other without end.
void check_same(dist::Group& group, const std::vector<PartNode>& nodes) {
  std::vector<int64_t> mask;
  for (const PartNode& node : nodes) mask.push_back(node.gradient.defined() ? 1 : 0);
  const at::Tensor own = at::tensor(mask, at::kLong);
  std::vector<at::Tensor> others;
  std::vector<dist::Transfer> transfers;
  for (int64_t member = 0; member < group.size(); ++member) {
    if (member == group.index()) continue;
    transfers.push_back(group.send(own, member));
    others.push_back(at::empty_like(own));
    transfers.push_back(group.receive(others.back(), member));
  }
  for (dist::Transfer& transfer : transfers) transfer.wait();
  for (const at::Tensor& other : others) {
    for (size_t i = 0; i < nodes.size(); ++i)
      HADAL_CHECK(other[static_cast<int64_t>(i)].item<int64_t>() == mask[i],
                  "part sums: some members have a gradient of parameter ", nodes[i].parameter,
                  ", others have none");
  }
}

std::vector<int64_t> sample_lengths(const MicroBatch& row) {
  std::vector<int64_t> lengths;
  for (int64_t seq = 0; seq < row.batch.num_seqs(); ++seq) lengths.push_back(row.batch.length(seq));
  return lengths;
}

size_t number_of(const std::vector<at::Tensor>& parameters, const at::Tensor& value) {
  const auto found = std::ranges::find_if(parameters, [&](const at::Tensor& parameter) {
    return value.defined() && parameter.is_same(value);
  });
  return static_cast<size_t>(found - parameters.begin());
}

}  // namespace

void collect_whole(dist::Group& group,
                   std::span<const CollectedPiece> pieces,
                   std::vector<PartNode>& nodes) {
  const at::NoGradGuard no_grad;
  check_same(group, nodes);
  std::vector<std::vector<std::vector<Range>>> messages;
  size_t rounds = 0;
  for (int64_t member = 0; member < group.size(); ++member) {
    messages.push_back(messages_to(member, pieces, nodes));
    rounds = std::max(rounds, messages.back().size());
  }
  const auto of = [&](int64_t member, size_t round) -> const std::vector<Range>* {
    const auto& list = messages[static_cast<size_t>(member)];
    return round < list.size() ? &list[round] : nullptr;
  };
  std::vector<uint64_t> numbers(static_cast<size_t>(group.size()));
  std::iota(numbers.begin(), numbers.end(), uint64_t{0});
  for (size_t round = 0; round < rounds; ++round) {
    std::vector<at::Tensor> sent, parts(numbers.size());
    std::vector<dist::Transfer> transfers;
    for (int64_t member = 0; member < group.size(); ++member) {
      const std::vector<Range>* ranges = of(member, round);
      if (ranges == nullptr || member == group.index()) continue;
      sent.push_back(packed(nodes, *ranges));
      transfers.push_back(group.send(sent.back(), member));
    }
    const std::vector<Range>* own = of(group.index(), round);
    for (int64_t member = 0; own != nullptr && member < group.size(); ++member) {
      at::Tensor& part = parts[static_cast<size_t>(member)];
      part = packed(nodes, *own);
      if (member != group.index()) transfers.push_back(group.receive(part, member));
    }
    for (dist::Transfer& transfer : transfers) transfer.wait();
    if (own == nullptr) continue;
    const at::Tensor sum = ops::sum_by_number(numbers, std::move(parts));
    int64_t from = 0;
    for (const Range& range : *own) {
      slice(nodes, range).copy_(sum.narrow(0, from, range.end - range.begin));
      from += range.end - range.begin;
    }
  }
}

std::vector<CollectedPiece> collected_pieces(const Ownership& ownership) {
  std::vector<CollectedPiece> pieces;
  for (const PlanPiece& piece : ownership.pieces())
    pieces.push_back({piece.item, piece.begin, piece.end, ownership.collector(piece)});
  return pieces;
}

PartOfRow::PartOfRow(const MicroBatch& row, dist::Group& group)
    : part_(sample_lengths(row), group),
      here_(row.part(part_)),
      pass_{.part = &part_, .mtp_embedding = {}, .head = {}, .mtp_head = {}} {}

void PartOfRow::collect(const model::Transformer& model,
                        const std::vector<at::Tensor>& parameters,
                        dist::Group& group,
                        std::span<const CollectedPiece> pieces) {
  const at::NoGradGuard no_grad;
  const auto grad = [](const at::Tensor& leaf) { return leaf.defined() ? leaf.grad() : leaf; };
  std::vector<PartNode> nodes;
  const auto add = [&](size_t parameter, at::Tensor gradient) {
    if (gradient.defined()) gradient = gradient.contiguous();
    HADAL_CHECK(!gradient.defined() || gradient.scalar_type() == at::kFloat,
                "part sums: a gradient is ", gradient.scalar_type(), ", expected FP32");
    nodes.push_back({parameter, std::move(gradient)});
  };
  // Each use of a value for itself.
  const size_t embedding = number_of(parameters, model.embedding_master()),
               head = number_of(parameters, model.head_master()), count = parameters.size();
  for (size_t i = 0; i < count; ++i) add(i, grad(parameters[i]));
  add(embedding, grad(pass_.mtp_embedding));
  add(head, grad(pass_.head.leaf));
  add(head, grad(pass_.mtp_head.leaf));
  collect_whole(group, pieces, nodes);
  for (size_t i = 0; i < count; ++i)
    if (parameters[i].defined()) parameters[i].mutable_grad() = nodes[i].gradient;
  const auto add_use = [&](size_t node, const at::Tensor& factor) {
    at::Tensor gradient = nodes[node].gradient;
    if (!gradient.defined()) return;
    if (factor.defined()) gradient.mul_(factor);
    add_in_place(parameters[nodes[node].parameter].mutable_grad(), std::move(gradient));
  };
  add_use(count, {});
  add_use(count + 1, pass_.head.factor);
  add_use(count + 2, pass_.mtp_head.factor);
  pass_ = {};
}

void accumulate_parts(const model::Transformer& model,
                      const MicroBatch& micro,
                      SharedRows& shared,
                      const StepCounts& counts,
                      const ObjectiveParams& params,
                      StepSums& sums) {
  if (shared.group.size() == 1) return accumulate(model, micro, counts, params, sums);
  if (!micro.each_row.empty()) {
    for (const MicroBatch& row : micro.each_row)
      accumulate_parts(model, row, shared, counts, params, sums);
    return;
  }
  HADAL_CHECK(sums.on_cpu(), "part sums: gradients are not on the CPU");
  PartOfRow part(micro, shared.group);
  StagePass pass = stage_forward(model, model::all_layers(model.config()), part.here(), counts,
                                 params, {}, {}, part.pass());
  stage_backward(pass);
  part.collect(model, sums.parameters(), shared.group, shared.pieces);
  sums.add(std::move(pass.measures));
}

}  // namespace hadal::train
