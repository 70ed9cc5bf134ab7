// The table of subcommands. A new one: a file named as it is, a declaration and a line here.
#include "apps/command.h"

namespace hadal::apps {

const std::vector<Command>& commands() {
  static const std::vector<Command> table = {};
  return table;
}

}  // namespace hadal::apps
