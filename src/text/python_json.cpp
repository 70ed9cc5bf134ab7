#include "text/python_json.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "base/check.h"
#include "text/utf8.h"

namespace hadal::text {
namespace {

constexpr int kMaxDepth = 512;
// From here on an object's duplicate keys are looked up in a table.
constexpr size_t kManyMembers = 16;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// What stands behind the backslash of an escape; 0: none is needed, 'u': four digits follow.
constexpr std::array<char, 256> kEscapes = [] {
  std::array<char, 256> escapes = {};
  for (size_t c = 0; c < 0x20; ++c) escapes[c] = 'u';
  escapes['"'] = '"';
  escapes['\\'] = '\\';
  escapes['\n'] = 'n';
  escapes['\r'] = 'r';
  escapes['\t'] = 't';
  escapes['\f'] = 'f';
  escapes['\b'] = 'b';
  return escapes;
}();

void append_quoted(std::string& out, std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  out += '"';
  size_t begin = 0;  // of what is not written yet and needs no escape
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<uint8_t>(text[i]);
    const char escape = kEscapes[c];
    if (escape == 0) continue;
    out.append(text, begin, i - begin);
    begin = i + 1;
    out += '\\';
    out += escape;
    if (escape == 'u') {
      out += "00";
      out += kHex[c >> 4];
      out += kHex[c & 15];
    }
  }
  out.append(text, begin);
  out += '"';
}

/// float.__repr__: the shortest digits that read back; plain between 1e-4 and 1e16, else with an
/// exponent.
void append_float(std::string& out, double value) {
  if (std::isnan(value)) {
    out += "NaN";
    return;
  }
  if (std::isinf(value)) {
    out += value < 0 ? "-Infinity" : "Infinity";
    return;
  }
  char buffer[64];
  const auto written =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  std::string_view shortest(buffer, static_cast<size_t>(written.ptr - buffer));  // d.ddde+XX
  if (shortest.front() == '-') {
    out += '-';
    shortest.remove_prefix(1);
  }
  const size_t e = shortest.find('e');
  std::string digits(shortest.substr(0, 1));
  if (e > 2) digits += shortest.substr(2, e - 2);
  int exponent = 0;
  const char* first = shortest.data() + e + 1;
  if (*first == '+') ++first;
  std::from_chars(first, shortest.data() + shortest.size(), exponent);
  const auto count = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    out += digits[0];
    if (count > 1) out += '.' + digits.substr(1);
    const int size = std::abs(exponent);
    out += concat('e', exponent < 0 ? '-' : '+', size < 10 ? "0" : "", size);
  } else if (exponent < 0) {
    out += "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  } else if (count <= exponent + 1) {
    out += digits + std::string(static_cast<size_t>(exponent + 1 - count), '0') + ".0";
  } else {
    out += digits.substr(0, static_cast<size_t>(exponent) + 1) + '.' +
           digits.substr(static_cast<size_t>(exponent) + 1);
  }
}

}  // namespace

class PyJsonReader {
 public:
  PyJsonReader(std::string_view text, std::string_view name, PyJson::Keys keys)
      : text_(text), name_(name), once_(keys == PyJson::Keys::kOnce) {}

