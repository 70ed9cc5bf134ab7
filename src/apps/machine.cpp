#include "apps/machine.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sched.h>
#include <sstream>

namespace hadal::apps {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

constexpr std::array kFeatures = {"avx2",        "fma",         "avx512f",    "avx512bw",
                                  "avx512vl",    "avx512dq",    "avx512vbmi", "avx512_vnni",
                                  "avx512_bf16", "avx512_fp16", "amx_bf16",   "amx_int8"};

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  return begin == std::string::npos
             ? ""
             : text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

void read_cpu(Machine& machine) {
  std::ifstream file("/proc/cpuinfo");
  std::string line, flags;
  while (std::getline(file, line)) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::string key = trimmed(line.substr(0, colon)), value = trimmed(line.substr(colon + 1));
    if (key == "model name" && machine.cpu.empty()) machine.cpu = value;
    if ((key == "flags" || key == "Features") && flags.empty()) flags = " " + value + " ";
  }
  for (const char* feature : kFeatures) {
    if (flags.find(std::string(" ") + feature + " ") != std::string::npos)
      machine.cpu_features.emplace_back(feature);
  }
  cpu_set_t set;
  CPU_ZERO(&set);
  machine.processors = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

int64_t number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t value = -1;
  file >> value;  // "max" is no number
  return file ? value : -1;
}

void read_memory(Machine& machine) {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  int64_t value = 0;
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    words >> key >> value >> unit;
    if (key == "MemTotal:") machine.memory_total = value * 1024;
    if (key == "MemAvailable:") machine.memory_available = value * 1024;
  }
  const int64_t limit = number_in("/sys/fs/cgroup/memory.max");
  const int64_t used = number_in("/sys/fs/cgroup/memory.current");
  if (limit <= 0 || limit >= machine.memory_total) return;
  machine.memory_total = limit;
  machine.memory_available =
      std::min(machine.memory_available, std::max<int64_t>(0, limit - std::max<int64_t>(0, used)));
}

std::string output_of(const char* command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command, "r"), pclose);
  std::string out;
  std::array<char, 4096> buffer;
  while (pipe) {
    const size_t count = std::fread(buffer.data(), 1, buffer.size(), pipe.get());
    if (count == 0) break;
    out.append(buffer.data(), count);
  }
  return out;
}

void read_gpus(Machine& machine) {
  machine.gpus = parse_gpu_list(
      output_of("nvidia-smi --query-gpu=name,memory.total,memory.free,driver_version "
                "--format=csv,noheader,nounits 2>/dev/null"),
      machine.gpu_driver);
  if (!machine.gpus.empty()) return;
  std::ifstream file("/proc/driver/nvidia/version");
  std::string line;
  if (std::getline(file, line)) machine.gpu_driver = trimmed(line);
}

}  // namespace

std::vector<Gpu> parse_gpu_list(const std::string& csv, std::string& driver) {
  std::vector<Gpu> gpus;
  std::istringstream lines(csv);
  std::string line;
  while (std::getline(lines, line)) {
    std::vector<std::string> cells;
    std::istringstream row(line);
    std::string cell;
    while (std::getline(row, cell, ',')) cells.push_back(trimmed(cell));
    if (cells.size() != 4) continue;
    Gpu gpu{.name = cells[0]};
    std::istringstream(cells[1]) >> gpu.total_bytes;  // 0 for "[N/A]"
    std::istringstream(cells[2]) >> gpu.free_bytes;
    gpu.total_bytes *= kMiB;
    gpu.free_bytes *= kMiB;
    driver = cells[3];
    gpus.push_back(gpu);
  }
  return gpus;
}

Machine look_at_machine() {
  Machine machine;
  read_cpu(machine);
  read_memory(machine);
  read_gpus(machine);
  return machine;
}

}  // namespace hadal::apps
