// The hadal binary: picks the subcommand, owns the exit code.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <functional>

#include <CLI/CLI.hpp>

#include "apps/command.h"
#include "base/check.h"
#include "base/memory.h"

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
    if (error.get_exit_code() == 0) return app.exit(error);  // --help
    const auto& table = hadal::apps::commands();
    const bool known =
        argc > 1 && std::any_of(table.begin(), table.end(),
                                [&](const auto& command) { return command.name == argv[1]; });
    const std::string what = argc > 1 && !known && argv[1][0] != '-'
                                 ? hadal::concat("no subcommand '", argv[1], "'")
                                 : std::string(error.what());
    std::fprintf(stderr, "hadal: %s; see hadal %s--help\n", what.c_str(),
                 known ? hadal::concat(argv[1], " ").c_str() : "");
    return 2;
  }
  return chosen();
}

}  // namespace

int main(int argc, char** argv) {
  hadal::keep_freed_memory();
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
