// `hadal train` with tensors computed again: the same files, a log that tells what a step holds,
// and budgets that nothing fits.
#include <string>

#include <gtest/gtest.h>

#include "base/check.h"
#include "train_fixture.h"

namespace hadal {
namespace {

class TrainMemory : public TrainCli {
 protected:
  /// A run in which activations are most of what a step holds.
  Json long_rows(const std::string& name, const Json& recompute) const {
    Json json = run_json(out(name));
    json["stages"] = Json::parse(R"([
      {"name": "dense", "tokens": 1600, "row_length": 800, "attention": "dense", "mix": {"a": 1}},
      {"name": "qat", "tokens": 800, "row_length": 800, "attention": "sparse",
        "numerics": "released", "mix": {"a": 1, "b": 1}}])");
    json["batch"] = Json::parse(R"([{"tokens": 800}])");
    json.erase("validation");
    json["recompute"] = recompute;
    if (recompute.is_null()) json.erase("recompute");
    return json;
  }
  /// The number behind `text`.
  static int64_t number_after(const std::string& log, const std::string& text) {
    const size_t at = log.find(text);
    EXPECT_NE(at, std::string::npos) << log;
    return at == std::string::npos ? 0 : std::stoll(log.substr(at + text.size()));
  }
};

TEST_F(TrainMemory, EveryPolicyEndsWithTheFilesOfNone) {
  ASSERT_EQ(train(write_run(long_rows("plain", nullptr), "plain")).code, 0);
  // What fits nothing says what fits, and leaves no step behind.
  const CliResult refused =
      train(write_run(long_rows("least", {{"policy", "auto"}, {"budget_bytes", 1000}}), "least"));
  EXPECT_EQ(refused.code, 2);
  EXPECT_NE(refused.error.find("least.json: recompute.budget_bytes: 1 MiB do not hold a step"),
            std::string::npos)
      << refused.error;
  const int64_t least = number_after(refused.error, "MiB (");
  const int64_t budget = least + (least >> 4);
  EXPECT_LT(budget >> 20, number_after(refused.error, "nothing recomputed takes "));

  const Json policies[] = {
      {{"policy", "norms"}}, {{"policy", "block"}}, {{"policy", "auto"}, {"budget_bytes", budget}}};
  for (const Json& recompute : policies) {
    const std::string name = recompute["policy"];
    const CliResult result = train(write_run(long_rows(name, recompute), name));
    ASSERT_EQ(result.code, 0) << result.error;
    EXPECT_NE(result.error.find("recompute " + name), std::string::npos) << result.error;
    const auto held = static_cast<double>(number_after(result.error, "first step held "));
    const auto predicted = static_cast<double>(number_after(result.error, "predicted "));
    // Told in whole MiB here; closer in recompute_plan_test.cpp.
    EXPECT_NEAR(held, predicted, 1.0 + 0.05 * held) << result.error;
    expect_same_results(out("plain"), out(name));
  }
}

TEST_F(TrainMemory, UnknownPoliciesAreRefused) {
  const CliResult result = train(write_run(long_rows("all", {{"policy", "all"}}), "all"));
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(
      result.error.find("recompute.policy: expected none, norms, block or auto, found \"all\""),
      std::string::npos)
      << result.error;
}

}  // namespace
}  // namespace hadal
