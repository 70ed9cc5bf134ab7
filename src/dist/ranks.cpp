#include "dist/ranks.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include <ATen/ATen.h>
// What LibTorch was built with; its headers do not say so.
#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "base/join.h"
#include "base/log.h"

namespace hadal::dist {
namespace {

using std::chrono::milliseconds;
using Store = c10::intrusive_ptr<c10d::Store>;

/// A rank says so often that it lives, and is given up when nothing was heard for as long.
constexpr milliseconds kBeat(500), kSilence(3000);

std::string key(const char* what, int64_t rank) { return concat(what, "/", rank); }

/// The reason alone: LibTorch's exceptions carry a stack trace behind it.
std::string reason(const std::exception& error) {
  const std::string whole = error.what();
  return whole.substr(0, whole.find('\n'));
}

/// Says on a connection and a thread of its own that this process lives.
class Heartbeat {
 public:
  Heartbeat(Store store, int64_t rank) : store_(std::move(store)), key_(key("beat", rank)) {
    store_->add(key_, 1);
    thread_ = std::thread([this] { run(); });
  }
  ~Heartbeat() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

 private:
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!wake_.wait_for(lock, kBeat, [this] { return done_; })) {
      try {
        store_->add(key_, 1);
      } catch (const std::exception&) {
        return;  // rank 0 is gone: whoever waits for it says so
      }
    }
  }

  Store store_;
  std::string key_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool done_ = false;
  std::thread thread_;
};

}  // namespace

struct Ranks::Impl {
  Impl(const Placement& where, milliseconds limit) : placement(where), timeout(limit) {
    open_store();
    meet();
    auto options = c10d::ProcessGroupGloo::Options::create(timeout);
    const bool here = placement.host == "127.0.0.1" || placement.host == "localhost";
    options->devices.push_back(here ? c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1")
                                    : c10d::ProcessGroupGloo::createDefaultDevice());
    try {
      backend = c10::make_intrusive<c10d::ProcessGroupGloo>(
          c10::make_intrusive<c10d::PrefixStore>("gloo", store), static_cast<int>(placement.rank),
          static_cast<int>(placement.size), options);
    } catch (const std::exception& error) {
      lost("connecting", -1, reason(error));
    }
  }

