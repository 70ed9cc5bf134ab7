// What an operator decides about the server; every limit has a default that is safe on loopback.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine_core/request.h"
#include "engine_core/text_store.h"
#include "text/chat_format.h"

namespace hadal::server {

struct ServerOptions {
  // Where it listens.
  std::string host = "127.0.0.1";  ///< an address; anything but loopback without keys is warned of
  uint16_t port = 8000;            ///< 0: any free one
  std::string tls_certificate;     ///< PEM file with the chain; empty: plain HTTP
  std::string tls_key;             ///< PEM file

  // Who may ask.
  std::vector<std::string> api_keys;  ///< empty: everybody
  int64_t max_concurrent_per_key =
      1024;  ///< generations at a time of one key (of all without keys)
  /// Origins whose pages may call the server from a browser; "*": all. Empty: none.
  std::vector<std::string> cors;
  /// Host names that requests may name beside this machine's, where the server is on loopback.
  std::vector<std::string> allowed_hosts;
  std::vector<std::string> model_aliases;  ///< names accepted beside the engine's
  bool any_model = false;                  ///< every model name is accepted

  // Threads.
  int io_threads = 2;       ///< sockets and streams
  int handler_threads = 2;  ///< reading requests and tokenising, so that streams never wait for it
  /// Requests with a schema, grammar or tools wait here until it is compiled, so that nobody else
  /// waits with them; 0: on the handler's thread.
  int grammar_threads = 8;

  // Limits of the connection.
  size_t max_connections = 10'000;
  size_t max_header_bytes = 16 << 10;
  size_t max_body_bytes = 32 << 20;  ///< as sent, and once more when decompressed
  /// Bytes of a stream waiting for the client; one that reads slower is dropped.
  size_t max_output_bytes = 1 << 20;
  int socket_send_bytes = 0;                        ///< the kernel's send buffer; 0: its default
  std::chrono::milliseconds idle_timeout{75'000};   ///< between requests, and for a header
  std::chrono::milliseconds body_timeout{60'000};   ///< from header to end of the body
  std::chrono::milliseconds write_timeout{30'000};  ///< one write without an end: dropped
  std::chrono::milliseconds drain_timeout{30'000};  ///< how long stop() waits for open answers
  std::chrono::milliseconds request_timeout{0};     ///< of a generation; 0: none
  /// A stream that says nothing for so long gets a comment or the API's ping; 0: never.
  std::chrono::milliseconds ping_interval{15'000};
  std::chrono::seconds retry_after{1};  ///< told to those who find the queue full

  // Responses that clients want kept (/v1/responses with store).
  std::string response_folder;  ///< empty: they are kept in `texts`
  int64_t response_bytes = int64_t{256} << 20;
  engine_core::TextStore* texts =
      nullptr;  ///< outlives the server; null, and no folder: none are kept

  // Limits of a request.
  int max_json_depth = 64;
  size_t max_json_values = 2'000'000;
  size_t max_messages = 4096;
  size_t max_tools = 512;
  size_t max_stop_strings = 16;
  size_t max_prompts = 4096;       ///< of one /v1/completions
  int64_t max_context = 0;         ///< prompt and answer; 0: the engine's
  int64_t default_max_tokens = 0;  ///< where a request says nothing; 0: what the context leaves

  /// What the model was taught a reasoning effort to mean.
  text::EffortLevels effort_levels = text::EffortLevels::kPreview;
  // What a request gets that says nothing: the model's own
  // (engine_core/answer/generation_defaults.h).
  bool default_thinking = true;  ///< of OpenAI-style chats
  Sampling default_sampling;     ///< its seed is not used
};

}  // namespace hadal::server
