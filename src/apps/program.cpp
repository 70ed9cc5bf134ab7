#include "apps/program.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "apps/command.h"
#include "apps/flags.h"
#include "base/check.h"
#include "base/join.h"

namespace hadal::apps {
namespace {

/// "FLOAT:some check" without the check.
std::string kind_of(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const std::string kind = type.substr(0, type.find_first_of(":{"));
  if (kind == "FLOAT" || kind == "INT" || kind == "UINT") return "NUMBER";
  return kind.empty() ? "TEXT" : kind;
}

class HelpFormatter : public CLI::Formatter {
 public:
  HelpFormatter() { column_width(34); }

  std::string make_option_opts(const CLI::Option* option) const override {
    std::string text;
    if (option->get_expected_max() > 0 && option->get_type_size() != 0) {
      const std::vector<std::string> choices = choices_of(*option);
      text = " " + (choices.empty() ? kind_of(*option) : join(choices, "|"));
    }
    if (option->get_expected_max() == CLI::detail::expected_max_vector_size) text += " ...";
    if (option->get_required()) text += " (needed)";
    return text;
  }
  std::string make_option_desc(const CLI::Option* option) const override {
    const std::string value = option->get_default_str();
    const std::string description = option->get_description();
    if (value.empty() || value == "[]" || description.find("default") != std::string::npos)
      return description;
    return concat(description, " [", value, "]");
  }
};

/// Every flag's value before parsing is its default; shown unless the description says better.
void show_defaults(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    const bool takes_value = option->get_expected_max() > 0 && option->get_type_size() != 0;
    if (!takes_value || option->get_required() || option->get_positional()) continue;
    option->capture_default_str();
  }
  for (CLI::App* sub : subcommands_of(app)) show_defaults(*sub);
}

size_t distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row.back();
}

std::vector<std::string> names_of(const std::vector<CLI::App*>& apps) {
  std::vector<std::string> names;
  for (const CLI::App* app : apps) names.push_back(app->get_name());
  return names;
}

void define_own(Program& program) {
  CLI::App& app = *program.app;
  CLI::App* help = app.add_subcommand("help", "the help of a command");
  auto words = std::make_shared<std::vector<std::string>>();
  help->add_option("command", *words, "as in: hadal help eval perplexity");
  help->final_callback([&program, words] {
    program.chosen = [&program, words] {
      CLI::App* found = command_of(*program.app, *words);
      size_t depth = 0;
      for (const CLI::App* at = found; at != program.app.get(); at = at->get_parent()) ++depth;
      HADAL_INPUT_CHECK(
          depth == words->size(), "no subcommand '", (*words)[depth], "'",
          nearest((*words)[depth], names_of(subcommands_of(*found))).empty()
              ? ""
              : concat("; did you mean '",
                       nearest((*words)[depth], names_of(subcommands_of(*found))), "'?"));
      std::string before;
      for (const CLI::App* at = found->get_parent(); at != nullptr; at = at->get_parent())
        before = at->get_name() + " " + before;
      if (before.ends_with(' ')) before.pop_back();
      std::fputs(found->help(before).c_str(), stdout);
      return 0;
    };
  });
  CLI::App* completion =
      app.add_subcommand("completion", "a script that completes commands and flags");
  auto shell = std::make_shared<std::string>();
  completion->add_option("shell", *shell, "whose: bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  completion->footer(
      "Example:\n  hadal completion bash > ~/.local/share/bash-completion/completions/hadal\n"
      "  source <(hadal completion zsh)");
  completion->final_callback([&program, shell] {
    program.chosen = [&program, shell] {
      std::fputs(completion_script(*program.app, *shell).c_str(), stdout);
      return 0;
    };
  });
  CLI::App* man = app.add_subcommand("man", "the manual as a man page");
  man->footer("Example:\n  hadal man | man -l -");
  man->final_callback([&program] {
    program.chosen = [&program] {
      std::fputs(man_page(*program.app).c_str(), stdout);
      return 0;
    };
  });
}

}  // namespace

