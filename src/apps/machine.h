// What this machine is made of, read from the system without CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hadal::apps {

struct Gpu {
  std::string name;
  int64_t total_bytes = 0, free_bytes = 0;
};

struct Machine {
  std::string cpu;                        ///< model name; empty: unknown
  std::vector<std::string> cpu_features;  ///< of those that kernels here or elsewhere care about
  int processors = 0;                     ///< that this process may use
  int64_t memory_total = 0;               ///< bytes; the limit of the container if it is lower
  int64_t memory_available = 0;
  std::vector<Gpu> gpus;
  std::string gpu_driver;  ///< empty: none found
};

/// Never fails: what cannot be found out stays empty.
Machine look_at_machine();

/// The GPUs in the output of nvidia-smi --query-gpu=name,memory.total,memory.free,driver_version
/// --format=csv,noheader,nounits; `driver` gets the last column.
std::vector<Gpu> parse_gpu_list(const std::string& csv, std::string& driver);

}  // namespace hadal::apps
