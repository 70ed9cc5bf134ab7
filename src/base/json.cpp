#include "base/json.h"

#include <cmath>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/file.h"

namespace hadal {

using nlohmann::json;

namespace {

constexpr int kMaxDepth = 64;  // no document of ours nests deeper; keeps hostile ones cheap

/// What a value is, for messages: its type and, when short, its text.
std::string found(const json& value) {
  if (value.is_structured()) return value.type_name();
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return concat(value.type_name(), " ", text);
}

int64_t to_integer(const json& value, const std::string& where, int64_t min, int64_t max) {
  int64_t result = 0;
  bool fits = true;
  if (value.is_number_unsigned()) {
    const auto raw = value.get<uint64_t>();
    fits = raw <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    result = static_cast<int64_t>(raw);
  } else if (value.is_number_integer()) {
    result = value.get<int64_t>();
  } else if (value.is_number_float()) {
    const double raw = value.get<double>();
    fits = std::abs(raw) <= 9007199254740992.0;  // 2^53: beyond it a double is no exact integer
    HADAL_INPUT_CHECK(!fits || std::trunc(raw) == raw, where, ": expected an integer, found ",
                      found(value));
    result = fits ? static_cast<int64_t>(raw) : 0;
  } else {
    throw InputError(concat(where, ": expected an integer, found ", found(value)));
  }
  HADAL_INPUT_CHECK(fits && result >= min && result <= max, where, ": expected an integer from ",
                    min, " to ", max, ", found ", found(value));
  return result;
}

double to_number(const json& value, const std::string& where, double min, double max) {
  HADAL_INPUT_CHECK(value.is_number(), where, ": expected a number, found ", found(value));
  const double result = value.get<double>();
  HADAL_INPUT_CHECK(result >= min && result <= max, where, ": expected a number from ", min, " to ",
                    max, ", found ", found(value));
  return result;
}

}  // namespace

std::shared_ptr<const json> parse_json(std::string_view text, const std::string& origin) {
  std::vector<std::set<std::string>> open;
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    HADAL_INPUT_CHECK(depth <= kMaxDepth, origin, ": JSON nested more than ", kMaxDepth,
                      " levels deep");
    if (event == json::parse_event_t::object_start) open.emplace_back();
    if (event == json::parse_event_t::object_end) open.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      HADAL_INPUT_CHECK(open.back().insert(key).second, origin, ": duplicate key ", found(parsed));
    }
    return true;
  };
  try {
    return std::make_shared<const json>(json::parse(text.begin(), text.end(), check));
  } catch (const json::exception& error) {
    std::string reason = error.what();
    if (reason.size() > 300) reason = reason.substr(0, 297) + "...";
    throw InputError(concat(origin, ": not valid JSON: ", reason));
  }
}

JsonObject::JsonObject(std::shared_ptr<const json> document,
                       const json* value,
                       std::string origin,
                       std::string path)
    : document_(std::move(document)),
      value_(value),
      origin_(std::move(origin)),
      path_(std::move(path)),
      read_(std::make_shared<std::set<std::string>>()) {
  HADAL_INPUT_CHECK(value_->is_object(), origin_, path_.empty() ? "" : ": ", path_,
                    ": expected an object, found ", found(*value_));
}

JsonObject JsonObject::parse(std::string_view text, const std::string& origin) {
  auto document = parse_json(text, origin);
  const json* root = document.get();
  return JsonObject(std::move(document), root, origin, "");
}

JsonObject JsonObject::load(const std::string& path) {
  return parse(read_file(path, int64_t{1} << 28), path);
}

std::string JsonObject::where(const std::string& key) const {
  return path_.empty() ? concat(origin_, ": ", key) : concat(origin_, ": ", path_, ".", key);
}

bool JsonObject::has(const std::string& key) const {
  read_->insert(key);
  const auto it = value_->find(key);
  return it != value_->end() && !it->is_null();
}

const json& JsonObject::at(const std::string& key) const {
  HADAL_INPUT_CHECK(has(key), where(key), ": required key is missing");
  return *value_->find(key);
}

int64_t JsonObject::integer(const std::string& key, int64_t min, int64_t max) const {
  return to_integer(at(key), where(key), min, max);
}

double JsonObject::number(const std::string& key, double min, double max) const {
  return to_number(at(key), where(key), min, max);
}

bool JsonObject::boolean(const std::string& key) const {
  const json& value = at(key);
  HADAL_INPUT_CHECK(value.is_boolean(), where(key), ": expected true or false, found ",
                    found(value));
  return value.get<bool>();
}

std::string JsonObject::string(const std::string& key) const {
  const json& value = at(key);
  HADAL_INPUT_CHECK(value.is_string(), where(key), ": expected a string, found ", found(value));
  return value.get<std::string>();
}

namespace {

void expect_array(const json& value, const std::string& where) {
  HADAL_INPUT_CHECK(value.is_array(), where, ": expected an array, found ", found(value));
}

/// Applies convert(item, "where[i]") to every item of an array.
template <typename T, typename Convert>
std::vector<T> convert_items(const json& value, const std::string& where, Convert convert) {
  std::vector<T> result;
  expect_array(value, where);
  for (const json& item : value)
    result.push_back(convert(item, concat(where, "[", result.size(), "]")));
  return result;
}

}  // namespace

