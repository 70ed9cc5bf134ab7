// Sends the requests of a load test and reads their answers: one thread, any number of streams.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "load/answer.h"
#include "load/traffic.h"
#include "server/url.h"

namespace hadal::load {

struct ClientOptions {
  server::Url url;  ///< its path ends in /v1
  std::string api_key;
  bool insecure = false;    ///< certificates are not checked
  double timeout = 600;     ///< seconds from the planned time to the end of the answer
  int64_t requests = 0;     ///< at most; 0: no limit
  double duration = 0;      ///< seconds in which requests are begun; 0: no limit
  int64_t concurrency = 0;  ///< so many clients, each sending as soon as it has its answer; 0: at
                            ///< the planned times
};

/// What a look at the running test sees.
struct ClientState {
  double seconds = 0;  ///< since the start
  int64_t sent = 0, ended = 0;
  int64_t pieces = 0;  ///< of all answers, that came so far
};

class LoadClient {
 public:
  /// Resolves the host: an InputError when it has no address.
  explicit LoadClient(ClientOptions options);
  ~LoadClient();
  LoadClient(const LoadClient&) = delete;
  LoadClient& operator=(const LoadClient&) = delete;

  /// The first model that the server lists; an InputError when it does not answer or lists none.
  std::string first_model();

  /// Runs the test to its end, or until `tick`, called several times a second, returns false: then
  /// open requests are dropped without an outcome. `ended` gets every outcome as it ends. Once.
  ClientState run(const Traffic& traffic,
                  const std::function<void(Outcome)>& ended,
                  const std::function<bool(const ClientState&)>& tick);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hadal::load
