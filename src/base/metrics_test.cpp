#include "base/metrics.h"

#include <bit>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/event_file.h"
#include "base/file.h"

namespace hadal {
namespace {

/// One scalar of an event file, read back by the letter of both formats.
struct Point {
  std::string tag;
  float value;
  bool operator==(const Point&) const = default;
};
struct EventFile {
  std::map<int64_t, std::vector<Point>> steps;
  std::vector<std::string> versions;
  std::vector<int64_t> starts;  ///< steps at which a session starts
  size_t torn_bytes = 0;        ///< behind the last whole record
};

uint64_t little_endian(std::string_view bytes, size_t count) {
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i)
    value |= uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
  return value;
}

/// CRC-32C bit by bit, from its definition.
uint32_t slow_masked_crc(std::string_view bytes) {
  uint32_t crc = 0xFFFFFFFFu;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int i = 0; i < 8; ++i) crc = (crc & 1u) != 0u ? (crc >> 1) ^ 0x82F63B78u : crc >> 1;
  }
  crc = ~crc;
  return ((crc >> 15) | (crc << 17)) + 0xA282EAD8u;
}

struct Field {
  uint64_t number = 0, wire = 0, integer = 0;
  std::string_view bytes;
};

std::vector<Field> fields_of(std::string_view message) {
  std::vector<Field> fields;
  size_t pos = 0;
  const auto varint = [&] {
    uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      const auto byte = static_cast<unsigned char>(message.at(pos++));
      value |= uint64_t{byte & 127u} << shift;
      if (byte < 128) return value;
    }
  };
  while (pos < message.size()) {
    Field field;
    const uint64_t key = varint();
    field.number = key / 8;
    field.wire = key % 8;
    if (field.wire == 0) {
      field.integer = varint();
    } else {
      const size_t size = field.wire == 1 ? 8 : field.wire == 5 ? 4 : varint();
      field.bytes = message.substr(pos, size);
      EXPECT_EQ(field.bytes.size(), size);
      pos += size;
    }
    fields.push_back(field);
  }
  return fields;
}

void read_event(std::string_view record, EventFile& file) {
  int64_t step = -1;
  for (const Field& field : fields_of(record)) {
    if (field.number == 2) step = static_cast<int64_t>(field.integer);
    if (field.number == 3) file.versions.emplace_back(field.bytes);
    if (field.number == 7) file.starts.push_back(step);
    if (field.number != 5) continue;
    for (const Field& value : fields_of(field.bytes)) {
      Point point{};
      for (const Field& part : fields_of(value.bytes)) {
        if (part.number == 1) point.tag = part.bytes;
        if (part.number == 2)
          point.value = std::bit_cast<float>(static_cast<uint32_t>(little_endian(part.bytes, 4)));
      }
      file.steps[step].push_back(point);
    }
  }
}

/// All event files of a folder, one behind the other.
EventFile read_events(const std::string& folder) {
  EventFile file;
  for (const std::string& name : event_files(folder)) {
    const std::string text = read_file(concat(folder, "/", name));
    std::string_view rest = text;
    while (rest.size() >= 12) {
      const uint64_t length = little_endian(rest, 8);
      if (rest.size() < 16 + length) break;
      EXPECT_EQ(little_endian(rest.substr(8), 4), slow_masked_crc(rest.substr(0, 8)));
      const std::string_view data = rest.substr(12, length);
      EXPECT_EQ(little_endian(rest.substr(12 + length), 4), slow_masked_crc(data));
      read_event(data, file);
      rest.remove_prefix(16 + length);
    }
    file.torn_bytes += rest.size();
  }
  return file;
}

class Metrics : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = ::testing::TempDir() + "hadal-metrics-" + std::to_string(getpid()) + "-" +
              ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  static void write_steps(MetricsWriter& writer, int64_t from, int64_t to, double loss) {
    for (int64_t step = from; step <= to; ++step) {
      writer.add(step, "loss/main", loss + static_cast<double>(step));
      writer.add(step, "grad_norm", std::nan(""));
      writer.flush(step, step * 1000);
    }
  }
  std::string folder_;
};

TEST(EventFile, ChecksumsAreThoseOfTheStandard) {
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(tfrecord("").size(), 16u);
}

TEST_F(Metrics, EventsHoldWhatTheLinesHold) {
  MetricsWriter writer(folder_, 0);
  write_steps(writer, 1, 3, 0.5);
  const EventFile file = read_events(folder_);
  EXPECT_EQ(file.versions, std::vector<std::string>{"brain.Event:2"});
  EXPECT_EQ(file.starts, std::vector<int64_t>{1});
  ASSERT_EQ(file.steps.size(), 3u);
  const std::vector<Point>& second = file.steps.at(2);
  ASSERT_EQ(second.size(), 3u);
  EXPECT_EQ(second[0], (Point{"tokens", 2000.0f}));
  EXPECT_EQ(second[1], (Point{"loss/main", 2.5f}));
  EXPECT_TRUE(std::isnan(second[2].value));
}

TEST_F(Metrics, ResumingDropsLaterSteps) {
  { write_steps(*std::make_unique<MetricsWriter>(folder_, 0), 1, 9, 0.5); }
  {
    MetricsWriter writer(folder_, 5);
    write_steps(writer, 6, 7, 100.0);
  }
  EXPECT_EQ(event_files(folder_).size(), 2u) << "a running TensorBoard reads later names only";
  const EventFile file = read_events(folder_);
  ASSERT_EQ(file.steps.size(), 7u);
  EXPECT_EQ(file.steps.at(5)[1], (Point{"loss/main", 5.5f}));
  EXPECT_EQ(file.steps.at(6)[1], (Point{"loss/main", 106.0f}));
  EXPECT_TRUE(std::isnan(file.steps.at(5)[2].value));
  ASSERT_EQ(file.steps.at(6).size(), 3u) << "the old step is still there";
  EXPECT_EQ(file.starts, (std::vector<int64_t>{1, 6}));
  // Back behind both, and without any event file.
  { const MetricsWriter writer(folder_, 2); }
  EXPECT_EQ(read_events(folder_).steps.size(), 2u);
  for (const std::string& name : event_files(folder_))
    std::filesystem::remove(folder_ + "/" + name);
  { const MetricsWriter writer(folder_, 2); }
  EXPECT_EQ(read_events(folder_).steps.size(), 2u);
}

TEST_F(Metrics, AKilledRunLeavesWholeRecords) {
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    MetricsWriter writer(folder_, 0);
    for (int64_t step = 1;; ++step) {
      write_steps(writer, step, step, 0.0);
      if (step == 50 && write(ready[1], "x", 1) != 1) _exit(1);
    }
  }
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  usleep(2000);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(ready[0]);
  close(ready[1]);
  const EventFile killed = read_events(folder_);
  EXPECT_EQ(killed.torn_bytes, 0u);
  EXPECT_GE(killed.steps.size(), 50u);
  // Even a torn tail, of a full disk say, is gone after a resume.
  std::ofstream(folder_ + "/" + event_files(folder_).at(0), std::ios::app) << "torn";
  std::ofstream(folder_ + "/metrics.jsonl", std::ios::app) << "{\"step\": 3";
  {
    MetricsWriter writer(folder_, 40);
    write_steps(writer, 41, 41, 7.0);
  }
  const EventFile resumed = read_events(folder_);
  EXPECT_EQ(resumed.torn_bytes, 0u);
  EXPECT_EQ(resumed.steps.size(), 41u);
  EXPECT_EQ(resumed.steps.at(41)[1], (Point{"loss/main", 48.0f}));
}

}  // namespace
}  // namespace hadal
