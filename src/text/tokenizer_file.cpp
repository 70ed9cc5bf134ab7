#include "text/tokenizer_file.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <unordered_map>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "text/utf8.h"

namespace hadal::text {
namespace {

using Json = nlohmann::json;

// Far above any vocabulary; a wild id must not size an array.
constexpr int64_t kMaxVocabulary = 1 << 24;

/// Byte of each code point of the alphabet, -1 for others; all are below 0x144.
const std::array<int, 0x144>& alphabet_bytes() {
  static const std::array<int, 0x144> table = [] {
    std::array<int, 0x144> bytes;
    bytes.fill(-1);
    for (int byte = 0; byte < 256; ++byte) {
      bytes[decode_utf8(byte_alphabet()[static_cast<size_t>(byte)], 0).code_point] = byte;
    }
    return bytes;
  }();
  return table;
}

/// The bytes a token of the byte alphabet stands for; nothing if it holds another character.
std::optional<std::string> bytes_of(std::string_view token) {
  std::string bytes;
  for (size_t pos = 0; pos < token.size();) {
    const Utf8Char c = decode_utf8(token, pos);
    if (c.code_point >= alphabet_bytes().size()) return std::nullopt;
    const int byte = alphabet_bytes()[c.code_point];
    if (byte < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte));
    pos += c.length;
  }
  return bytes;
}

/// One reading of one file; carries its name into the messages.
class Reader {
 public:
  explicit Reader(std::string_view name) : name_(name) {}

  TokenizerFile read(std::string_view text);

 private:
  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    throw InputError(concat(name_, ": ", parts...));
  }
  template <typename... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (!condition) [[unlikely]]
      fail(parts...);
  }

  const Json& member(const Json& object, const char* key, const char* where) const {
    require(object.is_object(), where, " is ", object.type_name(), ", expected an object");
    const auto found = object.find(key);
    require(found != object.end(), where, " has no '", key, "'");
    return *found;
  }
  std::string string_member(const Json& object, const char* key, const char* where) const {
    const Json& value = member(object, key, where);
    require(value.is_string(), where, ".", key, " is ", value.type_name(), ", expected a string");
    return value.get<std::string>();
  }
  bool flag(const Json& object, const char* key, bool fallback, const char* where) const {
    const auto found = object.find(key);
    if (found == object.end() || found->is_null()) return fallback;
    require(found->is_boolean(), where, ".", key, " is ", found->type_name(),
            ", expected true or false");
    return found->get<bool>();
  }
  int32_t id_of(const Json& value, std::string_view token) const {
    require(value.is_number_integer(), "id of '", token, "' is ", value.type_name(),
            ", expected an integer");
    const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() < kMaxVocabulary
                                                 : value.get<int64_t>() >= 0;
    require(fits, "id of '", token, "' is ", value.dump(), ", expected 0 to ", kMaxVocabulary - 1);
    return value.get<int32_t>();
  }
  /// Makes room for an id and says whether it is still free.
  bool claim(int32_t id) {
    if (static_cast<size_t>(id) >= taken_.size()) {
      taken_.resize(static_cast<size_t>(id) + 1, 0);
      file_.names.resize(taken_.size());
      file_.bytes.resize(taken_.size());
    }
    if (taken_[static_cast<size_t>(id)] != 0) return false;
    taken_[static_cast<size_t>(id)] = 1;
    return true;
  }

  void check_stages(const Json& root) const;
  void read_patterns(const Json& pre_tokenizer);
  void read_vocabulary(const Json& model);
  void read_added(const Json& root);
  void read_bytes();
  void read_merges(const Json& model);

  std::string name_;
  TokenizerFile file_;
  std::vector<char> taken_;
  std::unordered_map<std::string, int32_t> vocabulary_;
};

void Reader::check_stages(const Json& root) const {
  for (const char* key : {"truncation", "padding"}) {
    const auto found = root.find(key);
    require(found == root.end() || found->is_null(), key, " is set; it is not supported");
  }
  if (const auto found = root.find("normalizer"); found != root.end() && !found->is_null()) {
    const std::string type = string_member(*found, "type", "normalizer");
    const bool empty = type == "Sequence" && found->contains("normalizers") &&
                       (*found)["normalizers"].is_array() && (*found)["normalizers"].empty();
    require(empty, "normalizer '", type, "' is not supported; expected none");
  }
  for (const char* key : {"decoder", "post_processor"}) {
    const auto found = root.find(key);
    if (found == root.end() || found->is_null()) continue;
    const std::string type = string_member(*found, "type", key);
    require(type == "ByteLevel", key, " '", type, "' is not supported; expected ByteLevel");
  }
}

