// The program as a whole: its tree of commands, and what it says of itself.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

namespace hadal::apps {

/// "0.1.0", as CMakeLists.txt has it.
std::string_view version();

struct Program {
  std::unique_ptr<CLI::App> app;
  std::function<int()> chosen;  ///< set by parsing
};

/// Every command with its flags, checks and help. The result must not move while it parses.
std::unique_ptr<Program> make_program();

/// What is known of words that follow one another: the deepest command they name.
CLI::App* command_of(CLI::App& app, const std::vector<std::string>& words);

/// The one of `known` that a person who wrote `word` may have meant; empty if none is near.
std::string nearest(const std::string& word, const std::vector<std::string>& known);

/// One line on why the words were refused, with what may have been meant.
std::string refusal(CLI::App& app,
                    const std::vector<std::string>& words,
                    const CLI::ParseError& error);

/// "--long" names of an app's flags.
std::vector<std::string> flag_names(const CLI::App& app);
std::vector<CLI::App*> subcommands_of(const CLI::App& app);
/// "chat", "thinking" of a flag that takes one of them; empty for others.
std::vector<std::string> choices_of(const CLI::Option& option);

/// A script that completes commands and flags. `shell`: bash, zsh or fish.
std::string completion_script(const CLI::App& app, const std::string& shell);
/// The manual as a man page (troff).
std::string man_page(const CLI::App& app);

}  // namespace hadal::apps
