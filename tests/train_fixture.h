// Training runs as people start them: a tiny run, its processes, and what it leaves behind.
#pragma once

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <fcntl.h>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "cli_fixture.h"
#include "model/config.h"
#include "testing/tiny_tokenizer.h"

namespace hadal {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

/// The smallest model that the released formats take, with a window, a CSA and an HCA layer.
inline model::ModelConfig train_config() {
  model::ModelConfig config;
  config.vocab_size = testing::byte_tokenizer_size();
  config.dim = 128;
  config.n_layers = 3;
  config.n_hash_layers = 1;
  config.n_heads = 2;
  config.head_dim = 128;
  config.rope_head_dim = 64;
  config.q_lora_rank = 128;
  config.o_groups = 2;
  config.o_lora_rank = 64;
  config.window_size = 12;
  config.compress_ratios = {0, 4, 16, 0};
  config.compress_rope_theta = 160000.0;
  config.original_seq_len = 256;
  config.index_n_heads = 2;
  config.index_head_dim = 64;
  config.index_topk = 4;
  config.n_routed_experts = 4;
  config.n_activated_experts = 2;
  config.moe_inter_dim = 128;
  config.route_scale = 1.5;
  config.hc_mult = 2;
  config.max_position_embeddings = 4096;
  config.quantized = true;
  config.expert_dtype = model::ExpertDtype::kFp4;
  return config;
}

/// A process that can be waited for and killed.
class Child {
 public:
  Child(const std::vector<std::string>& arguments, const std::string& log) {
    pid_ = ::fork();
    if (pid_ != 0) return;
    const int out = ::open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    ::dup2(out, STDOUT_FILENO);
    ::dup2(out, STDERR_FILENO);
    std::vector<char*> argv;
    for (const std::string& argument : arguments)
      argv.push_back(const_cast<char*>(argument.data()));
    argv.push_back(nullptr);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  ~Child() {
    if (running()) kill(SIGKILL);
    wait();
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  bool running() {
    if (!done_ && ::waitpid(pid_, &status_, WNOHANG) == pid_) done_ = true;
    return !done_;
  }
  void kill(int signal) { ::kill(pid_, signal); }
  pid_t pid() const { return pid_; }
  /// The exit code, or -signal.
  int wait() {
    while (!done_ && ::waitpid(pid_, &status_, 0) < 0 && errno == EINTR) {
    }
    done_ = true;
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : -WTERMSIG(status_);
  }

 private:
  pid_t pid_ = -1;
  int status_ = 0;
  bool done_ = false;
};

class TrainCli : public CliFixture {
 protected:
  void SetUp() override {
    CliFixture::SetUp();
    write("config.json", model::to_config_json(train_config()));
    write("tokenizer.json", testing::byte_tokenizer_json());
    std::string documents;
    for (int i = 0; i < 24; ++i) {
      documents += R"({"text": ")";
      for (int word = 0; word < 5 + i; ++word) documents += concat("w", word * i % 17, ' ');
      documents += "\"}\n";
    }
    write("a.jsonl", documents);
    write("b.txt", std::string(300, 'x') + " and the rest");
  }

  Json run_json(const std::string& out) const {
    return Json::parse(R"({
      "model": "config.json", "tokenizer": "tokenizer.json", "out": ")" +
                       out + R"(", "device": "cpu", "seed": 3,
      "sources": [{"name": "a", "files": ["a.jsonl"]}, {"name": "b", "files": ["b.txt"]}],
      "stages": [
        {"name": "dense", "tokens": 250, "row_length": 32, "attention": "dense",
          "mix": {"a": 3, "b": 1}},
        {"name": "indexer", "tokens": 128, "row_length": 64, "attention": "indexer_warmup",
          "learning_rate": 0.003, "mix": {"a": 1}},
        {"name": "qat", "tokens": 256, "row_length": 64, "attention": "sparse",
          "numerics": "released", "mix": {"a": 1, "b": 1}}],
      "learning_rate": {"peak": 0.004, "warmup_tokens": 128, "decay_start_tokens": 256},
      "batch": [{"from_tokens": 0, "tokens": 64}], "micro_batch_tokens": 32,
      "validation": {"source": "b", "rows": 2, "row_length": 64, "every_tokens": 192},
      "checkpoint": {"every_steps": 1, "keep": 2}, "count_clamps_every_steps": 4})");
  }
  std::string write_run(const Json& json, const std::string& name) const {
    return write(name + ".json", json.dump(1));
  }
  std::string out(const std::string& name) const { return folder_ / name; }