void Reader::read_patterns(const Json& pre_tokenizer) {
  require(string_member(pre_tokenizer, "type", "pre_tokenizer") == "Sequence", "pre_tokenizer '",
          string_member(pre_tokenizer, "type", "pre_tokenizer"),
          "' is not supported; expected a Sequence of Split and ByteLevel");
  const Json& stages = member(pre_tokenizer, "pretokenizers", "pre_tokenizer");
  require(stages.is_array() && !stages.empty(),
          "pre_tokenizer.pretokenizers: expected a list of stages");
  for (size_t i = 0; i < stages.size(); ++i) {
    const Json& stage = stages[i];
    const std::string where = concat("pre_tokenizer stage ", i);
    const std::string type = string_member(stage, "type", where.c_str());
    if (i + 1 == stages.size()) {
      require(type == "ByteLevel", where, " is '", type, "'; the last one must be ByteLevel");
      require(!flag(stage, "add_prefix_space", true, where.c_str()), where,
              ": add_prefix_space is not supported");
      require(!flag(stage, "use_regex", true, where.c_str()), where,
              ": use_regex is not supported");
      continue;
    }
    require(type == "Split", where, " is '", type, "'; expected Split");
    const std::string behavior = string_member(stage, "behavior", where.c_str());
    require(behavior == "Isolated", where, ": behavior '", behavior,
            "' is not supported; expected Isolated");
    require(!flag(stage, "invert", false, where.c_str()), where, ": invert is not supported");
    const Json& pattern = member(stage, "pattern", where.c_str());
    file_.patterns.push_back(string_member(pattern, "Regex", concat(where, ".pattern").c_str()));
  }
}

void Reader::read_vocabulary(const Json& model) {
  const Json& vocab = member(model, "vocab", "model");
  require(vocab.is_object(), "model.vocab is ", vocab.type_name(), ", expected an object");
  vocabulary_.reserve(vocab.size());
  for (const auto& [token, value] : vocab.items()) {
    const int32_t id = id_of(value, token);
    require(claim(id), "id ", id, " belongs to both '", file_.names[static_cast<size_t>(id)],
            "' and '", token, "'");
    file_.names[static_cast<size_t>(id)] = token;
    vocabulary_.emplace(token, id);
  }
}

