#include "testing/rank_threads.h"

#include <algorithm>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <thread>

#include "base/check.h"

namespace hadal::testing {

std::vector<std::string> run_ranks(int64_t count,
                                   const std::function<void(dist::Ranks&)>& body,
                                   std::chrono::milliseconds timeout,
                                   const std::vector<int64_t>& absent) {
  const int listening = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  auto* raw = reinterpret_cast<sockaddr*>(&address);
  HADAL_CHECK(::bind(listening, raw, length) == 0 && ::listen(listening, 64) == 0 &&
                  ::getsockname(listening, raw, &length) == 0,
              "run_ranks: no port");
  std::vector<std::string> errors(static_cast<size_t>(count));
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < count; ++rank) {
    if (std::find(absent.begin(), absent.end(), rank) != absent.end()) continue;
    threads.emplace_back([&, rank] {
      try {
        dist::Ranks ranks({.rank = rank,
                           .size = count,
                           .local_rank = rank,
                           .host = "127.0.0.1",
                           .port = ntohs(address.sin_port),
                           .listening = rank == 0 ? listening : -1,
                           .starter = "test"},
                          timeout);
        body(ranks);
      } catch (const std::exception& error) {
        errors[static_cast<size_t>(rank)] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

}  // namespace hadal::testing
