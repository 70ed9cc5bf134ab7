#include "apps/interrupt.h"

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/check.h"

namespace hadal::apps {
namespace {

volatile std::sig_atomic_t flag = 0;

/// Readable from a signal on until `drain`, so that poll() sees it whenever it comes.
int wake = -1;

extern "C" void on_interrupt(int) {
  const int before = errno;
  flag = 1;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(wake, &one, sizeof(one));
  errno = before;
}

void drain() {
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = ::read(wake, &count, sizeof(count));
}

}  // namespace

InterruptFlag::InterruptFlag() {
  if (wake < 0) wake = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  HADAL_CHECK(wake >= 0, "eventfd: ", std::strerror(errno));
  clear();
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
}

bool InterruptFlag::raised() const { return flag != 0; }

void InterruptFlag::clear() {
  flag = 0;
  drain();
}

bool wait_for_input(int file) {
  for (;;) {
    drain();
    if (flag != 0) return false;
    pollfd files[] = {{file, POLLIN, 0}, {wake, POLLIN, 0}};
    if (::poll(files, wake < 0 ? 1 : 2, -1) > 0 && files[0].revents != 0 && flag == 0) return true;
  }
}

InterruptMask::InterruptMask() {
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupt, &before_);
}

InterruptMask::~InterruptMask() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

}  // namespace hadal::apps
