#include "text/tokenizer_cut.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "base/check.h"
#include "text/bpe.h"
#include "text/chat_tokens.h"
#include "text/official_splitter.h"
#include "text/pre_tokenizer.h"
#include "text/python_json.h"
#include "text/tokenizer_file.h"
#include "text/utf8.h"

namespace hadal::text {
namespace {

/// Lets the map be asked with views.
struct PieceHash {
  using is_transparent = void;
  size_t operator()(std::string_view piece) const { return std::hash<std::string_view>()(piece); }
};

}  // namespace

struct TokenizerCutter::Impl {
  Impl(std::string_view text, std::string_view source_name)
      : source(PyJson::parse(text, source_name)),
        name(source_name),
        file(parse_tokenizer_file(text, source_name)),
        pre_tokenizer(file.patterns),
        bpe(file.byte_ids, file.merges) {}

  void count(std::string_view piece) {
    const auto found = pieces.find(piece);
    if (found != pieces.end()) {
      ++found->second;
    } else {
      pieces.emplace(piece, 1);
    }
  }

  /// The source's file with other lists, one entry a line.
  std::string write(const std::vector<std::string>& vocab,
                    const std::vector<std::string>& merges,
                    const std::vector<std::string>& tokens) const {
    const auto list = [](char open, const std::vector<std::string>& entries, char close) {
      std::string out(1, open);
      const char* separator = "\n";
      for (const std::string& entry : entries) {
        out += separator;
        out += entry;
        separator = ",\n";
      }
      return out + "\n" + close;
    };
    std::vector<std::string> members;
    for (const auto& [key, value] : source.members()) {
      std::string text;
      if (key == "added_tokens") {
        text = list('[', tokens, ']');
      } else if (key != "model") {
        text = value.dump();
      } else {
        std::vector<std::string> parts;
        for (const auto& [part, content] : value.members()) {
          if (part == "vocab") {
            parts.push_back(concat("\"vocab\": ", list('{', vocab, '}')));
          } else if (part == "merges") {
            parts.push_back(concat("\"merges\": ", list('[', merges, ']')));
          } else {
            parts.push_back(concat(quote_json(part), ": ", content.dump()));
          }
        }
        text = list('{', parts, '}');
      }
      members.push_back(concat(quote_json(key), ": ", text));
    }
    return list('{', members, '}') + "\n";
  }

  PyJson source;
  std::string name;
  TokenizerFile file;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  std::unordered_map<std::string, int64_t, PieceHash, std::equal_to<>> pieces;
};

std::vector<std::string> chat_token_names() { return {kChatTokens.begin(), kChatTokens.end()}; }

TokenizerCutter::TokenizerCutter(std::string_view json, std::string_view name)
    : impl_(std::make_unique<Impl>(json, name)) {}
TokenizerCutter::~TokenizerCutter() = default;

void TokenizerCutter::add(std::string_view text) {
  const std::string repaired =
      valid_utf8_prefix(text) == text.size() ? std::string() : repair_utf8(text);
  if (!repaired.empty()) text = repaired;
  if (!impl_->pre_tokenizer.is_official()) {
    for (const std::string_view piece : impl_->pre_tokenizer.split(text)) impl_->count(piece);
    return;
  }
  OfficialSplitter splitter(text);
  std::string_view piece;
  while (splitter.next(piece)) impl_->count(piece);
}

std::vector<int64_t> TokenizerCutter::merge_counts() const {
  std::vector<int64_t> counts(impl_->file.merges.size(), 0);
  std::vector<int32_t> ids;
  std::vector<int32_t> applied;
  for (const auto& [piece, times] : impl_->pieces) {
    ids.clear();
    applied.clear();
    impl_->bpe.encode(piece, ids, &applied);
    for (const int32_t rank : applied) counts[static_cast<size_t>(rank)] += times;
  }
  return counts;
}

std::string TokenizerCutter::cut(const TokenizerCutOptions& options) const {
  const TokenizerFile& file = impl_->file;
  const int32_t first_byte = *std::min_element(file.byte_ids.begin(), file.byte_ids.end());
  std::vector<AddedToken> added;
  for (const AddedToken& token : file.added) {
    if (token.id < first_byte) added.push_back(token);
  }
  const size_t leading = added.size();
  for (const std::string& content : options.added_tokens) {
    const auto found =
        std::find_if(file.added.begin(), file.added.end(),
                     [&](const AddedToken& token) { return token.content == content; });
    HADAL_INPUT_CHECK(found != file.added.end(), impl_->name, ": has no added token '", content,
                      "'");
    added.push_back(*found);
  }
  const int64_t room = options.vocab_size - static_cast<int64_t>(256 + added.size());
  HADAL_INPUT_CHECK(room >= 0, "tokenizer-cut: a vocabulary of ", options.vocab_size,
                    " cannot hold 256 bytes and ", added.size(), " added tokens");

  std::vector<std::string> vocab;
  std::vector<std::string> merges;
  std::vector<std::string> tokens;
  const auto name_token = [&](const std::string& token) {
    vocab.push_back(concat(quote_json(token), ": ", vocab.size()));
  };
  // Leading added tokens stand in the vocabulary, too, as in the source: other readers number by
  // it.
  for (size_t i = 0; i < leading; ++i) name_token(added[i].content);
  std::vector<int32_t> bytes(file.byte_ids.begin(), file.byte_ids.end());
  std::sort(bytes.begin(), bytes.end());
  std::vector<bool> kept(file.names.size(), false);
  const auto keep = [&](int32_t id) {
    if (kept[static_cast<size_t>(id)]) return;  // two merges may make one token
    kept[static_cast<size_t>(id)] = true;
    name_token(file.names[static_cast<size_t>(id)]);
  };
  for (const int32_t id : bytes) keep(id);
  const std::vector<int64_t> counts = merge_counts();
  const size_t limit = vocab.size() + static_cast<size_t>(room);
  for (size_t rank = 0; rank < counts.size() && vocab.size() < limit; ++rank) {
    const Merge& merge = file.merges[rank];
    const bool parts =
        kept[static_cast<size_t>(merge.left)] && kept[static_cast<size_t>(merge.right)];
    // Counts alone keep the parts of what they keep, except with a minimum of 0.
    if (counts[rank] < options.min_count || !parts) continue;
    merges.push_back(quote_json(concat(file.names[static_cast<size_t>(merge.left)], ' ',
                                       file.names[static_cast<size_t>(merge.right)])));
    keep(merge.result);
  }
  HADAL_INPUT_CHECK(vocab.size() == limit, "tokenizer-cut: only ", merges.size(), " merges occur ",
                    options.min_count, " times, a vocabulary of ", options.vocab_size, " needs ",
                    room, "; give more text or lower one of the two");
  for (size_t i = 0; i < added.size(); ++i) {
    const size_t id = i < leading ? i : limit + (i - leading);
    tokens.push_back(
        concat("{\"id\": ", id, ", \"content\": ", quote_json(added[i].content),
               ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": ",
               added[i].normalized ? "true" : "false",
               ", \"special\": ", added[i].special ? "true" : "false", "}"));
  }
  return impl_->write(vocab, merges, tokens);
}

std::string cut_tokenizer(std::string_view json,
                          std::string_view name,
                          const TokenizerCutOptions& options,
                          const std::function<bool(std::string& text)>& next_text) {
  TokenizerCutter cutter(json, name);
  std::string text;
  while (next_text(text)) cutter.add(text);
  return cutter.cut(options);
}

}  // namespace hadal::text