  PyJson read() {
    const size_t valid = valid_utf8_prefix(text_);
    if (valid != text_.size()) fail(valid, "invalid UTF-8");
    skip_space();
    PyJson value = read_value(0);
    skip_space();
    if (pos_ != text_.size()) fail(pos_, "more text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(size_t pos, std::string_view what) const {
    throw InputError(concat(name_, ": not JSON: ", what, " at byte ", pos));
  }
  char peek() const { return pos_ < text_.size() ? text_[pos_] : '\0'; }
  void skip_space() {
    while (pos_ < text_.size() && (text_[pos_] == ' ' || text_[pos_] == '\t' ||
                                   text_[pos_] == '\n' || text_[pos_] == '\r'))
      ++pos_;
  }
  bool accept(std::string_view word) {
    if (text_.substr(pos_, word.size()) != word) return false;
    pos_ += word.size();
    return true;
  }

  PyJson read_value(int depth) {
    if (depth > kMaxDepth) fail(pos_, "nesting too deep");
    const char c = peek();
    if (c == '"') return PyJson::string(read_string());
    if (c == '{') return read_object(depth);
    if (c == '[') return read_array(depth);
    if (accept("null")) return {};
    if (accept("true")) return PyJson::boolean(true);
    if (accept("false")) return PyJson::boolean(false);
    if (accept("NaN")) return PyJson::real(std::numeric_limits<double>::quiet_NaN());
    if (accept("Infinity")) return PyJson::real(std::numeric_limits<double>::infinity());
    if (accept("-Infinity")) return PyJson::real(-std::numeric_limits<double>::infinity());
    return read_number();
  }

  PyJson read_number() {
    const size_t start = pos_;
    if (peek() == '-') ++pos_;
    if (!is_digit(peek())) fail(start, "expected a value");
    if (peek() == '0') {
      ++pos_;
    } else {
      while (is_digit(peek())) ++pos_;
    }
    const size_t after_integer = pos_;
    if (peek() == '.' && pos_ + 1 < text_.size() && is_digit(text_[pos_ + 1])) {
      ++pos_;
      while (is_digit(peek())) ++pos_;
    }
    if (peek() == 'e' || peek() == 'E') {
      size_t digits = pos_ + 1;
      if (digits < text_.size() && (text_[digits] == '+' || text_[digits] == '-')) ++digits;
      if (digits < text_.size() && is_digit(text_[digits])) {
        pos_ = digits;
        while (is_digit(peek())) ++pos_;
      }
    }
    const std::string_view number = text_.substr(start, pos_ - start);
    if (pos_ == after_integer) {
      PyJson value = PyJson::integer(0);
      if (number != "-0") value.text_ = number;
      return value;
    }
    return PyJson::real(to_double(number));
  }

  static double to_double(std::string_view number) {
    double value = 0;
    const auto result = std::from_chars(number.data(), number.data() + number.size(), value);
    if (result.ec != std::errc::result_out_of_range) return value;
    // from_chars does not say on which side: the decimal exponent of the first significant digit
    // does.
    const bool negative = number.front() == '-';
    if (negative) number.remove_prefix(1);
    const size_t e = std::min(number.find_first_of("eE"), number.size());
    const std::string_view mantissa = number.substr(0, e);
    const size_t point = std::min(mantissa.find('.'), mantissa.size());
    const size_t significant = mantissa.find_first_of("123456789");
    const double magnitude = static_cast<double>(point) - static_cast<double>(significant);
    const bool tiny = e + 1 < number.size() && number[e + 1] == '-';
    double exponent = 0;  // may itself be huge: collected as a double
    for (const char c : number.substr(e)) {
      if (is_digit(c)) exponent = exponent * 10 + (c - '0');
    }
    const bool overflow = magnitude + (tiny ? -exponent : exponent) > 0;
    const double limit = overflow ? std::numeric_limits<double>::infinity() : 0.0;
    return negative ? -limit : limit;
  }

  std::string read_string() {
    const size_t start = pos_++;
    std::string out;
    for (;;) {
      size_t end = pos_;
      while (end < text_.size() && text_[end] != '"' && text_[end] != '\\' &&
             static_cast<uint8_t>(text_[end]) >= 0x20)
        ++end;
      out.append(text_.substr(pos_, end - pos_));
      pos_ = end;
      if (pos_ == text_.size()) fail(start, "unterminated string starting");
      if (text_[pos_] == '"') {
        ++pos_;
        return out;
      }
      if (text_[pos_] != '\\') fail(pos_, "control character in a string");
      ++pos_;
      read_escape(out, start);
    }
  }

  void read_escape(std::string& out, size_t start) {
    if (pos_ == text_.size()) fail(start, "unterminated string starting");
    const char c = text_[pos_++];
    constexpr std::string_view kNames = "\"\\/bfnrt";
    constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
    if (const size_t known = kNames.find(c); known != std::string_view::npos) {
      out += kValues[known];
      return;
    }
    if (c != 'u') fail(pos_ - 2, "invalid escape");
    char32_t code = read_hex();
    if (code >= 0xD800 && code < 0xDC00 && text_.substr(pos_, 2) == "\\u") {
      const size_t before = pos_;
      pos_ += 2;
      const char32_t low = read_hex();
      if (low >= 0xDC00 && low < 0xE000) {
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
      } else {
        pos_ = before;
      }
    }
    append_utf8(out, code);
  }

  char32_t read_hex() {
    uint32_t code = 0;
    const std::string_view digits = text_.substr(pos_, 4);
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() < 4 || result.ec != std::errc() || result.ptr != digits.data() + 4) {
      fail(pos_, "invalid \\u escape");
    }
    pos_ += 4;
    return code;
  }

  PyJson read_array(int depth) {
    ++pos_;
    PyJson value = PyJson::array();
    skip_space();
    if (accept("]")) return value;
    for (;;) {
      value.items_.push_back(read_value(depth + 1));
      skip_space();
      if (accept("]")) return value;
      if (!accept(",")) fail(pos_, "expected ',' or ']'");
      skip_space();
    }
  }

  PyJson read_object(int depth) {
    ++pos_;
    PyJson value = PyJson::object();
    std::unordered_map<std::string, size_t> places;
    skip_space();
    if (accept("}")) return value;
    for (;;) {
      if (peek() != '"') fail(pos_, "expected a key in double quotes");
      const size_t start = pos_;
      std::string key = read_string();
      if (once_ && (places.empty() ? value.find(key) != nullptr : places.contains(key)))
        fail(start, concat("key ", quote_json(key.substr(0, 100)), " comes again"));
      skip_space();
      if (!accept(":")) fail(pos_, "expected ':'");
      skip_space();
      add_member(value, places, std::move(key), read_value(depth + 1));
      skip_space();
      if (accept("}")) return value;
      if (!accept(",")) fail(pos_, "expected ',' or '}'");
      skip_space();
    }
  }

