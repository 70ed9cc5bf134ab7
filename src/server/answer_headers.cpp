#include "server/answer_headers.h"

#include <algorithm>

#include "server/http_text.h"

namespace hadal::server {
namespace {

class WithHeaders final : public Responder {
 public:
  WithHeaders(std::shared_ptr<Responder> inner,
              std::vector<std::pair<std::string, std::string>> headers)
      : inner_(std::move(inner)), headers_(std::move(headers)) {}
  void post(std::function<void()> work) override { inner_->post(std::move(work)); }
  void send(HttpResponse response) override {
    add(response);
    inner_->send(std::move(response));
  }
  void begin_stream(HttpResponse head) override {
    add(head);
    inner_->begin_stream(std::move(head));
  }
  void write(std::string bytes) override { inner_->write(std::move(bytes)); }
  void end_stream() override { inner_->end_stream(); }
  void when_silent(std::chrono::milliseconds interval, std::function<void()> work) override {
    inner_->when_silent(interval, std::move(work));
  }
  void on_close(std::function<void()> gone) override { inner_->on_close(std::move(gone)); }
  void on_stop(std::function<void()> stopping) override { inner_->on_stop(std::move(stopping)); }

 private:
  void add(HttpResponse& response) const {
    for (const auto& header : headers_) {
      const bool set = std::ranges::any_of(response.headers, [&](const auto& other) {
        return same_letters(other.first, header.first);
      });
      if (!set) response.headers.push_back(header);
    }
  }

  const std::shared_ptr<Responder> inner_;
  const std::vector<std::pair<std::string, std::string>> headers_;
};

}  // namespace

std::shared_ptr<Responder> with_headers(std::shared_ptr<Responder> inner,
                                        std::vector<std::pair<std::string, std::string>> headers) {
  return std::make_shared<WithHeaders>(std::move(inner), std::move(headers));
}

}  // namespace hadal::server