  /// The store lives on rank 0, which therefore leaves last, unless somebody is lost anyway.
  ~Impl() {
    heartbeat.reset();
    if (failed || !store) return;
    constexpr milliseconds kPause(5);
    try {
      int64_t left = store->add("left", 1);
      if (placement.rank != 0) return;
      for (auto waited = milliseconds(0); left < placement.size && waited < kSilence;
           waited += kPause) {
        std::this_thread::sleep_for(kPause);
        left = store->add("left", 0);
      }
    } catch (const std::exception& error) {
      log::debug("ranks", "rank 0 left first: ", reason(error));
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  void open_store() {
    c10d::TCPStoreOptions options;
    options.port = placement.port;
    options.isServer = placement.rank == 0 && !placement.agent;
    options.waitWorkers = false;
    options.timeout = timeout;
    if (placement.listening >= 0) options.masterListenFd = placement.listening;
    try {
      store = c10::make_intrusive<c10d::PrefixStore>(
          concat("hadal/attempt_", placement.attempt),
          c10::make_intrusive<c10d::TCPStore>(placement.host, options));
    } catch (const std::exception& error) {
      const std::string at = concat(placement.host, ":", placement.port);
      HADAL_INPUT_CHECK(!options.isServer, "rank 0 cannot listen at ", at,
                        " (MASTER_ADDR, MASTER_PORT): ", reason(error));
      throw RankLost(concat("rank ", placement.rank, ": rank 0 does not answer at ", at,
                            " (MASTER_ADDR, MASTER_PORT): ", reason(error)));
    }
  }

  /// Waits until every rank has come.
  void meet() {
    constexpr milliseconds kPause(10);
    std::vector<int64_t> absent;
    try {
      heartbeat = std::make_unique<Heartbeat>(store->clone(), placement.rank);
      enter("joining");
      const auto end = std::chrono::steady_clock::now() + timeout;
      do {
        absent.clear();
        for (int64_t rank = 0; rank < placement.size; ++rank)
          if (!store->check({key("stage", rank)})) absent.push_back(rank);
        if (absent.empty()) return;
        std::this_thread::sleep_for(kPause);
      } while (std::chrono::steady_clock::now() < end);
    } catch (const std::exception&) {
      absent = {0};  // the store does not answer
    }
    linger();
    throw RankLost(concat("rank ", placement.rank, ": expected ", placement.size, " ranks within ",
                          timeout.count() / 1000, " s, missing: ", join(absent)));
  }

  /// Rank 0 has the store, in which the others look who is missing.
  void linger() const {
    if (placement.rank == 0) std::this_thread::sleep_for(2 * kBeat);
  }

  void enter(const std::string& what) {
    doing = what;
    ++stage;
    store->set(key("stage", placement.rank), concat(stage, " ", what));
  }

  /// Number and name of a rank's stage.
  std::pair<int64_t, std::string> stage_of(int64_t rank) {
    const std::string text = store->get_to_str(key("stage", rank));
    const size_t space = text.find(' ');
    return {std::stoll(text), text.substr(space + 1)};
  }

  /// Ranks that are silent, or if there are none, those behind this one.
  std::string missing() {
    const auto beats = [&] {
      std::vector<int64_t> counts;
      for (int64_t rank = 0; rank < placement.size; ++rank)
        counts.push_back(store->add(key("beat", rank), 0));
      return counts;
    };
    const std::vector<int64_t> before = beats();
    std::this_thread::sleep_for(kSilence);
    const std::vector<int64_t> after = beats();
    std::vector<std::string> silent, late;
    for (int64_t rank = 0; rank < placement.size; ++rank) {
      if (rank == placement.rank) continue;
      const auto [number, what] = stage_of(rank);
      const auto r = static_cast<size_t>(rank);
      if (before[r] == after[r]) {
        silent.push_back(concat("rank ", rank, " is gone (it was at: ", what, ")"));
      } else if (number < stage) {
        late.push_back(concat("rank ", rank, " is still at: ", what));
      }
    }
    return join(silent.empty() ? late : silent);
  }

  [[noreturn]] void lost(const std::string& what, int64_t peer, const std::string& why) {
    failed = true;
    std::string who;
    try {
      who = missing();
    } catch (const std::exception&) {
      who = "rank 0 is gone";
    }
    linger();
    if (who.empty() && peer >= 0) who = concat("rank ", peer, " does not answer");
    throw RankLost(concat("rank ", placement.rank, ": ", doing, ": ", what, ": ", who,
                          who.empty() ? "" : "; ", why));
  }

  Placement placement;
  milliseconds timeout;
  Store store;
  std::unique_ptr<Heartbeat> heartbeat;
  c10::intrusive_ptr<c10d::Backend> backend;
  std::string doing = "joining";
  int64_t stage = 0;
  bool failed = false;
};

struct Transfer::State {
  std::shared_ptr<Ranks::Impl> ranks;
  c10::intrusive_ptr<c10d::Work> work;
  at::Tensor tensor;
  std::string what;
  int64_t peer = -1;
};

void Transfer::wait() {
  if (!state_) return;
  const std::shared_ptr<State> state = std::move(state_);
  try {
    state->work->wait();
  } catch (const std::exception& error) {
    state->ranks->lost(state->what, state->peer, reason(error));
  }
}

namespace {

/// Starts what `call` makes of the tensor.
template <typename Impl, typename Call>
Transfer start(const std::shared_ptr<Impl>& ranks,
               const at::Tensor& tensor,
               const std::string& what,
               int64_t peer,
               const Call& call) {
  HADAL_CHECK(tensor.is_contiguous(), what, ": a tensor of ", tensor.sizes(), " with strides ",
              tensor.strides());
  auto state =
      std::make_shared<Transfer::State>(Transfer::State{ranks, {}, tensor.detach(), what, peer});
  std::vector<at::Tensor> list = {state->tensor};
  try {
    state->work = call(list);
  } catch (const std::exception& error) {
    ranks->lost(what, peer, reason(error));
  }
  return Transfer(std::move(state));
}

}  // namespace

Ranks::Ranks() = default;

Ranks::Ranks(const Placement& placement, milliseconds timeout) : placement_(placement) {
  HADAL_CHECK(placement.size >= 1 && placement.rank >= 0 && placement.rank < placement.size,
              "ranks: rank ", placement.rank, " of ", placement.size);
  if (placement.size > 1) impl_ = std::make_shared<Impl>(placement, timeout);
}

Ranks::~Ranks() = default;

void Ranks::enter(const std::string& what) {
  if (!impl_) return;
  try {
    impl_->enter(what);
  } catch (const std::exception& error) {
    impl_->lost("telling so", 0, reason(error));
  }
}

void Ranks::barrier(const std::string& what) {
  enter(what);
  any(false);
}

void Ranks::sum(std::span<int64_t> values) {
  if (!impl_ || values.empty()) return;
  at::Tensor copy = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), copy.mutable_data_ptr<int64_t>());
  start(impl_, copy, "sum", -1, [&](std::vector<at::Tensor>& list) {
    return impl_->backend->allreduce(list);  // its default is the sum
  }).wait();
  const auto* sums = copy.const_data_ptr<int64_t>();
  std::copy(sums, sums + values.size(), values.begin());
}

bool Ranks::any(bool here) {
  int64_t count = here ? 1 : 0;
  sum({&count, 1});
  return count > 0;
}

std::string Ranks::broadcast(const std::string& text) {
  if (!impl_) return text;
  int64_t length = first() ? static_cast<int64_t>(text.size()) : 0;
  sum({&length, 1});
  if (length == 0) return {};
  const at::Tensor bytes = at::empty({length}, at::kByte);
  if (first()) std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  broadcast(bytes, 0).wait();
  return {static_cast<const char*>(bytes.const_data_ptr()), static_cast<size_t>(length)};
}

Transfer Ranks::broadcast(const at::Tensor& tensor, int64_t from) {
  if (!impl_) return {};
  return start(impl_, tensor, "broadcast", from, [&](std::vector<at::Tensor>& list) {
    c10d::BroadcastOptions options;
    options.rootRank = from;
    return impl_->backend->broadcast(list, options);
  });
}

Transfer Ranks::send(const at::Tensor& tensor, int64_t to, int64_t tag) {
  HADAL_CHECK(impl_ && to != rank(), "send: from rank ", rank(), " to ", to);
  return start(impl_, tensor, concat("send to rank ", to), to, [&](std::vector<at::Tensor>& list) {
    return impl_->backend->send(list, static_cast<int>(to), static_cast<int>(tag));
  });
}

Transfer Ranks::receive(const at::Tensor& tensor, int64_t from, int64_t tag) {
  HADAL_CHECK(impl_ && from != rank(), "receive: by rank ", rank(), " from ", from);
  return start(impl_, tensor, concat("receive from rank ", from), from,
               [&](std::vector<at::Tensor>& list) {
                 return impl_->backend->recv(list, static_cast<int>(from), static_cast<int>(tag));
               });
}

}  // namespace hadal::dist
