// A subcommand of the hadal binary: its name, help and what it runs.
//
// define() adds flags to the CLI11 app and returns the function that runs after parsing; that
// function's result is the exit code: 0 done, 1 a negative result. Exceptions end in main(), which
// turns them into one line and exit code 2 (InputError, bad flags) or 3 (a broken contract inside
// hadal).
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace CLI {
class App;
}  // namespace CLI

namespace hadal::apps {

struct Command {
  std::string name;
  std::string summary;  ///< one line
  std::string example;  ///< one or more lines, shown below the flags by --help
  std::function<int()> (*define)(CLI::App& app);
};

/// Every subcommand, in the order of --help.
const std::vector<Command>& commands();

}  // namespace hadal::apps
