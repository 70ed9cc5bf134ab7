#include "base/tensor_file.h"

#include <cstring>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal {
namespace {

/// A file out of header text and a number of data bytes; a header length of -1 is the true one.
std::string file_of(const std::string& header, size_t data_bytes, int64_t length = -1) {
  const uint64_t written = length < 0 ? header.size() : static_cast<uint64_t>(length);
  std::string file(8, '\0');
  std::memcpy(file.data(), &written, 8);
  return file + header + std::string(data_bytes, 'x');
}

TensorHeader parse(const std::string& file) {
  return parse_tensor_header(std::as_bytes(std::span(file)), "f.safetensors");
}

std::string error_of(const std::string& file) {
  try {
    parse(file);
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

TEST(TensorFile, WrittenHeaderReadsBack) {
  std::vector<TensorInfo> tensors = {{"w", Dtype::kF32, {2, 3}, 0, 0},
                                     {"empty", Dtype::kBf16, {0, 7}, 0, 0},
                                     {"scalar", Dtype::kF8E8M0, {}, 0, 0},
                                     {"\"odd\"\n", Dtype::kI8, {5}, 0, 0}};
  const std::string header = make_tensor_header(tensors, {{"format", "pt"}, {"k", "v"}});
  EXPECT_EQ(header.size() % 64, 0u);
  EXPECT_EQ(tensors[0].begin, static_cast<int64_t>(header.size()));
  const TensorHeader read = parse(header + std::string(30, 'x'));
  EXPECT_EQ(read.metadata.at("format"), "pt");
  EXPECT_EQ(read.metadata.at("k"), "v");
  EXPECT_EQ(read.tensors, tensors);
}

TEST(TensorFile, NoTensorsIsAFile) {
  std::vector<TensorInfo> none;
  EXPECT_TRUE(parse(make_tensor_header(none, {})).tensors.empty());
}

TEST(TensorFile, EveryPrefixOfAFileIsAnError) {
  std::vector<TensorInfo> tensors = {{"a", Dtype::kF32, {2}, 0, 0}, {"b", Dtype::kI8, {3}, 0, 0}};
  const std::string file = make_tensor_header(tensors, {}) + std::string(11, 'x');
  ASSERT_NO_THROW(parse(file));
  for (size_t size = 0; size < file.size(); ++size)
    EXPECT_THROW(parse(file.substr(0, size)), InputError) << size;
  EXPECT_THROW(parse(file + "x"), InputError);
}

TEST(TensorFile, DefectsAreNamed) {
  const auto one = [](const std::string& dtype, const std::string& shape,
                      const std::string& offsets) {
    return R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
           offsets + "}}";
  };
  const struct {
    std::string file, message;
  } cases[] = {
      {"", "truncated"},
      {file_of("{}", 0, INT64_MAX), "absurd"},
      {file_of("{}", 0, 100), "truncated: the header has 100"},
      {file_of("[]", 0), "expected an object"},
      {file_of("{", 0), "not valid JSON"},
      {file_of(one("F32", "[1]", "[0,4]"), 3), "a: data_offsets [0, 4] lie outside the 3 bytes"},
      {file_of(one("F32", "[1]", "[4,0]"), 4), "lie outside"},
      {file_of(one("F32", "[1]", "[-4,0]"), 4), "a.data_offsets[0]: expected an integer from 0"},
      {file_of(one("F32", "[1]", "[0]"), 4), "data_offsets has 1 entries"},
      {file_of(one("F32", "[2]", "[0,4]"), 4), "takes 8 bytes, data_offsets hold 4"},
      {file_of(one("F32", "[-1]", "[0,4]"), 4), "a.shape[0]"},
      {file_of(one("F32", "[4294967296,4294967296]", "[0,4]"), 4), "more elements than"},
      {file_of(one("F7", "[1]", "[0,4]"), 4), "unknown dtype \"F7\""},
      {file_of(one("F32", "[1.5]", "[0,4]"), 4), "expected an integer"},
      {file_of(R"({"":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1), "empty name"},
      {file_of(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1],"x":1}})", 1),
       "unknown key a.x"},
      {file_of(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1), "a.dtype: required"},
      {file_of(R"({"__metadata__":{"a":1}})", 0), "__metadata__.a: expected a string"},
      {file_of(R"({"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]},)"
               R"("b":{"dtype":"I8","shape":[2],"data_offsets":[1,3]}})",
               3),
       "b overlaps the tensor before it by 1"},
      {file_of(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},)"
               R"("b":{"dtype":"I8","shape":[1],"data_offsets":[2,3]}})",
               3),
       "1 bytes before tensor b"},
      {file_of(one("I8", "[1]", "[0,1]"), 2), "1 bytes after the last"},
      {file_of(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},)"
               R"("a":{"dtype":"I8","shape":[1],"data_offsets":[1,2]}})",
               2),
       "duplicate key"},
  };
  for (const auto& c : cases)
    EXPECT_NE(error_of(c.file).find(c.message), std::string::npos) << error_of(c.file);
}

TEST(TensorFile, MisalignedDataAreReportedAndNotRefused) {
  for (int pad = 0; pad < 4; ++pad) {
    const TensorHeader header = parse(file_of(
        R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})" + std::string(pad, ' '), 4));
    EXPECT_EQ(header.tensors[0].is_aligned(), header.tensors[0].begin % 4 == 0);
  }
}

TEST(TensorFile, EveryFlippedByteIsReadOrRefused) {
  std::vector<TensorInfo> tensors = {{"ab", Dtype::kF32, {2, 1}, 0, 0},
                                     {"c", Dtype::kI8, {3}, 0, 0}};
  const std::string file = make_tensor_header(tensors, {{"k", "v"}}) + std::string(11, 'x');
  int refused = 0;
  for (size_t at = 0; at < file.size(); ++at)
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = file;
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << bit));
      try {
        const TensorHeader header = parse(damaged);
        EXPECT_LE(header.tensors.size(), 2u);
      } catch (const InputError&) {
        ++refused;
      }
    }
  EXPECT_GT(refused, 500);
}

TEST(TensorFile, HeaderWriterRefusesWhatWouldNotReadBack) {
  std::vector<TensorInfo> twice = {{"a", Dtype::kI8, {1}, 0, 0}, {"a", Dtype::kI8, {1}, 0, 0}};
  EXPECT_THROW(make_tensor_header(twice, {}), Error);
  std::vector<TensorInfo> misaligned = {{"a", Dtype::kI8, {1}, 0, 0},
                                        {"b", Dtype::kF32, {1}, 0, 0}};
  EXPECT_THROW(make_tensor_header(misaligned, {}), Error);
}

}  // namespace
}  // namespace hadal
