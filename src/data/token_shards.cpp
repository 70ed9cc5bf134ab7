#include "data/token_shards.h"

#include <filesystem>
#include <limits>

#include <fmt/format.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/join.h"
#include "base/log.h"
#include "base/parallel.h"
#include "base/tensor_file.h"
#include "data/conversation.h"
#include "data/text_source.h"
#include "text/chat_tokens.h"
#include "text/utf8.h"

namespace hadal::data {
namespace {

constexpr std::string_view kFormat = "hadal tokens 1";

uint64_t fingerprint_of(const SourceSpec& spec, std::string_view tokenizer_json) {
  std::string text = concat(kFormat, '\n', fnv1a64(tokenizer_json), '\n',
                            static_cast<int>(spec.kind), '\n', spec.field, '\n');
  if (const TextTransforms& t = spec.transforms; t.any())
    text += concat("fim ", t.fim_rate, " split ", t.split_rate, " seed ", t.seed, '\n');
  for (const std::string& path : spec.files) {
    std::error_code error;
    const auto size = std::filesystem::file_size(path, error);
    HADAL_INPUT_CHECK(!error, path, ": ", error.message());
    // The folder does not count: a cache moves with its files.
    text += concat(std::filesystem::path(path).filename().string(), ' ', size, '\n');
  }
  return fnv1a64(text);
}

void warn_if_older(const std::string& path, const SourceSpec& spec) {
  std::error_code ignored;
  const auto built = std::filesystem::last_write_time(path, ignored);
  for (const std::string& file : spec.files) {
    if (std::filesystem::last_write_time(file, ignored) <= built) continue;
    log::warn("data", file, " is newer than ", path, ": delete the latter if the text changed");
  }
}

/// Encodes documents in batches on all threads and keeps their order. Memory holds a batch, and
/// where documents begin; tokens go to the disk.
class Encoder {
 public:
  Encoder(const SourceSpec& spec, const text::Tokenizer& tokenizer, const std::string& folder)
      : tokens(folder),
        scored(folder),
        spec_(spec),
        tokenizer_(tokenizer),
        documents_(tokenizer, spec.transforms) {}

  void add(std::string text, std::string origin) {
    holds_text |= text.find_first_not_of(" \t\r\n") != std::string::npos;
    pending_bytes_ += text.size();
    text_bytes += static_cast<int64_t>(text.size());
    pending_.push_back({std::move(text), std::move(origin), next_number_++});
    if (pending_bytes_ >= kBatchBytes) flush();
  }

  void flush() {
    std::vector<MarkedTokens> results(pending_.size());
    parallel_for(static_cast<int64_t>(pending_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        results[static_cast<size_t>(i)] = encode(pending_[static_cast<size_t>(i)]);
      }
    });
    for (const MarkedTokens& result : results) {
      tokens.write(std::as_bytes(std::span(result.ids)));
      scored.write(std::as_bytes(std::span(result.scored)));
      documents.push_back(documents.back() + std::ssize(result.ids));
    }
    pending_.clear();
    pending_bytes_ = 0;
  }

  int64_t num_tokens() const { return documents.back(); }

  SpillFile tokens, scored;
  std::vector<int64_t> documents = {0};
  int64_t text_bytes = 0;
  bool holds_text = false;

 private:
  static constexpr size_t kBatchBytes = size_t{64} << 20;
  struct Pending {
    std::string text, origin;
    int64_t number = 0;
  };

  MarkedTokens encode(const Pending& document) const {
    if (spec_.kind == SourceKind::kConversation) {
      return encode_conversation(document.text, document.origin, tokenizer_);
    }
    const size_t valid = text::valid_utf8_prefix(document.text);
    HADAL_INPUT_CHECK(valid == document.text.size(), document.origin, ": no UTF-8 at byte ", valid,
                      ": a source is text");
    return {.ids = documents_.encode(document.text, document.number), .scored = {}};
  }

