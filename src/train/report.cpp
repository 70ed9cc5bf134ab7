#include "train/report.h"

#include <algorithm>
#include <string>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/log.h"

namespace hadal::train {

void report_step(MetricsWriter& metrics,
                 const RunProgress& progress,
                 const StepOutcome& outcome,
                 double learning_rate,
                 int64_t step_tokens,
                 double seconds) {
  const StepMeasures& measures = outcome.measures;
  metrics.add(progress.step, "loss/main", outcome.loss());
  const auto add = [&](const char* name, const at::Tensor& value) {
    if (value.defined()) metrics.add(progress.step, name, value.item<double>());
  };
  add("loss/mtp", measures.mtp_loss);
  add("loss/balance", measures.balance_loss);
  add("loss/index", measures.index_loss);
  metrics.add(progress.step, "grad_norm", outcome.norm);
  metrics.add(progress.step, "learning_rate", learning_rate);
  metrics.add(progress.step, "batch_tokens", static_cast<double>(step_tokens));
  metrics.add(progress.step, "tokens_per_second", static_cast<double>(step_tokens) / seconds);
  metrics.add(progress.step, "stage", static_cast<double>(progress.stage));
  if (!outcome.moved) metrics.add(progress.step, "skipped", 1.0);
  if (measures.clamped.defined()) {
    const at::Tensor share = measures.clamped.to(at::kDouble).cpu();
    const double values = share[3].item<double>();
    metrics.add(progress.step, "clamped/gate_high", share[0].item<double>() / values);
    metrics.add(progress.step, "clamped/up_high", share[1].item<double>() / values);
    metrics.add(progress.step, "clamped/up_low", share[2].item<double>() / values);
  }
  double worst = 0.0;
  for (const at::Tensor& load : measures.expert_load) {
    if (!load.defined()) continue;
    const at::Tensor counts = load.to(at::kDouble);
    worst = std::max(worst, (counts.max() / counts.mean()).item<double>());
  }
  if (worst > 0.0) metrics.add(progress.step, "expert_load_max_over_mean", worst);
  metrics.flush(progress.step, progress.tokens);
}

void report_validation(MetricsWriter& metrics,
                       const RunProgress& progress,
                       const char* name,
                       const Stage& rules,
                       const Evaluation& result) {
  metrics.add(progress.step, concat(name, "/loss"), result.loss());
  std::string mass;
  if (result.mass_queries > 0) {
    metrics.add(progress.step, concat(name, "/selected_mass"), result.selected_mass());
    metrics.add(progress.step, concat(name, "/best_mass"), result.best_mass());
    mass = concat(", selected mass ", result.selected_mass(), " of at best ", result.best_mass());
  }
  metrics.flush(progress.step, progress.tokens);
  log::info("train", name, " after ", progress.tokens, " tokens (attention ",
            attention_mode_name(rules.mode), ", ", ops::numerics_name(rules.numerics), "): loss ",
            result.loss(), mass);
}

}  // namespace hadal::train
