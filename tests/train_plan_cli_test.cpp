// hadal train RUN --plan: what it says of released models and of a run, fast, and with nothing
// allocated or written.
#include <chrono>
#include <string>

#include "base/check.h"
#include "train_fixture.h"

namespace hadal {
namespace {

class TrainPlanCli : public TrainCli {};

TEST_F(TrainPlanCli, PlansV4ProOn512RanksBelowTwoSeconds) {
  const auto start = std::chrono::steady_clock::now();
  const CliResult result = run("train v4-pro --plan --ranks 512 --json");
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  ASSERT_EQ(result.code, 0) << result.error;
  EXPECT_LT(took.count(), 2.0);
  const Json plan = Json::parse(result.out);
  EXPECT_EQ(plan["ranks"], 512);
  EXPECT_EQ(plan["dense_groups"], 3);
  EXPECT_LT(plan["padding_dense"].get<double>(), 0.1);
  EXPECT_LT(plan["padding_experts"].get<double>(), 0.01);
  // 1.6 T parameters: two bytes of each on every rank, four and four of a 512th.
  EXPECT_NEAR(plan["memory_bytes"]["weights"].get<double>(), 3.2e12, 0.2e12);
  EXPECT_NEAR(plan["memory_bytes"]["masters"].get<double>(), 1.25e10, 0.1e10);
  // A checkpoint's copy: eight bytes of a 512th, twelve of what AdamW moves, and the hash tables.
  EXPECT_NEAR(plan["memory_bytes"]["checkpoint"].get<double>(), 2.5e10, 0.2e10);
  bool experts = false;
  for (const Json& parameter : plan["parameters"]) {
    const bool moved = parameter["rule"] != "none";
    EXPECT_EQ(parameter["pieces"].get<int64_t>() > 0, moved) << parameter;
    if (parameter["name"] != "layers.30.ffn.experts.*.w2.weight") continue;
    experts = true;
    EXPECT_EQ(parameter["rule"], "Muon");
    EXPECT_EQ(parameter["units"], 384);
    EXPECT_EQ(parameter["unit_shape"], (Json{7168, 3072}));
    EXPECT_GT(parameter["last_owner"].get<int64_t>(), parameter["first_owner"].get<int64_t>());
  }
  EXPECT_TRUE(experts);
}

TEST_F(TrainPlanCli, PlansARunAndTrainsNothing) {
  const std::string config = write_run(run_json("planned"), "planned");
  const CliResult result = train(config, "--plan --ranks 4");
  ASSERT_EQ(result.code, 0) << result.error;
  for (const char* said : {"parameter", "embed.weight", "AdamW, decay", "Muon", "dense matrices",
                           "memory of the fullest rank", "values received", "a step, one after"})
    EXPECT_NE(result.out.find(said), std::string::npos) << said << "\n" << result.out;
  EXPECT_FALSE(fs::exists(out("planned")));
}

TEST_F(TrainPlanCli, RefusesWhatIsNoRunAndFlagsWithoutPlan) {
  expect_refused(run("train v5 --plan"),
                 "v5: expected a run's file, a config.json, v4-flash or v4-pro");
  expect_refused(run("train v4-flash --plan --step-tokens 100"),
                 "plan: a step of 100 tokens has no row of 4096");
  const std::string config = write_run(run_json("planned"), "planned");
  EXPECT_EQ(train(config, "--dense-ranks 3").code, 2);
}

}  // namespace
}  // namespace hadal
