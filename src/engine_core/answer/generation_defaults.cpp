#include "engine_core/answer/generation_defaults.h"

#include <cmath>
#include <filesystem>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/file.h"

namespace hadal::engine_core {
namespace {

using Json = nlohmann::ordered_json;

/// A value as it stands in the file, short enough for a message.
std::string shown(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 60);
}

class DefaultsReader {
 public:
  DefaultsReader(const Json& object, const std::string& where) : object_(object), where_(where) {}

  double number(const char* key, double otherwise, double least, double most) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    const bool fits = value->is_number() && value->get<double>() >= least &&
                      value->get<double>() <= most && std::isfinite(value->get<double>());
    HADAL_INPUT_CHECK(fits, where_, ": ", key, ": expected a number from ", least, " to ", most,
                      ", found ", shown(*value));
    return value->get<double>();
  }
  int64_t integer(const char* key, int64_t otherwise, int64_t least, int64_t most) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    const double found = value->is_number() ? value->get<double>() : NAN;
    const bool fits = found >= static_cast<double>(least) && found <= static_cast<double>(most) &&
                      found == std::floor(found);
    HADAL_INPUT_CHECK(fits, where_, ": ", key, ": expected a whole number from ", least, " to ",
                      most, ", found ", shown(*value));
    return static_cast<int64_t>(found);
  }
  bool boolean(const char* key, bool otherwise) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    HADAL_INPUT_CHECK(value->is_boolean(), where_, ": ", key, ": expected true or false, found ",
                      shown(*value));
    return value->get<bool>();
  }

 private:
  const Json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  const Json& object_;
  const std::string& where_;
};

}  // namespace

GenerationDefaults parse_generation_defaults(std::string_view json, const std::string& where) {
  const Json object = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  HADAL_INPUT_CHECK(object.is_object(), where, ": expected a JSON object");
  const DefaultsReader read(object, where);
  GenerationDefaults defaults;
  Sampling& sampling = defaults.sampling;
  sampling.temperature = read.number("temperature", 1.0, 0.0, 2.0);
  if (!read.boolean("do_sample", true)) sampling.temperature = 0.0;
  sampling.top_p = read.number("top_p", 1.0, 1e-9, 1.0);
  sampling.min_p = read.number("min_p", 0.0, 0.0, 0.999999);
  sampling.top_k = read.integer("top_k", 0, 0, int64_t{1} << 31);
  sampling.repetition_penalty = read.number("repetition_penalty", 1.0, 0.01, 10.0);
  defaults.max_tokens = read.integer("max_new_tokens", 0, 1, int64_t{1} << 40);
  defaults.thinking = read.boolean("thinking", true);
  return defaults;
}

GenerationDefaults load_generation_defaults(const std::string& folder) {
  const std::string path = folder + "/generation_config.json";
  std::error_code error;
  const auto status = std::filesystem::symlink_status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) return {};
  return parse_generation_defaults(read_file(path, int64_t{1} << 20), path);
}

}  // namespace hadal::engine_core