std::string_view version() { return HADAL_VERSION; }

std::unique_ptr<Program> make_program() {
  auto made = std::make_unique<Program>();
  Program& program = *made;
  program.app = std::make_unique<CLI::App>("DeepSeek-V4 as a complete system", "hadal");
  CLI::App& app = *program.app;
  app.formatter(std::make_shared<HelpFormatter>());
  app.set_version_flag("--version", concat("hadal ", version()), "print the version");
  app.require_subcommand(1);
  for (const Command& command : commands()) {
    CLI::App* sub = app.add_subcommand(command.name, command.summary);
    sub->footer("Example:\n" + command.example);
    std::function<int()> body = command.define(*sub);
    sub->final_callback([&program, body] { program.chosen = body; });
  }
  define_own(program);
  check_numbers(app);
  show_defaults(app);
  return made;
}

CLI::App* command_of(CLI::App& app, const std::vector<std::string>& words) {
  CLI::App* at = &app;
  for (const std::string& word : words) {
    const auto subs = subcommands_of(*at);
    const auto found = std::find_if(subs.begin(), subs.end(),
                                    [&](const CLI::App* sub) { return sub->get_name() == word; });
    if (found == subs.end()) break;
    at = *found;
  }
  return at;
}

std::string nearest(const std::string& word, const std::vector<std::string>& known) {
  std::string best;
  // A third of the letters may be wrong.
  size_t least = std::max<size_t>(1, word.size() / 3) + 1;
  for (const std::string& name : known) {
    const size_t found = distance(word, name);
    if (found >= least) continue;
    least = found;
    best = name;
  }
  return best;
}

std::string refusal(CLI::App& app,
                    const std::vector<std::string>& words,
                    const CLI::ParseError& error) {
  CLI::App* command = command_of(app, words);
  std::string path;
  for (const CLI::App* at = command; at != nullptr && at->get_parent() != nullptr;
       at = at->get_parent())
    path = at->get_name() + " " + path;
  std::string what = error.what();
  std::string meant;
  size_t depth = 0;
  for (const CLI::App* at = command; at->get_parent() != nullptr; at = at->get_parent()) ++depth;
  const bool wants_command = !subcommands_of(*command).empty();
  if (wants_command && depth < words.size() && !words[depth].starts_with('-')) {
    if (command->get_parent() == nullptr || command->get_require_subcommand_min() > 0)
      what = concat("no subcommand '", words[depth], "'");
    meant = nearest(words[depth], names_of(subcommands_of(*command)));
  } else if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    const std::vector<std::string> flags = flag_names(*command);
    for (const std::string& word : words) {
      const std::string name = word.substr(0, word.find('='));
      if (!name.starts_with("--") || std::find(flags.begin(), flags.end(), name) != flags.end())
        continue;
      what = concat("no flag ", name);
      meant = nearest(name, flags);
      break;
    }
  }
  if (!meant.empty()) what += concat("; did you mean ", meant, "?");
  // One line, whatever a flag held.
  std::replace(what.begin(), what.end(), '\n', ' ');
  return concat(what, meant.empty() ? "; see hadal " : " See hadal ", path, "--help");
}

std::vector<std::string> flag_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

std::vector<CLI::App*> subcommands_of(const CLI::App& app) {
  // CLI11 hands out what it holds, constant or not.
  return const_cast<CLI::App&>(app).get_subcommands([](const CLI::App*) { return true; });
}

std::vector<std::string> choices_of(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const size_t begin = type.find('{'), end = type.find('}');
  std::vector<std::string> choices;
  if (begin == std::string::npos || end == std::string::npos) return choices;
  for (size_t at = begin + 1; at < end;) {
    const size_t comma = std::min(type.find(',', at), end);
    choices.push_back(type.substr(at, comma - at));
    at = comma + 1;
  }
  return choices;
}

}  // namespace hadal::apps