void Reader::read_added(const Json& root) {
  const auto list = root.find("added_tokens");
  if (list == root.end() || list->is_null()) return;
  require(list->is_array(), "added_tokens is ", list->type_name(), ", expected a list");
  std::unordered_map<std::string, int32_t> seen;
  std::vector<char> added(taken_.size(), 0);
  for (const Json& entry : *list) {
    AddedToken token;
    token.content = string_member(entry, "content", "added_tokens entry");
    require(!token.content.empty(), "added_tokens: an entry with empty content");
    token.id = id_of(member(entry, "id", "added_tokens entry"), token.content);
    const std::string where = concat("added token '", token.content, "'");
    for (const char* key : {"single_word", "lstrip", "rstrip"}) {
      require(!flag(entry, key, false, where.c_str()), where, ": ", key, " is not supported");
    }
    token.special = flag(entry, "special", false, where.c_str());
    token.normalized = flag(entry, "normalized", !token.special, where.c_str());
    require(seen.emplace(token.content, token.id).second, where, " appears twice");
    const auto in_model = vocabulary_.find(token.content);
    require(in_model == vocabulary_.end() || in_model->second == token.id, where, " has id ",
            token.id, " but model.vocab says ",
            in_model == vocabulary_.end() ? 0 : in_model->second);
    const auto index = static_cast<size_t>(token.id);
    if (!claim(token.id)) {
      require(file_.names[index] == token.content, "id ", token.id, " belongs to both '",
              file_.names[index], "' and '", token.content, "'");
    }
    file_.names[index] = token.content;
    file_.bytes[index] = token.content;
    file_.added.push_back(std::move(token));
  }
  std::sort(file_.added.begin(), file_.added.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
}

void Reader::read_bytes() {
  for (const auto& [token, id] : vocabulary_) {
    std::string& bytes = file_.bytes[static_cast<size_t>(id)];
    if (!bytes.empty()) continue;  // an added token stands for its content
    const std::optional<std::string> decoded = bytes_of(token);
    require(decoded.has_value() && !decoded->empty(), "token '", token, "' (id ", id,
            ") is not written in the byte alphabet");
    bytes = *decoded;
  }
  for (size_t id = 0; id < taken_.size(); ++id) {
    require(taken_[id] != 0, "id ", id, " has no token (ids go up to ", taken_.size() - 1, ")");
  }
  for (size_t byte = 0; byte < 256; ++byte) {
    const auto found = vocabulary_.find(byte_alphabet()[byte]);
    require(found != vocabulary_.end(), "model.vocab has no token for byte ", byte);
    file_.byte_ids[byte] = found->second;
  }
}

void Reader::read_merges(const Json& model) {
  const Json& merges = member(model, "merges", "model");
  require(merges.is_array(), "model.merges is ", merges.type_name(), ", expected a list");
  file_.merges.reserve(merges.size());
  const auto known = [&](const std::string& token, size_t rank) {
    const auto found = vocabulary_.find(token);
    require(found != vocabulary_.end(), "merge ", rank, " refers to '", token,
            "', which model.vocab lacks");
    return found->second;
  };
  size_t guess = 0;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Json& entry = merges[rank];
    std::string left;
    std::string right;
    if (entry.is_string()) {
      const auto& both = entry.get_ref<const std::string&>();
      const size_t space = both.find(' ');
      require(space != std::string::npos && both.find(' ', space + 1) == std::string::npos,
              "merge ", rank, " is '", both, "', expected two tokens with a space between");
      left = both.substr(0, space);
      right = both.substr(space + 1);
    } else {
      require(entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string(),
              "merge ", rank, " is ", entry.dump(), ", expected two tokens");
      left = entry[0].get<std::string>();
      right = entry[1].get<std::string>();
    }
    const int32_t left_id = known(left, rank);
    const int32_t right_id = known(right, rank);
    left += right;
    // Results mostly have ascending ids: one comparison instead of a lookup among all tokens.
    const bool next = guess < file_.names.size() && file_.names[guess] == left;
    const int32_t result = next ? static_cast<int32_t>(guess) : known(left, rank);
    guess = static_cast<size_t>(result) + 1;
    file_.merges.push_back({left_id, right_id, result});
  }
}

TokenizerFile Reader::read(std::string_view text) {
  Json root;
  try {
    root = Json::parse(text);
  } catch (const Json::exception& error) {
    fail("not JSON: ", error.what());
  }
  require(root.is_object(), "is ", root.type_name(), ", expected an object");
  check_stages(root);
  const Json& model = member(root, "model", "the file");
  const std::string type = string_member(model, "type", "model");
  require(type == "BPE", "model.type is '", type, "', expected BPE");
  for (const char* key :
       {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const auto found = model.find(key);
    require(found == model.end() || found->is_null(), "model.", key,
            " is set; it is not supported");
  }
  for (const char* key : {"byte_fallback", "ignore_merges"}) {
    require(!flag(model, key, false, "model"), "model.", key, " is not supported");
  }
  read_patterns(member(root, "pre_tokenizer", "the file"));
  read_vocabulary(model);
  read_merges(model);  // before added tokens, which no merge may name
  read_added(root);
  read_bytes();
  return std::move(file_);
}

}  // namespace

const std::array<std::string, 256>& byte_alphabet() {
  // Printable Latin-1 bytes stand for themselves; the others follow from U+0100 on, in order.
  static const std::array<std::string, 256> alphabet = [] {
    std::array<std::string, 256> letters;
    char32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      append_utf8(letters[byte], printable ? byte : next++);
    }
    return letters;
  }();
  return alphabet;
}

TokenizerFile parse_tokenizer_file(std::string_view json, std::string_view name) {
  return Reader(name).read(json);
}

std::string read_file(const std::string& path) {
  // A folder can be opened, and reading from it throws.
  std::error_code error;
  HADAL_INPUT_CHECK(!std::filesystem::is_directory(path, error), path, ": is a folder");
  std::ifstream in(path, std::ios::binary);
  HADAL_INPUT_CHECK(in.good(), path, ": cannot be opened");
  std::string content{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  HADAL_INPUT_CHECK(!in.bad(), path, ": cannot be read");
  return content;
}

}  // namespace hadal::text