std::vector<int64_t> JsonObject::integers(const std::string& key, int64_t min, int64_t max) const {
  return convert_items<int64_t>(at(key), where(key), [&](const json& item, const std::string& at) {
    return to_integer(item, at, min, max);
  });
}

std::vector<double> JsonObject::numbers(const std::string& key) const {
  constexpr double kMax = std::numeric_limits<double>::max();
  return convert_items<double>(at(key), where(key), [](const json& item, const std::string& at) {
    return to_number(item, at, -kMax, kMax);
  });
}

std::vector<std::string> JsonObject::strings(const std::string& key) const {
  return convert_items<std::string>(
      at(key), where(key), [](const json& item, const std::string& at) {
        HADAL_INPUT_CHECK(item.is_string(), at, ": expected a string, found ", found(item));
        return item.get<std::string>();
      });
}

JsonObject JsonObject::object(const std::string& key) const {
  const json& value = at(key);
  return JsonObject(document_, &value, origin_, path_.empty() ? key : path_ + "." + key);
}

std::vector<JsonObject> JsonObject::objects(const std::string& key) const {
  std::vector<JsonObject> result;
  const std::string path = path_.empty() ? key : path_ + "." + key;
  expect_array(at(key), where(key));
  for (const json& item : at(key))
    result.push_back(JsonObject(document_, &item, origin_, concat(path, "[", result.size(), "]")));
  return result;
}

int64_t JsonObject::integer_or(const std::string& key,
                               int64_t fallback,
                               int64_t min,
                               int64_t max) const {
  return has(key) ? integer(key, min, max) : fallback;
}

double JsonObject::number_or(const std::string& key,
                             double fallback,
                             double min,
                             double max) const {
  return has(key) ? number(key, min, max) : fallback;
}

bool JsonObject::boolean_or(const std::string& key, bool fallback) const {
  return has(key) ? boolean(key) : fallback;
}

std::string JsonObject::string_or(const std::string& key, const std::string& fallback) const {
  return has(key) ? string(key) : fallback;
}

std::vector<std::string> JsonObject::keys() const {
  std::vector<std::string> result;
  for (const auto& item : value_->items()) result.push_back(item.key());
  return result;
}

std::vector<std::string> JsonObject::unread_keys() const {
  std::vector<std::string> result;
  for (const auto& item : value_->items())
    if (!read_->contains(item.key()))
      result.push_back(path_.empty() ? item.key() : path_ + "." + item.key());
  return result;
}

void JsonObject::expect_all_read() const {
  const auto unread = unread_keys();
  HADAL_INPUT_CHECK(unread.empty(), origin_, ": unknown key", unread.size() == 1 ? " " : "s ",
                    fmt::format("{}", fmt::join(unread, ", ")));
}

void JsonWriter::separate() {
  if (std::exchange(after_key_, false)) return;
  if (has_items_.empty()) return;
  if (has_items_.back()) text_ += ',';
  has_items_.back() = true;
  text_ += '\n';
  text_.append(2 * has_items_.size(), ' ');
}

JsonWriter& JsonWriter::begin_object() {
  separate();
  text_ += '{';
  has_items_.push_back(false);
  return *this;
}

JsonWriter& JsonWriter::begin_array() {
  separate();
  text_ += '[';
  has_items_.push_back(false);
  return *this;
}

JsonWriter& JsonWriter::end_object() {
  HADAL_CHECK(!has_items_.empty() && !after_key_, "JsonWriter: nothing to close");
  const bool had_items = has_items_.back();
  has_items_.pop_back();
  if (had_items) text_.append("\n").append(2 * has_items_.size(), ' ');
  text_ += '}';
  return *this;
}

JsonWriter& JsonWriter::end_array() {
  end_object();
  text_.back() = ']';
  return *this;
}

JsonWriter& JsonWriter::key(std::string_view name) {
  separate();
  text_ += json_quote(name) + ": ";
  after_key_ = true;
  return *this;
}

JsonWriter& JsonWriter::value(int64_t number) {
  separate();
  text_ += fmt::format("{}", number);
  return *this;
}

JsonWriter& JsonWriter::value(double number) {
  separate();
  text_ += json(number).dump();
  return *this;
}

JsonWriter& JsonWriter::value(bool flag) {
  separate();
  text_ += flag ? "true" : "false";
  return *this;
}

JsonWriter& JsonWriter::value(std::string_view text) {
  separate();
  text_ += json_quote(text);
  return *this;
}

JsonWriter& JsonWriter::value(const std::vector<int64_t>& numbers) {
  separate();
  text_ += fmt::format("[{}]", fmt::join(numbers, ", "));
  return *this;
}

std::string JsonWriter::str() const {
  HADAL_CHECK(has_items_.empty() && !after_key_, "JsonWriter: ", has_items_.size(),
              " objects or arrays are still open");
  return text_ + "\n";
}

std::string json_quote(std::string_view text) {
  return json(std::string(text)).dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace hadal
