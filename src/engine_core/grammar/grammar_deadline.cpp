#include "engine_core/grammar/grammar_deadline.h"

#include "base/check.h"

namespace hadal::engine_core {
namespace {
thread_local const GrammarDeadline* current = nullptr;
}  // namespace

void GrammarDeadline::extend(Time time) {
  const Time::rep ticks = time.time_since_epoch().count();
  Time::rep before = ticks_.load();
  while (before < ticks && !ticks_.compare_exchange_weak(before, ticks)) {
  }
}

bool GrammarDeadline::passed() const {
  return std::chrono::steady_clock::now().time_since_epoch().count() >= ticks_.load();
}

GrammarDeadlineScope::GrammarDeadlineScope(const GrammarDeadline& deadline) { current = &deadline; }
GrammarDeadlineScope::~GrammarDeadlineScope() { current = nullptr; }

}  // namespace hadal::engine_core

namespace xgrammar {

void CheckCompileTime() {
  const hadal::engine_core::GrammarDeadline* const deadline = hadal::engine_core::current;
  if (deadline != nullptr && deadline->passed()) throw hadal::InputError(deadline->message());
}

}  // namespace xgrammar
