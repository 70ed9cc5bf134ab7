// libFuzzer target: a connection answers any bytes, however they are cut, and always the same; and
// the parser of one request agrees with it. The first byte chooses the cuts.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "base/log.h"
#include "server/http.h"

namespace {

using hadal::server::HttpRequest;
using hadal::server::HttpResponse;

/// Says what it was asked, and streams where the body has an odd size.
class Mirror final : public hadal::server::HttpHandler {
 public:
  void handle(HttpRequest request, std::shared_ptr<hadal::server::Responder> responder) override {
    ++handled;
    std::string said = request.method + " " + request.path + "?" + request.query + "\n";
    for (const auto& [name, value] : request.headers) said += name + "=" + value + "\n";
    said += request.body;
    if (request.body.size() % 2 == 0) {
      HttpResponse response;
      response.body = std::move(said);
      return responder->send(std::move(response));
    }
    responder->begin_stream({});
    responder->write(said.substr(0, said.size() / 2));
    responder->write(said.substr(said.size() / 2));
    responder->end_stream();
  }
  HttpResponse error(int status, std::string_view message, std::string_view) override {
    HttpResponse response;
    response.status = status;
    response.body = message;
    return response;
  }
  int handled = 0;
};

struct World {
  World() {
    hadal::log::set_level(hadal::log::Level::kError);
    options.max_header_bytes = 512;
    options.max_body_bytes = 256;
  }
  hadal::server::ServerOptions options;
  Mirror mirror;
  hadal::server::HttpSession session{options, mirror};
};

/// Without the refusal that a connection may end with.
std::string_view without_refusal(std::string_view answers) {
  const size_t last = answers.rfind("HTTP/1.1 4");
  return answers.substr(0, last);
}

/// Alike, but for a request that never ends: it is refused or, where the parser still waited when
/// the client ended its side, not answered.
bool same_answers(std::string_view a, std::string_view b) {
  return a == b || without_refusal(a) == b || a == without_refusal(b) ||
         without_refusal(a) == without_refusal(b);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static World world;
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  world.mirror.handled = 0;
  const std::string_view one[] = {bytes};
  const std::string whole = world.session.run(one);
  const int handled = world.mirror.handled;

  HttpRequest request;
  const int status = parse_http_request(bytes, world.options, request);
  if (status != 0 && status != 400 && status != 413 && status != 431) std::abort();
  if (status == 0 && (handled == 0 || !whole.starts_with("HTTP/1.1 "))) std::abort();
  if (!whole.empty() && !whole.starts_with("HTTP/1.1 ")) std::abort();

  std::minstd_rand random(data[0] + 1u);
  const size_t stride = 1 + data[0] % 40;
  std::vector<std::string_view> pieces;
  for (size_t pos = 0; pos < bytes.size();) {
    const size_t count = std::min<size_t>(1 + random() % stride, bytes.size() - pos);
    pieces.push_back(bytes.substr(pos, count));
    pos += count;
  }
  world.mirror.handled = 0;
  const std::string found = world.session.run(pieces);
  if (world.mirror.handled == handled && same_answers(whole, found)) return 0;
  std::fprintf(stderr, "in one piece:\n%s\nin %zu pieces:\n%s\n", whole.c_str(), pieces.size(),
               found.c_str());
  std::abort();
}
