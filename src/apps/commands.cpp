// The table of subcommands. A new one: a file named as it is, a declaration and a line here.
#include "apps/command.h"

namespace hadal::apps {

std::function<int()> define_inspect(CLI::App& app);
std::function<int()> define_plan(CLI::App& app);

const std::vector<Command>& commands() {
  static const std::vector<Command> table = {
      {"inspect", "layers, parameters and bytes of a checkpoint or config",
       "hadal inspect --config config.json", define_inspect},
      {"plan", "FLOPs and KV bytes per token against V3.2",
       "hadal plan --config config.json --context 1000000 --svg cost.svg", define_plan},
  };
  return table;
}

}  // namespace hadal::apps
