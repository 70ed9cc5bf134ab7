// The completions of shells and the man page, written out of the tree of commands.
#include "apps/program.h"
#include "base/check.h"
#include "base/join.h"

namespace hadal::apps {
namespace {

std::string spaced(const std::vector<std::string>& words) { return join(words, " "); }

std::vector<std::string> names_below(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* sub : subcommands_of(app)) names.push_back(sub->get_name());
  return names;
}

struct BashTables {
  std::string paths, words, choices;
};

void add_bash(const CLI::App& app, const std::string& path, BashTables& tables) {
  std::vector<std::string> words = names_below(app);
  for (const std::string& flag : flag_names(app)) words.push_back(flag);
  if (!path.empty()) tables.paths += (tables.paths.empty() ? "" : "|") + path;
  tables.words += concat("    '", path, "') words='", spaced(words), "' ;;\n");
  for (const CLI::Option* option : app.get_options()) {
    const std::vector<std::string> choices = choices_of(*option);
    if (choices.empty()) continue;
    const std::string flag =
        option->get_lnames().empty() ? app.get_name() : "--" + option->get_lnames()[0];
    tables.choices += concat("    '", path, " ", flag, "') choices='", spaced(choices), "' ;;\n");
  }
  for (const CLI::App* sub : subcommands_of(app))
    add_bash(*sub, path + "/" + sub->get_name(), tables);
}

std::string bash_script(const CLI::App& app) {
  BashTables tables;
  add_bash(app, "", tables);
  return concat(
      "_hadal() {\n"
      "  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} path= words= "
      "choices= i\n"
      "  for ((i = 1; i < COMP_CWORD; i++)); do\n"
      "    case \"$path/${COMP_WORDS[i]}\" in\n      ",
      tables.paths, ") path=$path/${COMP_WORDS[i]} ;;\n    esac\n  done\n  case \"$path\" in\n",
      tables.words, "  esac\n  case \"$path $before\" in\n", tables.choices,
      "  esac\n"
      "  if [ -n \"$choices\" ]; then COMPREPLY=($(compgen -W \"$choices\" -- \"$current\"))\n"
      "  elif [[ $current == -* || $words != -* ]]; then COMPREPLY=($(compgen -W \"$words\" -- "
      "\"$current\"))\n"
      "  else COMPREPLY=(); fi\n"
      "}\n"
      "complete -o bashdefault -o default -F _hadal hadal\n");
}

/// A text between single quotes.
std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("\\'") : std::string(1, c);
  return out + "'";
}

void add_fish(const CLI::App& app, const std::string& condition, std::string& out) {
  std::vector<std::string> below = names_below(app);
  const bool root = app.get_parent() == nullptr;
  const std::string here =
      root ? "__fish_use_subcommand"
           : (below.empty()
                  ? condition
                  : concat(condition, "; and not __fish_seen_subcommand_from ", spaced(below)));
  for (const CLI::App* sub : subcommands_of(app)) {
    out += concat("complete -c hadal -f -n ", quoted(here), " -a ", sub->get_name(), " -d ",
                  quoted(sub->get_description()), "\n");
  }
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty()) continue;
    const std::vector<std::string> choices = choices_of(*option);
    out += concat("complete -c hadal -n ", quoted(here), " -l ", option->get_lnames()[0]);
    if (!choices.empty()) {
      out += concat(" -x -a ", quoted(spaced(choices)));
    } else if (option->get_expected_max() > 0 && option->get_type_size() != 0) {
      out += " -r";
    }
    out += concat(" -d ", quoted(option->get_description()), "\n");
  }
  for (const CLI::App* sub : subcommands_of(app)) {
    const std::string seen = "__fish_seen_subcommand_from " + sub->get_name();
    add_fish(*sub, root ? seen : condition + "; and " + seen, out);
  }
}

/// Text that troff takes as it is.
std::string troff(const std::string& text) {
  std::string out;
  bool line_begins = true;
  for (const char c : text) {
    if (line_begins && (c == '.' || c == '\'')) out += "\\&";
    line_begins = c == '\n';
    if (c == '\\') {
      out += "\\e";
    } else if (c == '-') {
      out += "\\-";
    } else {
      out += c;
    }
  }
  return out;
}

void add_man(const CLI::App& app, const std::string& path, std::string& out) {
  out += concat(".SS ", troff(path), "\n", troff(app.get_description()), "\n");
  const auto formatter = app.get_formatter();
  for (const CLI::Option* option : app.get_options()) {
    const std::string names =
        option->get_positional() ? option->get_name(true, false) : option->get_name(false, true);
    const auto* help = dynamic_cast<const CLI::Formatter*>(formatter.get());
    const std::string value = help != nullptr ? help->make_option_opts(option) : "";
    const std::string text =
        help != nullptr ? help->make_option_desc(option) : option->get_description();
    out += concat(".TP\n.B ", troff(names + value), "\n", troff(text), "\n");
  }
  if (!app.get_footer().empty()) out += concat(".PP\n.nf\n", troff(app.get_footer()), "\n.fi\n");
  for (const CLI::App* sub : subcommands_of(app)) add_man(*sub, path + " " + sub->get_name(), out);
}

}  // namespace

std::string completion_script(const CLI::App& app, const std::string& shell) {
  if (shell == "bash") return bash_script(app);
  if (shell == "zsh")
    return "#compdef hadal\nautoload -U +X compinit && compinit\nautoload -U +X bashcompinit && "
           "bashcompinit\n" +
           bash_script(app);
  std::string out;
  add_fish(app, "", out);
  return out;
}

std::string man_page(const CLI::App& app) {
  std::string out = concat(".TH HADAL 1 \"\" \"hadal ", version(), "\"\n.SH NAME\nhadal \\- ",
                           troff(app.get_description()),
                           "\n.SH SYNOPSIS\n.B hadal\n.I command\n[\n.I flags\n]\n.SH COMMANDS\n");
  for (const CLI::App* sub : subcommands_of(app)) add_man(*sub, "hadal " + sub->get_name(), out);
  out +=
      ".SH ENVIRONMENT\n.TP\n.B HADAL_MODEL\nthe model's folder where no \\-\\-model names one\n"
      ".SH EXIT STATUS\n0: done. 1: a negative result. 2: bad usage or input, or output that could "
      "not be written. 3: a fault of hadal.\n";
  return out;
}

}  // namespace hadal::apps