  const SourceSpec& spec_;
  const text::Tokenizer& tokenizer_;
  DocumentEncoder documents_;
  int64_t next_number_ = 0;
  std::vector<Pending> pending_;
  size_t pending_bytes_ = 0;
};

std::span<const std::byte> bytes_of(const auto& values) { return std::as_bytes(std::span(values)); }

void write_tokens(const std::string& path, const Encoder& encoded, uint64_t fingerprint) {
  std::vector<TensorInfo> tensors = {
      {.name = "documents",
       .dtype = Dtype::kI64,
       .shape = {static_cast<int64_t>(encoded.documents.size())}},
      {.name = "tokens", .dtype = Dtype::kI32, .shape = {encoded.num_tokens()}}};
  if (encoded.scored.size() > 0)
    tensors.push_back({.name = "scored", .dtype = Dtype::kU8, .shape = {encoded.scored.size()}});
  const std::string header =
      make_tensor_header(tensors, {{"format", std::string(kFormat)},
                                   {"fingerprint", fmt::format("{:016x}", fingerprint)},
                                   {"text_bytes", std::to_string(encoded.text_bytes)}});
  AtomicFile file(path);
  file.write(header);
  file.write(bytes_of(encoded.documents));
  encoded.tokens.append_to(file);
  encoded.scored.append_to(file);
  file.commit();
}

template <typename T>
std::span<const T> view(const MappedFile& file, const TensorInfo& info, Dtype dtype) {
  HADAL_INPUT_CHECK(info.dtype == dtype && info.shape.size() == 1 && info.is_aligned(), file.path(),
                    ": ", info.name, " is ", dtype_name(info.dtype), " ", shape_text(info.shape),
                    ", expected one dimension of ", dtype_name(dtype));
  return {reinterpret_cast<const T*>(file.bytes().data() + info.begin),
          static_cast<size_t>(info.num_elements())};
}

}  // namespace

TokenShards::TokenShards(const std::string& path) : file_(path) {
  const TensorHeader header = parse_tensor_header(file_.bytes(), path);
  const auto value = [&](const char* key) {
    const auto found = header.metadata.find(key);
    HADAL_INPUT_CHECK(found != header.metadata.end(), path, ": no metadata ", key);
    return found->second;
  };
  HADAL_INPUT_CHECK(value("format") == kFormat, path, ": format ", value("format"), ", expected ",
                    kFormat);
  try {
    fingerprint_ = std::stoull(value("fingerprint"), nullptr, 16);
    text_bytes_ = std::stoll(value("text_bytes"));
  } catch (const std::logic_error&) {
    throw InputError(concat(path, ": metadata fingerprint or text_bytes is no number"));
  }
  for (const TensorInfo& info : header.tensors) {
    if (info.name == "tokens") tokens_ = view<int32_t>(file_, info, Dtype::kI32);
    if (info.name == "documents") documents_ = view<int64_t>(file_, info, Dtype::kI64);
    if (info.name == "scored") scored_ = view<uint8_t>(file_, info, Dtype::kU8);
  }
  HADAL_INPUT_CHECK(!documents_.empty() && documents_.front() == 0 &&
                        documents_.back() == num_tokens() &&
                        (scored_.empty() || scored_.size() == tokens_.size()),
                    path, ": documents, tokens and marks do not fit each other");
  for (size_t i = 1; i < documents_.size(); ++i) {
    HADAL_INPUT_CHECK(documents_[i - 1] <= documents_[i], path, ": document ", i - 1,
                      " ends before it begins");
  }
}

std::span<const int32_t> TokenShards::document(int64_t index) const {
  const auto i = static_cast<size_t>(index);
  return tokens_.subspan(static_cast<size_t>(documents_[i]),
                         static_cast<size_t>(documents_[i + 1] - documents_[i]));
}

std::span<const uint8_t> TokenShards::scored(int64_t index) const {
  if (scored_.empty()) return {};
  const auto i = static_cast<size_t>(index);
  return scored_.subspan(static_cast<size_t>(documents_[i]),
                         static_cast<size_t>(documents_[i + 1] - documents_[i]));
}

std::string build_token_shards(const SourceSpec& spec,
                               const text::Tokenizer& tokenizer,
                               std::string_view tokenizer_json,
                               const std::string& folder) {
  const uint64_t fingerprint = fingerprint_of(spec, tokenizer_json);
  std::filesystem::create_directories(folder);
  const std::string path = fmt::format("{}/{}-{:016x}.tokens", folder, spec.name, fingerprint);
  if (std::filesystem::exists(path)) {
    warn_if_older(path, spec);
    return path;
  }
  Encoder encoder(spec, tokenizer, folder);
  for (const std::string& file : spec.files) {
    log::info("data", "tokenising ", file);
    if (spec.kind == SourceKind::kConversation) {
      for_each_line(file, [&](const std::string& line, int64_t number) {
        encoder.add(line, concat(file, ": line ", number));
      });
    } else {
      for_each_document(file, spec.field,
                        [&](std::string text) { encoder.add(std::move(text), file); });
    }
  }
  encoder.flush();
  HADAL_INPUT_CHECK(encoder.holds_text, "source ", spec.name, ": its files hold no text (",
                    join(spec.files), ")");
  write_tokens(path, encoder, fingerprint);
  log::info("data", spec.name, ": ", encoder.documents.size() - 1, " documents, ",
            encoder.num_tokens(), " tokens, ", encoder.text_bytes, " bytes");
  return path;
}

}  // namespace hadal::data
