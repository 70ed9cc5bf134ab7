#include "train/pipeline.h"

#include <deque>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include <ATen/ATen.h>

#include "base/check.h"
#include "train/pipeline_schedule.h"

namespace hadal::train {
namespace {

using Kind = PipelineAction::Kind;

/// Scalars as one message: of each whether it is there, in which type, and its value, which FP64
/// holds exactly.
at::Tensor packed(std::initializer_list<at::Tensor> scalars) {
  std::vector<double> words;
  for (const at::Tensor& scalar : scalars) {
    words.push_back(!scalar.defined() ? 0.0 : scalar.scalar_type() == at::kDouble ? 2.0 : 1.0);
    words.push_back(scalar.defined() ? scalar.item<double>() : 0.0);
  }
  return at::tensor(words, at::kDouble);
}

at::Tensor scalar_of(const at::Tensor& message, int64_t index) {
  const double* words = message.const_data_ptr<double>() + 2 * index;
  if (words[0] == 0.0) return {};
  return at::full({}, words[1], words[0] == 2.0 ? at::kDouble : at::kFloat);
}

/// The type of the streams: that of the model in `ideal`, else BF16.
at::ScalarType stream_type(const model::Transformer& model, ops::Numerics numerics) {
  if (numerics != ops::Numerics::kIdeal) return at::kBFloat16;
  at::ScalarType type = at::kFloat;
  model.visit([&](const model::Parameter& parameter) {
    if (parameter.kind == model::ParamKind::kNorm && parameter.value.defined())
      type = parameter.value.scalar_type();
  });
  return type;
}

/// What is to arrive for one action.
struct Arrival {
  at::Tensor streams, scalars, mtp_rows;
  std::vector<dist::Transfer> transfers;

  void wait() {
    for (dist::Transfer& transfer : transfers) transfer.wait();
    transfers.clear();
  }
};

/// Messages to and from the neighbours, and of the embedding's rows from the first stage to the
/// last. Both ends of a pair make their calls in the order of the rows, streams first.
class Border {
 public:
  Border(dist::Group& group,
         const model::LayerRun& layers,
         const model::Transformer& model,
         ops::Numerics numerics,
         int64_t num_scalars)
      : group_(group),
        layers_(layers),
        config_(model.config()),
        options_(at::TensorOptions(stream_type(model, numerics))),
        num_scalars_(num_scalars) {}

  void expect_forward(const MicroBatch& row, bool mtp_rows, Arrival& arrival) {
    if (layers_.first) return;
    receive(arrival, arrival.streams, streams_like(row), group_.index() - 1);
    receive(arrival, arrival.scalars, at::empty({2 * num_scalars_}, at::kDouble),
            group_.index() - 1);
    if (layers_.last && mtp_rows) receive(arrival, arrival.mtp_rows, rows_like(row), 0);
  }
  void expect_backward(const MicroBatch& row, bool mtp_rows, Arrival& arrival) {
    if (layers_.last) return;
    receive(arrival, arrival.streams, streams_like(row), group_.index() + 1);
    if (layers_.first && mtp_rows) receive(arrival, arrival.mtp_rows, rows_like(row), last());
  }
  std::vector<dist::Transfer> send_forward(const at::Tensor& streams,
                                           const at::Tensor& scalars,
                                           const at::Tensor& mtp_rows) {
    std::vector<dist::Transfer> sent;
    if (layers_.last) return sent;
    send(sent, streams, group_.index() + 1);
    sent.push_back(group_.send(scalars, group_.index() + 1));
    if (layers_.first && mtp_rows.defined()) send(sent, mtp_rows, last());
    return sent;
  }
  std::vector<dist::Transfer> send_backward(const at::Tensor& streams,
                                            const at::Tensor& mtp_rows,
                                            bool with_mtp_rows) {
    std::vector<dist::Transfer> sent;
    if (layers_.first) return sent;
    send(sent, streams, group_.index() - 1);
    if (layers_.last && with_mtp_rows) send(sent, mtp_rows, 0);
    return sent;
  }

