#include "dist/placement.h"

#include <charconv>
#include <cstdlib>

#include "base/check.h"

namespace hadal::dist {
namespace {

constexpr int64_t kDefaultPort = 29500;
constexpr int64_t kMostRanks = 1 << 20;

/// The variables of one starter; an empty name: it has none.
struct Starter {
  const char *name, *rank, *size, *local_rank, *local_size;
};

constexpr Starter kStarters[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
    // A batch script has SLURM_PROCID, too, but is no step.
    {"Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""},
};

class Reader {
 public:
  explicit Reader(const Environment& environment) : environment_(environment) {}

  bool has(const std::string& name) const {
    return !name.empty() && environment_(name).has_value();
  }
  std::string text(const std::string& name) const { return environment_(name).value_or(""); }

  int64_t integer(const std::string& name, int64_t least, int64_t most) const {
    const std::string value = text(name);
    int64_t number = 0;
    const auto parsed = std::from_chars(value.data(), value.data() + value.size(), number);
    HADAL_INPUT_CHECK(parsed.ec == std::errc() && parsed.ptr == value.data() + value.size() &&
                          number >= least && number <= most,
                      "environment: ", name, ": expected a number from ", least, " to ", most,
                      ", found \"", value, "\"");
    return number;
  }

 private:
  const Environment& environment_;
};

/// "gpu[003-005,9],login" begins with "gpu003".
std::string first_node(const std::string& list) {
  const size_t bracket = list.find('['), comma = list.find(',');
  if (bracket == std::string::npos || comma < bracket) return list.substr(0, comma);
  const size_t end = list.find_first_of("-,]", bracket);
  const std::string inside =
      end == std::string::npos ? "" : list.substr(bracket + 1, end - bracket - 1);
  const size_t close = list.find(']', bracket);
  const size_t next = close == std::string::npos ? close : list.find(',', close);
  HADAL_INPUT_CHECK(!inside.empty() && close != std::string::npos,
                    "environment: SLURM_STEP_NODELIST: expected names of nodes, found \"", list,
                    "\"");
  return list.substr(0, bracket) + inside +
         list.substr(close + 1, next == std::string::npos ? next : next - close - 1);
}

void find_address(const Reader& reader, const Starter& starter, Placement& placement) {
  const bool slurm = starter.name == std::string("Slurm");
  const bool one_machine = reader.has(starter.local_size) &&
                           reader.integer(starter.local_size, 1, kMostRanks) == placement.size;
  if (reader.has("MASTER_ADDR")) {
    placement.host = reader.text("MASTER_ADDR");
    HADAL_INPUT_CHECK(!placement.host.empty(),
                      "environment: MASTER_ADDR: expected the address of rank 0, found nothing");
  } else if (slurm && reader.has("SLURM_STEP_NODELIST")) {
    placement.host = first_node(reader.text("SLURM_STEP_NODELIST"));
  } else if (one_machine) {
    placement.host = "127.0.0.1";
  } else {
    throw InputError(concat("environment: MASTER_ADDR is not set: expected the address of rank 0, ",
                            "since ", starter.name, " started ", placement.size,
                            " ranks and does not say that they share one machine"));
  }
  int64_t port = kDefaultPort;
  if (reader.has("MASTER_PORT")) {
    port = reader.integer("MASTER_PORT", 1, 65535);
  } else if (slurm && reader.has("SLURM_JOB_ID")) {
    port = 10000 + reader.integer("SLURM_JOB_ID", 0, INT64_MAX) % 20000;  // jobs share nodes
  }
  placement.port = static_cast<uint16_t>(port);
  placement.agent = reader.text("TORCHELASTIC_USE_AGENT_STORE") == "True";
  if (reader.has("TORCHELASTIC_RESTART_COUNT"))
    placement.attempt = reader.integer("TORCHELASTIC_RESTART_COUNT", 0, INT64_MAX);
  if (placement.rank == 0 && reader.has("HADAL_LISTENING"))
    placement.listening = static_cast<int>(reader.integer("HADAL_LISTENING", 3, 1 << 20));
}

}  // namespace

Environment process_environment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* value = std::getenv(name.c_str());
    if (value == nullptr) return std::nullopt;
    return value;
  };
}

std::optional<Placement> find_placement(const Environment& environment) {
  const Reader reader(environment);
  for (const Starter& starter : kStarters) {
    const bool has_rank = reader.has(starter.rank), has_size = reader.has(starter.size);
    // Slurm and MPI set some of theirs elsewhere, too; nobody but a starter sets one of the two.
    const bool either = starter.name == std::string("torchrun") && has_rank != has_size;
    HADAL_INPUT_CHECK(!either, "environment: ", has_rank ? starter.rank : starter.size,
                      " is set, but ", has_rank ? starter.size : starter.rank,
                      " is not: expected both or neither");
    if (!has_rank || !has_size) continue;
    Placement placement;
    placement.starter = starter.name;
    placement.size = reader.integer(starter.size, 1, kMostRanks);
    placement.rank = reader.integer(starter.rank, 0, placement.size - 1);
    if (placement.size == 1) return std::nullopt;
    if (reader.has(starter.local_rank))
      placement.local_rank = reader.integer(starter.local_rank, 0, placement.size - 1);
    find_address(reader, starter, placement);
    return placement;
  }
  return std::nullopt;
}

}  // namespace hadal::dist
