// Which of how many ranks this process is, as whoever started it says in the environment.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace hadal::dist {

struct Placement {
  int64_t rank = 0, size = 1;
  int64_t local_rank = 0;  ///< among the ranks of this machine: which of its devices
  std::string host;        ///< of rank 0
  uint16_t port = 0;       ///< where rank 0 listens
  int listening = -1;      ///< rank 0 of `hadal train --ranks`: the descriptor that listens there
  bool agent = false;      ///< somebody else listens there: torchrun's agent
  int64_t attempt = 0;     ///< how often the starter has started the ranks before
  std::string starter;     ///< for messages: "torchrun", "Open MPI", "MPICH", "Slurm"
};

/// The value of a variable; nothing where it is not set.
using Environment = std::function<std::optional<std::string>(const std::string& name)>;
Environment process_environment();

/// In this order: RANK and WORLD_SIZE (torchrun, `hadal train --ranks`), OMPI_COMM_WORLD_* (mpirun
/// of Open MPI), PMI_* (MPICH, Intel MPI), SLURM_* of a step that srun started. Rank 0's address is
/// MASTER_ADDR and MASTER_PORT; where ranks share one machine 127.0.0.1 and 29500, under Slurm the
/// step's first node and a port out of the job's number. Nothing where no starter is found or where
/// it started one process. Errors: InputError naming the variable, what it should hold and what it
/// holds.
std::optional<Placement> find_placement(const Environment& environment);

}  // namespace hadal::dist
