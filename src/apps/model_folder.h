// Where the model is when no --model names it.
#pragma once

#include <string>
#include <vector>

namespace hadal::apps {

struct ModelSearch {
  std::string found;                ///< a folder with a config.json; empty: none
  std::vector<std::string> looked;  ///< folders tried, in order
};

/// HADAL_MODEL if it is set, and nothing else then; otherwise models/hadal-nano in the program's
/// folder and in every folder above it, nearest first.
ModelSearch search_default_model();

/// `flag` unless it is empty, else the default model. InputError naming every folder looked at when
/// there is none.
std::string model_folder(const std::string& flag);

}  // namespace hadal::apps
