// JSON as Python's json module reads and writes it, which the chat encoding is defined by
// (chat_encoding.md 4).
//
// The prompt holds re-serialised JSON, so what Python keeps must be kept and what it changes must
// change: integers of any size, floats in repr style (1.50 becomes 1.5, 1e16 becomes 1e+16), the
// order of keys, NaN and Infinity, the last of duplicate keys. General JSON libraries round,
// reorder or refuse some of these; for anything that does not end in a prompt use nlohmann-json. A
// lone surrogate escape becomes U+FFFD, since it has no UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hadal::text {

class PyJson {
 public:
  enum class Kind : uint8_t { kNull, kBool, kInteger, kFloat, kString, kArray, kObject };
  using Member = std::pair<std::string, PyJson>;

  PyJson() = default;
  static PyJson boolean(bool value);
  static PyJson integer(int64_t value);
  static PyJson real(double value);
  static PyJson string(std::string value);
  static PyJson array(std::vector<PyJson> items = {});
  static PyJson object(std::vector<Member> members = {});
  /// Of a braced list, whose parts are moved.
  template <size_t kCount>
  static PyJson array(PyJson (&&items)[kCount]) {
    return array(std::vector<PyJson>(std::make_move_iterator(items),
                                     std::make_move_iterator(items + kCount)));
  }
  template <size_t kCount>
  static PyJson object(Member (&&members)[kCount]) {
    return object(std::vector<Member>(std::make_move_iterator(members),
                                      std::make_move_iterator(members + kCount)));
  }

  /// Reads a text as json.loads does; `name` begins every message. Errors: InputError with the byte
  /// position; nesting deeper than 512 and invalid UTF-8 are errors, too.
  /// With Keys::kOnce a key that comes twice in an object is an error: whoever read the text before
  /// may have taken the other value.
  enum class Keys : uint8_t { kLastWins, kOnce };
  static PyJson parse(std::string_view text, std::string_view name, Keys keys = Keys::kLastWins);

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::kNull; }
  bool is_string() const { return kind_ == Kind::kString; }
  bool is_array() const { return kind_ == Kind::kArray; }
  bool is_object() const { return kind_ == Kind::kObject; }
  /// "a string", "null", ...: for messages.
  const char* kind_name() const;
  /// Python's bool(): false for null, false, 0, "", [] and {}.
  bool truthy() const;

  /// The value of a string; the decimal digits of an integer.
  const std::string& text() const { return text_; }
  const std::vector<PyJson>& items() const { return items_; }
  std::vector<PyJson>& items() { return items_; }
  const std::vector<Member>& members() const { return members_; }
  /// The value of a key, or nullptr; also for values that are no objects.
  const PyJson* find(std::string_view key) const;
  PyJson* find(std::string_view key);
  /// find(), but a key that holds null counts as absent.
  const PyJson* find_set(std::string_view key) const;
  /// Sets a key: in its place if there is one, else at the end.
  void set(std::string_view key, PyJson value);
  void erase(std::string_view key);

  /// json.dumps(ensure_ascii=False): separators ", " and ": ".
  std::string dump() const;
  /// The same behind what `out` holds.
  void dump_to(std::string& out) const;

 private:
  friend class PyJsonReader;

  Kind kind_ = Kind::kNull;
  bool bool_ = false;
  double real_ = 0;
  std::string text_;
  std::vector<PyJson> items_;
  std::vector<Member> members_;
};

/// A string with its quotes, escaped as json.dumps(ensure_ascii=False) does.
std::string quote_json(std::string_view text);

}  // namespace hadal::text
