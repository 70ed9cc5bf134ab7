// The subcommands on text alone.
#pragma once

#include <functional>

namespace CLI {
class App;
}  // namespace CLI

namespace hadal::apps {

std::function<int()> define_tokenize(CLI::App& app);
std::function<int()> define_detokenize(CLI::App& app);
std::function<int()> define_chat_encode(CLI::App& app);
std::function<int()> define_chat_parse(CLI::App& app);
std::function<int()> define_tokenizer_cut(CLI::App& app);

}  // namespace hadal::apps