  CliResult train(const std::string& config, const std::string& flags = "") const {
    return run("train " + config + " " + flags);
  }

  /// Names below a folder while another process changes it.
  static std::vector<std::string> names_below(const std::string& folder) {
    std::vector<std::string> names;
    std::error_code changed;
    fs::recursive_directory_iterator entry(folder, changed);
    for (; entry != fs::recursive_directory_iterator(); entry.increment(changed)) {
      names.push_back(entry->path().filename());
    }
    return names;
  }
  static int64_t newest_step(const std::string& out) {
    int64_t newest = -1;
    for (const std::string& name : names_below(out + "/checkpoints")) {
      if (name.rfind("step-", 0) == 0 && name.find(".tmp-") == std::string::npos)
        newest = std::max<int64_t>(newest, std::stoll(name.substr(5)));
    }
    return newest;
  }
  static bool has_temporary(const std::string& folder) {
    const auto names = names_below(folder);
    return std::any_of(names.begin(), names.end(), [](const std::string& name) {
      return name.find(".tmp-") != std::string::npos;
    });
  }

  /// All that a run leaves behind, times apart.
  static std::map<std::string, std::string> results(const std::string& out) {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::recursive_directory_iterator(out)) {
      const std::string name = fs::relative(entry.path(), out);
      if (!entry.is_regular_file() || name.find("tfevents") != std::string::npos) continue;
      files[name] = slurp(entry.path());
    }
    std::istringstream lines(files["metrics.jsonl"]);
    std::string kept;
    for (std::string line; std::getline(lines, line);) {
      Json json = Json::parse(line);
      json.erase("time");
      json.erase("tokens_per_second");
      kept += json.dump() + "\n";
    }
    files["metrics.jsonl"] = kept;
    return files;
  }
  static void expect_same_results(const std::string& a, const std::string& b) {
    const auto left = results(a), right = results(b);
    std::string names_left, names_right;
    for (const auto& [name, content] : left) names_left += name + "\n";
    for (const auto& [name, content] : right) names_right += name + "\n";
    EXPECT_EQ(names_left, names_right);
    EXPECT_EQ(left.at("metrics.jsonl"), right.at("metrics.jsonl"));
    for (const auto& [name, content] : left) {
      EXPECT_TRUE(!right.contains(name) || content == right.at(name)) << name << " differs";
    }
  }
  /// One line of metrics for every step, in order.
  static void expect_every_step_once(const std::string& out, int64_t steps) {
    std::istringstream lines(slurp(out + "/metrics.jsonl"));
    int64_t expected = 1;
    for (std::string line; std::getline(lines, line);) {
      const Json json = Json::parse(line);
      if (!json.contains("loss/main")) continue;  // a validation
      EXPECT_EQ(json["step"].get<int64_t>(), expected++);
    }
    EXPECT_EQ(expected, steps + 1);
  }
};

/// Runs that several ranks share; all checkpoints are kept.
class TrainSharedCli : public TrainCli {
 protected:
  /// Three stages of a few steps each, five rows a step in the first and two in the others.
  virtual Json shared_run(const std::string& name) const {
    Json run = run_json(name);
    run["batch"][0]["tokens"] = 160;
    run["stages"][0]["tokens"] = 480;
    run["stages"][2]["tokens"] = 320;
    run["checkpoint"]["keep"] = 100;
    return run;
  }
  /// The run's file; `mesh` null: without one.
  std::string config_of(const std::string& name, const Json& mesh = {}) const {
    Json run = shared_run(name);
    if (!mesh.is_null()) run["mesh"] = mesh;
    return write_run(run, name);
  }
  /// The run on one rank, as `whole`, of at least so many steps.
  void train_whole(int64_t steps = 6) {
    const CliResult whole = train(config_of("whole"), "--threads 2");
    ASSERT_EQ(whole.code, 0) << whole.error;
    ASSERT_GE(newest_step(out("whole")), steps);
  }
};

}  // namespace hadal
