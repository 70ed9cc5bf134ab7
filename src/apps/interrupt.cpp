#include "apps/interrupt.h"

namespace hadal::apps {
namespace {

volatile std::sig_atomic_t flag = 0;

extern "C" void on_interrupt(int) { flag = 1; }

}  // namespace

InterruptFlag::InterruptFlag() {
  flag = 0;
  struct sigaction action = {};
  action.sa_handler = on_interrupt;  // without SA_RESTART: a blocking read() returns
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
}

bool InterruptFlag::raised() const { return flag != 0; }

void InterruptFlag::clear() { flag = 0; }

InterruptMask::InterruptMask() {
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupt, &before_);
}

InterruptMask::~InterruptMask() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

}  // namespace hadal::apps