 private:
  int64_t last() const { return group_.size() - 1; }
  at::Tensor streams_like(const MicroBatch& row) const {
    return at::empty({row.ids.size(0), config_.hc_mult, config_.dim}, options_);
  }
  at::Tensor rows_like(const MicroBatch& row) const {
    return at::empty({row.ids.size(0), config_.dim}, options_);
  }
  void receive(Arrival& arrival, at::Tensor& into, at::Tensor room, int64_t from) {
    into = std::move(room);
    arrival.transfers.push_back(group_.receive(into, from));
  }
  void send(std::vector<dist::Transfer>& sent, const at::Tensor& tensor, int64_t to) {
    HADAL_CHECK(tensor.defined() && tensor.scalar_type() == options_.dtype().toScalarType(),
                "pipeline: stage ", group_.index(), " has ",
                tensor.defined() ? c10::toString(tensor.scalar_type()) : "nothing", " for stage ",
                to, ", expected ", options_.dtype());
    sent.push_back(group_.send(tensor.detach().contiguous(), to));
  }

  dist::Group& group_;
  const model::LayerRun& layers_;
  const model::ModelConfig& config_;
  at::TensorOptions options_;
  int64_t num_scalars_;
};

void wait_for(std::vector<dist::Transfer>& transfers) {
  for (dist::Transfer& transfer : transfers) transfer.wait();
  transfers.clear();
}

/// A step's passes on this stage.
class StageStep {
 public:
  StageStep(Border border,
            const model::LayerRun& layers,
            const model::Transformer& model,
            const std::vector<const MicroBatch*>& rows,
            const StepCounts& counts,
            const ObjectiveParams& params,
            StepSums& sums,
            SharedRows* shared)
      : border_(border),
        layers_(layers),
        model_(model),
        rows_(rows),
        counts_(counts),
        params_(params),
        sums_(sums),
        shared_(shared),
        with_mtp_rows_(sends_mtp_rows(model.config(), params)) {
    if (shared == nullptr) return;
    for (const MicroBatch*& row : rows_) {
      parts_.push_back(std::make_unique<PartOfRow>(*row, shared->group));
      row = &parts_.back()->here();
    }
  }

  void run(const std::vector<PipelineAction>& actions) {
    size_t expected = 0;
    for (size_t i = 0; i < actions.size(); ++i) {
      // The next message travels while this pass runs.
      for (; expected < std::min(i + 2, actions.size()); ++expected)
        expect(actions[expected], arrivals_[expected]);
      Arrival arrival = std::move(arrivals_.at(i));
      arrivals_.erase(i);
      arrival.wait();
      const auto row = static_cast<size_t>(actions[i].row);
      actions[i].kind == Kind::kForward ? forward(row, arrival) : backward(row, arrival);
    }
    for (std::vector<dist::Transfer>& sent : gradients_sent_) wait_for(sent);
  }

 private:
  struct Row {
    StagePass pass;
    std::vector<dist::Transfer> sent;
  };
  /// Messages of gradients that are under way while a next row's are made.
  static constexpr size_t kGradientsUnderWay = 2;

  void expect(const PipelineAction& action, Arrival& arrival) {
    const MicroBatch& row = *rows_[static_cast<size_t>(action.row)];
    if (action.kind == Kind::kForward) {
      border_.expect_forward(row, with_mtp_rows_, arrival);
    } else if (params_.language_loss()) {
      border_.expect_backward(row, with_mtp_rows_, arrival);
    }
  }

  void forward(size_t row, const Arrival& arrival) {
    StageBorder in{.streams = arrival.streams, .balance = {}, .index = {}};
    if (arrival.scalars.defined()) {
      in.balance = scalar_of(arrival.scalars, 0);
      in.index = scalar_of(arrival.scalars, 1);
    }
    Row under_way{
        .pass = stage_forward(model_, layers_, *rows_[row], counts_, params_, std::move(in),
                              arrival.mtp_rows, shared_ != nullptr ? parts_[row]->pass() : nullptr),
        .sent = {}};
    const StagePass& pass = under_way.pass;
    under_way.sent = border_.send_forward(
        pass.out.streams, packed({pass.out.balance, pass.out.index}), pass.mtp_rows);
    under_way_.emplace(row, std::move(under_way));
  }

