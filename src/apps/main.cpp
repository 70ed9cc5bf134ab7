// The hadal binary: picks the subcommand, owns the exit code.
#include <cstdio>
#include <exception>
#include <functional>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "base/check.h"

namespace {

int run(int argc, char** argv) {
  CLI::App app{"hadal: DeepSeek-V4 as a complete system"};
  app.require_subcommand(1);
  std::function<int()> chosen;
  for (const hadal::apps::Command& command : hadal::apps::commands()) {
    CLI::App* sub = app.add_subcommand(command.name, command.summary);
    sub->footer("Example:\n" + command.example);
    std::function<int()> body = command.define(*sub);
    sub->final_callback([&chosen, body] { chosen = body; });
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : 2;
  }
  return chosen();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const hadal::InputError& error) {
    std::fprintf(stderr, "hadal: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "hadal: internal error: %s\n", error.what());
    return 3;
  }
}
