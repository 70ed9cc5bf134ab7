#include "apps/model_folder.h"

#include <cstdlib>
#include <filesystem>

#include "base/check.h"
#include "base/join.h"

namespace hadal::apps {
namespace {

namespace fs = std::filesystem;

constexpr const char* kShipped = "models/hadal-nano";

bool is_model(const fs::path& folder) {
  std::error_code ignored;
  return fs::exists(folder / "config.json", ignored);
}

}  // namespace

ModelSearch search_default_model() {
  ModelSearch search;
  const auto look = [&](const fs::path& folder) {
    search.looked.push_back(folder.string());
    if (is_model(folder)) search.found = folder.string();
    return !search.found.empty();
  };
  if (const char* named = std::getenv("HADAL_MODEL"); named != nullptr && *named != '\0') {
    look(named);
    return search;
  }
  std::error_code error;
  fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
  if (error) folder = fs::current_path(error);
  while (!look(folder / kShipped) && folder.has_relative_path()) folder = folder.parent_path();
  return search;
}

std::string model_folder(const std::string& flag) {
  if (!flag.empty()) return flag;
  const ModelSearch search = search_default_model();
  HADAL_INPUT_CHECK(!search.found.empty(), "no model: none is named by --model, and there is no ",
                    "config.json in ", join(search.looked),
                    " (HADAL_MODEL can name another folder)");
  return search.found;
}

}  // namespace hadal::apps