  /// A duplicate key keeps its first place and takes the last value, as a dict does.
  static void add_member(PyJson& object,
                         std::unordered_map<std::string, size_t>& places,
                         std::string key,
                         PyJson value) {
    std::vector<PyJson::Member>& members = object.members_;
    if (members.size() < kManyMembers) return object.set(key, std::move(value));
    if (places.empty()) {
      for (size_t i = 0; i < members.size(); ++i) places.emplace(members[i].first, i);
    }
    const auto [place, added] = places.try_emplace(key, members.size());
    if (added) {
      members.emplace_back(std::move(key), std::move(value));
    } else {
      members[place->second].second = std::move(value);
    }
  }

  std::string_view text_;
  std::string_view name_;
  bool once_;
  size_t pos_ = 0;
};

PyJson PyJson::boolean(bool value) {
  PyJson json;
  json.kind_ = Kind::kBool;
  json.bool_ = value;
  return json;
}

PyJson PyJson::integer(int64_t value) {
  PyJson json;
  json.kind_ = Kind::kInteger;
  json.text_ = std::to_string(value);
  return json;
}

PyJson PyJson::real(double value) {
  PyJson json;
  json.kind_ = Kind::kFloat;
  json.real_ = value;
  return json;
}

PyJson PyJson::string(std::string value) {
  PyJson json;
  json.kind_ = Kind::kString;
  json.text_ = std::move(value);
  return json;
}

PyJson PyJson::array(std::vector<PyJson> items) {
  PyJson json;
  json.kind_ = Kind::kArray;
  json.items_ = std::move(items);
  return json;
}

PyJson PyJson::object(std::vector<Member> members) {
  PyJson json;
  json.kind_ = Kind::kObject;
  json.members_ = std::move(members);
  return json;
}

PyJson PyJson::parse(std::string_view text, std::string_view name, Keys keys) {
  return PyJsonReader(text, name, keys).read();
}

const char* PyJson::kind_name() const {
  constexpr const char* kNames[] = {"null",     "a boolean", "an integer", "a float",
                                    "a string", "a list",    "an object"};
  return kNames[static_cast<size_t>(kind_)];
}

bool PyJson::truthy() const {
  switch (kind_) {
    case Kind::kNull:
      return false;
    case Kind::kBool:
      return bool_;
    case Kind::kInteger:
      return text_ != "0";
    case Kind::kFloat:
      return real_ != 0;
    case Kind::kString:
      return !text_.empty();
    case Kind::kArray:
      return !items_.empty();
    case Kind::kObject:
      return !members_.empty();
  }
  return false;
}

const PyJson* PyJson::find(std::string_view key) const {
  for (const Member& member : members_) {
    if (member.first == key) return &member.second;
  }
  return nullptr;
}

PyJson* PyJson::find(std::string_view key) {
  return const_cast<PyJson*>(std::as_const(*this).find(key));
}

const PyJson* PyJson::find_set(std::string_view key) const {
  const PyJson* value = find(key);
  return value != nullptr && !value->is_null() ? value : nullptr;
}

void PyJson::set(std::string_view key, PyJson value) {
  for (Member& member : members_) {
    if (member.first == key) {
      member.second = std::move(value);
      return;
    }
  }
  members_.emplace_back(key, std::move(value));
}

void PyJson::erase(std::string_view key) {
  std::erase_if(members_, [&](const Member& member) { return member.first == key; });
}

void PyJson::dump_to(std::string& out) const {
  switch (kind_) {
    case Kind::kNull:
      out += "null";
      break;
    case Kind::kBool:
      out += bool_ ? "true" : "false";
      break;
    case Kind::kInteger:
      out += text_;
      break;
    case Kind::kFloat:
      append_float(out, real_);
      break;
    case Kind::kString:
      append_quoted(out, text_);
      break;
    case Kind::kArray: {
      out += '[';
      const char* separator = "";
      for (const PyJson& item : items_) {
        out += separator;
        item.dump_to(out);
        separator = ", ";
      }
      out += ']';
      break;
    }
    case Kind::kObject: {
      out += '{';
      const char* separator = "";
      for (const auto& [key, value] : members_) {
        out += separator;
        append_quoted(out, key);
        out += ": ";
        value.dump_to(out);
        separator = ", ";
      }
      out += '}';
      break;
    }
  }
}

std::string PyJson::dump() const {
  std::string out;
  dump_to(out);
  return out;
}

std::string quote_json(std::string_view text) {
  std::string out;
  append_quoted(out, text);
  return out;
}

}  // namespace hadal::text
