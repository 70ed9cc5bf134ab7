// hadal eval choice and hadal eval generate.
#pragma once

#include <functional>

namespace CLI {
class App;
}  // namespace CLI

namespace hadal::apps {

std::function<int()> define_eval_choice(CLI::App& app);
std::function<int()> define_eval_generate(CLI::App& app);

}  // namespace hadal::apps
