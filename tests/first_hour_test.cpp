// The program as somebody meets it who has just built it: what flags take, what is said where input
// or output is wrong, help, the shipped model's own settings, and the terminal.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <poll.h>
#include <pty.h>
#include <sstream>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli_fixture.h"

namespace hadal {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

const std::string kNano = std::string(HADAL_SOURCE_DIR) + "/models/hadal-nano";

std::vector<Json> lines_of(const std::string& text) {
  std::vector<Json> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
  return lines;
}

class FirstHour : public CliFixture {
 protected:
  /// The shipped model with other settings.
  std::string nano_with(const std::string& settings) const {
    const fs::path folder = folder_ / "nano";
    fs::create_directories(folder);
    for (const fs::directory_entry& entry : fs::directory_iterator(kNano)) {
      const fs::path link = folder / entry.path().filename();
      if (entry.path().filename() != "generation_config.json" && !fs::exists(link))
        fs::create_symlink(entry.path(), link);
    }
    if (settings.empty()) {
      fs::remove(folder / "generation_config.json");
    } else {
      write("nano/generation_config.json", settings);
    }
    return folder;
  }
};

TEST_F(FirstHour, WhatCouldNotBeWrittenIsNoSuccess) {
  const std::string tokenizer = kNano + "/tokenizer.json";
  const std::string messages = write("m.json", R"([{"role":"user","content":"x"}])");
  for (const std::string& command : std::vector<std::string>{
           "--help", "--version", "help chat", "generate --help", "man", "completion bash",
           "plan --config " + kNano + "/config.json",
           "plan --json --config " + kNano + "/config.json", "inspect " + kNano,
           "inspect --json " + kNano, "doctor", "doctor --json",
           "tokenize --tokenizer " + tokenizer, "detokenize --tokenizer " + tokenizer,
           "chat-encode --thinking-mode chat " + messages, "generate --prompt a --max-tokens 1",
           "generate --prompt a --max-tokens 1 --json", "bench read --gib 0.001 --seconds 0"}) {
    const CliResult full = run(command + " > /dev/full", "1 2");
    expect_refused(full, "standard output: cannot be written");
    expect_refused(run(command + " >&-", "1 2"), "standard output: cannot be written");
    EXPECT_EQ(run(command, "1 2").code, 0) << command;
  }
}

TEST_F(FirstHour, NumbersAreNumbersWithinReadableRanges) {
  const std::pair<std::string, std::string> cases[] = {
      {"serve --cache-gib nan", "--cache-gib: expected a number from 1e-06 to 1e+06, found nan"},
      {"serve --cache-gib 1e30", "found 1e30"},
      {"serve --cache-gib 0", "found 0"},
      {"serve --disk-gib inf", "--disk-gib"},
      {"serve --ping-seconds -1", "--ping-seconds: expected a number from 0 to"},
      {"serve --max-running 0", "--max-running: expected a number from 1 to 65536, found 0"},
      {"serve --max-context 1.5", "--max-context"},
      {"generate --prompt a --temperature nan", "expected a number from 0 to 100, found nan"},
      {"generate --prompt a --temperature -1", "--temperature"},
      {"generate --prompt a --top-p 2", "expected a number from 0 to 1, found 2"},
      {"generate --prompt a --max-tokens 0", "--max-tokens: expected a number above 0, found 0"},
      {"generate --prompt a --max-tokens ten", "found ten"},
      {"generate --prompt a --seed -1", "expected a whole number from 0 to 18446744073709551615"},
      {"chat --seed 18446744073709551616", "found 18446744073709551616"},
      {"chat --seed 1.5", "found 1.5"},
      {"bench gemm --seconds nan", "--seconds: expected a number from 0 to 86400, found nan"},
      {"bench gemm --seconds inf", "found inf"},
      {"bench read --gib nan", "--gib: expected a number from 0.001 to 1024, found nan"},
      {"bench gemm --in 33", "multiple of 32"},
      {"bench serve --url http://127.0.0.1:1 --rate nan", "--rate: expected a finite number"},
      {"train x.json --max-seconds nan", "--max-seconds"},
      {"plan --config x --context -5", "--context: expected a number from 1 to"},
      {"logits --chunk 0", "--chunk: expected a number above 0, found 0"},
      {"verify x --max-abs nan", "--max-abs: expected a finite number, found nan"},
      {"eval perplexity x --context 0", "--context: expected a number above 0, found 0"},
  };
  for (const auto& [arguments, why] : cases) {
    const CliResult result = run(arguments);
    expect_refused(result, why);
    EXPECT_LT(result.error.size(), 200u) << "a number nobody can read: " << result.error;
  }
}

TEST_F(FirstHour, FoldersLoopsAndPlacesThatTakeNothingAreNamed) {
  const std::string folder = folder_ / "folder", loop = folder_ / "loop";
  fs::create_directory(folder);
  fs::create_symlink("loop", loop);
  const std::string tokenizer = kNano + "/tokenizer.json";
  for (const std::string& bad :
       std::vector<std::string>{folder, loop, folder_.string() + "/none"}) {
    for (const std::string& command : std::vector<std::string>{
             "tokenize --tokenizer " + bad, "tokenize --tokenizer " + tokenizer + " " + bad,
             "detokenize --tokenizer " + tokenizer + " --jsonl " + bad, "chat --tools " + bad,
             "chat-encode --thinking-mode chat " + bad, "generate --prompt-file " + bad,
             "generate --prompt a --model " + bad, "inspect " + bad, "inspect --config " + bad,
             "plan --config " + bad, "eval perplexity " + bad, "plot x --out y " + bad,
             "plot " + bad + " --out " + folder_.string() + "/p.svg", "train " + bad,
             "logits --ids " + bad + " --out " + folder_.string() + "/o",
             "serve --port 0 --api-keys " + bad,
             "tokenizer-cut --tokenizer " + bad + " --out x y"}) {
      const CliResult result = run(command);
      EXPECT_EQ(result.code, 2) << command << ": " << result.error;
      EXPECT_EQ(std::count(result.error.begin(), result.error.end(), '\n'), 1)
          << command << ": " << result.error;
      EXPECT_EQ(result.error.find("internal"), std::string::npos) << command << result.error;
    }
  }
  const std::string metrics = write("m.jsonl", "{\"tokens\": 1, \"loss/main\": 2}\n");
  for (const std::string& out : std::vector<std::string>{"/proc/hadal/x", "/dev/null/x"}) {
    for (const std::string& command :
         std::vector<std::string>{"plot " + metrics + " --out " + out,
                                  "plan --config " + kNano + "/config.json --svg " + out,
                                  "tokenizer-cut --min-count 0 --tokenizer " + tokenizer +
                                      " --out " + out + " " + metrics}) {
      expect_refused(run(command), out.substr(0, 9));
    }
  }
}

TEST_F(FirstHour, WordsThatAreNearlyRightAreAnswered) {
  expect_refused(run("genrate"), "no subcommand 'genrate'; did you mean generate?");
  expect_refused(run("generate --promt x"), "no flag --promt; did you mean --prompt?");
  expect_refused(run("eval perplexty x"), "did you mean perplexity?");
  expect_refused(run("help evaluate"), "no subcommand 'evaluate'");
  expect_refused(run("qqqq"), "no subcommand 'qqqq'; see hadal --help");
  EXPECT_EQ(run("--version").out.substr(0, 6), "hadal ");
}

TEST_F(FirstHour, HelpShowsDefaultsAndChoices) {
  const std::string serve = run("help serve").out;
  EXPECT_EQ(serve, run("serve --help").out);
  for (const char* part :
       {"address to listen on [127.0.0.1]", "[8000]", "cpu|cuda", "--cache-gib NUMBER"})
    EXPECT_NE(serve.find(part), std::string::npos) << part << "\n" << serve;
  EXPECT_NE(run("help generate").out.find("tokens to generate at most [128]"), std::string::npos);
  EXPECT_NE(run("help eval perplexity").out.find("Usage: hadal eval perplexity [OPTIONS] FILE"),
            std::string::npos);
}

TEST_F(FirstHour, ShellsCompleteAndTheManualIsThere) {
  const std::string script = write("completion", run("completion bash").out);
  const auto complete = [&](const std::string& words, int at) {
    const std::string file = write("ask", "source " + script + "\nCOMP_WORDS=(" + words +
                                              ")\nCOMP_CWORD=" + std::to_string(at) +
                                              "\n_hadal\necho \"${COMPREPLY[@]}\"\n");
    return run(file, "", "", "bash").out;
  };
  EXPECT_EQ(complete("hadal gen", 1), "generate\n");
  EXPECT_EQ(complete("hadal eval per", 2), "perplexity\n");
  EXPECT_EQ(complete("hadal generate --prompt-", 2), "--prompt-file\n");
  EXPECT_EQ(complete("hadal chat --thinking-mode ''", 3), "chat thinking\n");
  EXPECT_EQ(complete("hadal completion f", 2), "fish\n");
  EXPECT_NE(run("completion fish").out.find("-a 'chat thinking'"), std::string::npos);
  EXPECT_NE(run("completion zsh").out.find("#compdef hadal"), std::string::npos);
  const std::string man = run("man").out;
  EXPECT_EQ(man.find(".TH HADAL 1"), 0u);
  EXPECT_NE(man.find(".SS hadal eval perplexity"), std::string::npos);
}

TEST_F(FirstHour, PromptsComeFromFlagsFilesAndStandardInput) {
  const std::string flags = "generate --max-tokens 3 --temperature 0 --json ";
  const Json flag = Json::parse(run(flags + "--prompt 'It was a'").out);
  EXPECT_EQ(Json::parse(run(flags, "It was a\n").out)["tokens"], flag["tokens"]);
  EXPECT_EQ(Json::parse(run(flags + "--prompt-file -", "It was a").out)["text"], flag["text"]);
  EXPECT_EQ(Json::parse(run(flags + "--prompt-file " + write("p.txt", "It was a\n")).out)["text"],
            flag["text"]);
  expect_refused(run(flags + "--prompt a --prompt-file b"), "both given");
  expect_refused(run(flags, ""), "holds no text");
  expect_refused(run(flags, "\xff\xfe\x01"), "no UTF-8 at byte 0");
  // More than an argument of the command line may hold; a model with few positions says that it got
  // all of it.
  const std::string model = nano_with("");
  std::string config = slurp(kNano + "/config.json");
  const std::string positions = "\"max_position_embeddings\": 1048576";
  config.replace(config.find(positions), positions.size(), "\"max_position_embeddings\": 8192");
  fs::remove(model + "/config.json");
  write("nano/config.json", config);
  expect_refused(
      run(flags + "--model " + model, std::string(70000, 'a') + std::string(70000, '\n')),
      "the model's last position is 8192");
}

TEST_F(FirstHour, TheShippedModelBringsItsOwnSettings) {
  const Json own = Json::parse(slurp(kNano + "/generation_config.json"));
  EXPECT_EQ(own["thinking"], false) << "it was not taught to think";
  // Nothing said, and the model's settings said.
  const std::string chat = "chat --json --max-tokens 8 ";
  const auto silent = lines_of(run(chat, "Hello!\n").out);
  const std::string said = " --thinking-mode chat --temperature " + own["temperature"].dump() +
                           " --top-p " + own["top_p"].dump();
  ASSERT_EQ(silent.size(), 1u);
  EXPECT_EQ(silent, lines_of(run(chat + said, "Hello!\n").out));
  EXPECT_NE(silent, lines_of(run(chat + "--temperature 0", "Hello!\n").out));
  const std::string generate = "generate --prompt 'It was a' --max-tokens 12 --seed 5 --json";
  EXPECT_EQ(Json::parse(run(generate).out)["text"],
            Json::parse(run(generate + " --temperature " + own["temperature"].dump() + " --top-p " +
                            own["top_p"].dump())
                            .out)["text"]);
  // Another model's settings, and none.
  const std::string greedy = nano_with(R"({"do_sample": false, "thinking": true})");
  EXPECT_EQ(lines_of(run(chat + "--model " + greedy, "Hello!\n").out),
            lines_of(run(chat + "--thinking-mode thinking --temperature 0", "Hello!\n").out));
  EXPECT_EQ(
      lines_of(run(chat + "--model " + nano_with(""), "Hello!\n").out),
      lines_of(run(chat + "--thinking-mode thinking --temperature 1 --top-p 1", "Hello!\n").out));
  expect_refused(run(chat + "--model " + nano_with(R"({"top_p": 7})"), "x\n"),
                 "generation_config.json: top_p: expected a number from 1e-09 to 1, found 7");
}

TEST_F(FirstHour, ChatObeysItsCommands) {
  const std::string saved = folder_ / "saved.json";
  const CliResult result = run(
      "chat --json --max-tokens 6",
      "/set\n/set temperature 0\n/set thinking on\n/set thinking off\n/set sed 3\n/set top_p nan\n"
      "/system Be brief.\nHello there!\n/regenerate\n/save " +
          saved +
          "\n/resat\n/save /proc/none/x\n"
          "/load " +
          write("bad.json", "{}") + "\n/etc/passwd is a file\n/reset\n/regenerate\n");
  EXPECT_EQ(result.code, 0) << result.error;
  for (const char* note :
       {"[temperature 0.7]", "[temperature is 0]", "[thinking is on]", "[thinking is off]",
        "[/set: no setting sed; did you mean seed?]", "[/set top_p: expected", "found nan]",
        "[the system message is changed]", "[3 messages are in", "did you mean /reset?",
        "/proc/none", "expected a list of messages, found", "there is nothing to answer yet"})
    EXPECT_NE(result.error.find(note), std::string::npos) << note << "\n" << result.error;
  const auto answers = lines_of(result.out);
  ASSERT_EQ(answers.size(), 3u) << "one, another, and that to what only looks like a command";
  const Json conversation = Json::parse(slurp(saved));
  ASSERT_EQ(conversation.size(), 3u);
  EXPECT_EQ(conversation[0]["content"], "Be brief.");
  EXPECT_EQ(conversation[1]["content"], "Hello there!");
  EXPECT_EQ(conversation[2]["content"], answers[1]["content"]);
  // Going on from the file is going on.
  const std::string more = "and now?\n";
  const auto loaded =
      lines_of(run("chat --json --max-tokens 6", "/load " + saved + "\n" + more).out);
  const auto typed = lines_of(run("chat --json --max-tokens 6 --system 'Be brief.'",
                                  "/set temperature 0\nHello there!\n/set temperature 0.7\n" + more)
                                  .out);
  ASSERT_EQ(loaded.size(), 1u);
  ASSERT_EQ(typed.size(), 2u);
  EXPECT_EQ(loaded[0]["content"], typed[1]["content"]);
  EXPECT_EQ(loaded[0]["prompt_tokens"], typed[1]["prompt_tokens"]);
  // Sampled, /regenerate gives another answer; what follows is the conversation with that one.
  const auto again = lines_of(run("chat --json --max-tokens 6 --temperature 1",
                                  "Tell me a story.\n/regenerate\n/regenerate\n")
                                  .out);
  ASSERT_EQ(again.size(), 3u);
  EXPECT_EQ(again[0]["prompt_tokens"], again[2]["prompt_tokens"]);
  EXPECT_FALSE(again[0]["content"] == again[1]["content"] &&
               again[1]["content"] == again[2]["content"]);
}

TEST_F(FirstHour, PlotsHaveWholeStepsAndAPanelForEachUnit) {
  std::string lines;
  for (int step = 0; step <= 10; ++step) {
    lines += "{\"step\": " + std::to_string(step) + ", \"tokens\": " + std::to_string(step * 64) +
             ", \"loss/main\": 3.5, \"loss/mtp\": 4, \"learning_rate\": 0.001, "
             "\"tokens_per_second\": 5000}\n";
  }
  const std::string file = write("m.jsonl", lines), out = folder_ / "p.svg";
  ASSERT_EQ(run("plot " + file + " --x step --out " + out +
                " --keys loss/main,learning_rate,loss/mtp,tokens_per_second")
                .code,
            0);
  const std::string svg = slurp(out);
  for (const char* half : {">2.5<", ">7.5<"}) EXPECT_EQ(svg.find(half), std::string::npos) << half;
  for (const char* part :
       {">2<", ">10<", "loss (nats per token)", "translate(0 600)", "height='900'"})
    EXPECT_NE(svg.find(part), std::string::npos) << part;
  // Each panel has an axis of its own: the rate is no flat line at the foot of thousands.
  size_t panels = 0;
  for (size_t at = 0; (at = svg.find("<g transform", at)) != std::string::npos; ++at) ++panels;
  EXPECT_EQ(panels, 3u);
  EXPECT_NE(svg.find(">0.00"), std::string::npos) << "ticks of the rate";
}

/// The program at a terminal.
class Terminal {
 public:
  explicit Terminal(const std::string& command) {
    pid_ = ::forkpty(&fd_, nullptr, nullptr, nullptr);
    if (pid_ == 0) {
      ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
      ::_exit(127);
    }
  }
  ~Terminal() {
    ::kill(pid_, SIGKILL);
    wait();
    ::close(fd_);
  }
  void type(const std::string& keys) {
    EXPECT_EQ(::write(fd_, keys.data(), keys.size()), std::ssize(keys));
  }
  /// Reads until `text` has come since the last call; false after a minute.
  bool comes(const std::string& text) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (std::chrono::steady_clock::now() < end) {
      if (const size_t at = seen.find(text, from_); at != std::string::npos) {
        from_ = at + text.size();
        return true;
      }
      pollfd ready{fd_, POLLIN, 0};
      if (::poll(&ready, 1, 100) <= 0) continue;
      char piece[4096];
      const ssize_t got = ::read(fd_, piece, sizeof(piece));
      if (got <= 0) break;
      seen.append(piece, static_cast<size_t>(got));
    }
    ADD_FAILURE() << "did not come: " << text << "\nseen: " << seen;
    return false;
  }
  int wait() {
    int status = 0;
    if (!done_) ::waitpid(pid_, &status, 0);
    done_ = true;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  std::string seen;

 private:
  int fd_ = -1;
  pid_t pid_ = -1;
  size_t from_ = 0;
  bool done_ = false;
};

TEST_F(FirstHour, TheTerminalEditsLinesKeepsHistoryAndTakesPastes) {
  const std::string saved = folder_ / "saved.json", state = folder_ / "state";
  // Without a shell of its own, which Ctrl-C would reach, too.
  const std::string command = "exec env XDG_STATE_HOME=" + state + " TERM=xterm LC_ALL=C.UTF-8 " +
                              std::string(HADAL_BINARY) +
                              " chat --max-tokens 3 --temperature 0 --model " + kNano;
  // The prompt itself comes when keys are no longer the terminal's to edit.
  const std::string prompt = "\33[?2004h> ", more = "\33[?2004h. ", stopped = "[cut off after";
  {
    Terminal terminal(command);
    const auto say = [&](const std::string& keys) {
      terminal.type(keys);
      return terminal.comes(stopped) && terminal.comes(prompt);
    };
    ASSERT_TRUE(terminal.comes(prompt));
    ASSERT_TRUE(say("helo\33[Dl\r")) << "a letter between letters";
    ASSERT_TRUE(say("\33[A\r")) << "the line before";
    ASSERT_TRUE(say("\33[200~one\r/quit\n\33[201~\r")) << "a paste of two lines is one message";
    ASSERT_TRUE(say("three\33\rfour\r")) << "Alt-Enter";
    terminal.type("five\\\r");
    ASSERT_TRUE(terminal.comes(more));
    ASSERT_TRUE(say("six\r")) << "a backslash";
    ASSERT_TRUE(say("Gr\u00fc\u00dfe\u20ac\x7f\r"))
        << "characters of several bytes, one taken back";
    // At any moment: before the program waits, while it does, in a paste that does not end.
    for (const char* keys : {"never\3", "\3", "\3", "\3", "\3", "\3", "\3", "\3"}) {
      terminal.type(keys);
      ASSERT_TRUE(terminal.comes("Ctrl-D leaves"));
      ASSERT_TRUE(terminal.comes(prompt));
    }
    terminal.type("\33[200~pasted");
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    terminal.type("\3");
    ASSERT_TRUE(terminal.comes("Ctrl-D leaves"));
    ASSERT_TRUE(terminal.comes(prompt));
    terminal.type("/sav\t" + saved + "\r");
    ASSERT_TRUE(terminal.comes("messages are in"));
    ASSERT_TRUE(terminal.comes(prompt));
    terminal.type("\4");
    EXPECT_EQ(terminal.wait(), 0);
  }
  std::vector<std::string> users;
  for (const Json& message : Json::parse(slurp(saved)))
    if (message["role"] == "user") users.push_back(message["content"]);
  EXPECT_EQ(users, (std::vector<std::string>{"hello", "hello", "one\n/quit", "three\nfour",
                                             "five\nsix", "Gr\u00fc\u00dfe"}));
  const fs::path history = fs::path(state) / "hadal/chat_history";
  ASSERT_TRUE(fs::exists(history));
  EXPECT_EQ(fs::status(history).permissions() & fs::perms::all,
            fs::perms::owner_read | fs::perms::owner_write);
  // The next conversation has the lines, and --no-history leaves no trace.
  Terminal again(command);
  ASSERT_TRUE(again.comes(prompt));
  again.type("\33[A\33[A\33[A\r");
  ASSERT_TRUE(again.comes(stopped));
  EXPECT_NE(again.seen.find("six"), std::string::npos) << again.seen;
  const std::string before = slurp(history);
  Terminal silent(command + " --no-history");
  ASSERT_TRUE(silent.comes(prompt));
  silent.type("a secret\r");
  ASSERT_TRUE(silent.comes(stopped));
  EXPECT_EQ(slurp(history).find("secret"), std::string::npos);
}

}  // namespace
}  // namespace hadal
