#include "apps/effort_choice.h"

#include <filesystem>

#include "base/file.h"

namespace hadal::apps {

namespace fs = std::filesystem;

EffortChoice choose_effort_levels(const std::string& folder,
                                  const model::ModelConfig& config,
                                  const std::string& flag) {
  using text::EffortLevels;
  if (!flag.empty()) return {text::parse_effort_levels(flag), "as --effort-levels says", true};
  std::error_code error;
  const fs::path encoder = fs::path(folder) / "encoding" / "encoding_dsv4.py";
  if (fs::is_regular_file(encoder, error)) {
    // Words that only 0731's encoder writes; an edited one has them, too.
    const bool later = read_file(encoder.string()).find("Beyond maximum") != std::string::npos;
    return {later ? EffortLevels::k0731 : EffortLevels::kPreview,
            "as encoding/encoding_dsv4.py beside the weights has them", true};
  }
  const fs::path whole = fs::weakly_canonical(folder, error);
  const std::string name = (error ? fs::path(folder) : whole).filename().string();
  if (name.find("0731") != std::string::npos)
    return {EffortLevels::k0731, "by the folder's name, without encoding/encoding_dsv4.py", true};
  if (config.drafter.exists())
    return {EffortLevels::kPreview,
            "no encoding/encoding_dsv4.py tells a 0731 checkpoint from an earlier one with a "
            "drafter; --effort-levels 0731 chooses",
            false};
  return {EffortLevels::kPreview, "no DSpark drafter, no encoding/encoding_dsv4.py", true};
}

}  // namespace hadal::apps