  void backward(size_t row, const Arrival& arrival) {
    Row done = std::move(under_way_.at(row));
    under_way_.erase(row);
    stage_backward(done.pass, arrival.streams, arrival.mtp_rows);
    if (shared_ != nullptr)
      parts_[row]->collect(model_, sums_.parameters(), shared_->group, shared_->pieces);
    if (!layers_.first && params_.language_loss()) {
      const at::Tensor& rows = done.pass.mtp_rows;
      gradients_sent_.push_back(border_.send_backward(
          done.pass.in.streams.grad(), rows.defined() ? rows.grad() : rows, with_mtp_rows_));
    }
    sums_.add(std::move(done.pass.measures));
    // Whoever sent its gradient has received the row; without gradients it needs nothing of ours
    // to get there.
    wait_for(done.sent);
    for (; gradients_sent_.size() > kGradientsUnderWay; gradients_sent_.pop_front())
      wait_for(gradients_sent_.front());
  }

  Border border_;
  const model::LayerRun& layers_;
  const model::Transformer& model_;
  std::vector<const MicroBatch*> rows_;  ///< or this rank's parts of them
  const StepCounts& counts_;
  const ObjectiveParams& params_;
  StepSums& sums_;
  SharedRows* shared_;
  std::vector<std::unique_ptr<PartOfRow>> parts_;  ///< of the rows, where they are shared
  bool with_mtp_rows_;
  std::map<size_t, Arrival> arrivals_;  ///< by action
  std::map<size_t, Row> under_way_;     ///< between their passes
  std::deque<std::vector<dist::Transfer>> gradients_sent_;
};

}  // namespace

Pipeline::Pipeline(dist::Group group, model::StageSplit split)
    : group_(std::move(group)), split_(std::move(split)), layers_(split_.run(group_.index())) {
  HADAL_CHECK(group_.size() == split_.size(), "pipeline: ", group_.size(), " ranks for ",
              split_.size(), " stages");
}

void Pipeline::accumulate(const model::Transformer& model,
                          const std::vector<const MicroBatch*>& rows,
                          const StepCounts& counts,
                          const ObjectiveParams& params,
                          StepSums& sums,
                          SharedRows* shared) {
  Border border(group_, layers_, model, params.numerics, 2);
  StageStep(border, layers_, model, rows, counts, params, sums, shared)
      .run(one_forward_one_backward(stages(), stage(), std::ssize(rows)));
}

std::vector<Evaluation> Pipeline::evaluate(const model::Transformer& model,
                                           const std::vector<const MicroBatch*>& rows,
                                           model::AttentionMode mode,
                                           ops::Numerics numerics) {
  const at::NoGradGuard no_grad;
  Border border(group_, layers_, model, numerics, 3);
  std::vector<Evaluation> results;
  std::deque<std::vector<dist::Transfer>> sent;
  Arrival next;
  if (!rows.empty()) border.expect_forward(*rows[0], false, next);
  for (size_t i = 0; i < rows.size(); ++i) {
    Arrival arrival = std::exchange(next, {});
    if (i + 1 < rows.size()) border.expect_forward(*rows[i + 1], false, next);
    arrival.wait();
    EvaluationBorder handed{.streams = arrival.streams, .mass = {}, .best = {}};
    if (arrival.scalars.defined()) {
      handed.mass = scalar_of(arrival.scalars, 0);
      handed.best = scalar_of(arrival.scalars, 1);
      handed.mass_queries = scalar_of(arrival.scalars, 2).item<int64_t>();
    }
    Evaluation result;
    evaluate_stage(model, layers_, *rows[i], mode, numerics, handed, result);
    if (layers_.last) results.push_back(result);
    const at::Tensor queries = at::full({}, static_cast<double>(handed.mass_queries), at::kDouble);
    sent.push_back(
        border.send_forward(handed.streams, packed({handed.mass, handed.best, queries}), {}));
    for (; std::ssize(sent) > stages(); sent.pop_front()) wait_for(sent.front());
  }
  for (std::vector<dist::Transfer>& each : sent) wait_for(each);
  return results;
}

std::vector<const MicroBatch*> passes_of(std::span<const MicroBatch> batches) {
  std::vector<const MicroBatch*> passes;
  for (const MicroBatch& batch : batches) {
    if (batch.each_row.empty()) passes.push_back(&batch);
    for (const MicroBatch& row : batch.each_row) passes.push_back(&row);
  }
  return passes;
}

}  // namespace hadal::train
