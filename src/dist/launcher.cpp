#include "dist/launcher.h"

#include <algorithm>
#include <arpa/inet.h>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include "base/check.h"
#include "base/log.h"

extern char** environ;

namespace hadal::dist {
namespace {

std::string system_reason() { return std::strerror(errno); }

/// A descriptor that this object closes.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor() { reset(); }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int get() const { return fd_; }
  void reset() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

/// SIGINT, SIGTERM and SIGCHLD as a descriptor, while one lives.
class Signals {
 public:
  Signals() {
    sigemptyset(&taken_);
    for (const int signal : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&taken_, signal);
    pthread_sigmask(SIG_BLOCK, &taken_, &before_);
    descriptor_ = Descriptor(::signalfd(-1, &taken_, SFD_NONBLOCK | SFD_CLOEXEC));
    HADAL_CHECK(descriptor_.get() >= 0, "signalfd: ", system_reason());
  }
  ~Signals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  int descriptor() const { return descriptor_.get(); }
  const sigset_t& before() const { return before_; }
  /// The next one, or 0.
  int take() {
    signalfd_siginfo info;
    return ::read(descriptor_.get(), &info, sizeof(info)) == sizeof(info)
               ? static_cast<int>(info.ssi_signo)
               : 0;
  }

 private:
  sigset_t taken_, before_;
  Descriptor descriptor_;
};

/// A socket that listens at some free port of this machine; rank 0 inherits it, so that nobody else
/// can take the port.
struct Meeting {
  Descriptor socket;
  uint16_t port = 0;

  Meeting() : socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof(address);
    auto* raw = reinterpret_cast<sockaddr*>(&address);
    HADAL_INPUT_CHECK(socket.get() >= 0 && ::bind(socket.get(), raw, length) == 0 &&
                          ::listen(socket.get(), 1024) == 0 &&
                          ::getsockname(socket.get(), raw, &length) == 0,
                      "--ranks: no port of 127.0.0.1 can be opened: ", system_reason());
    port = ntohs(address.sin_port);
  }
};

/// One rank's process.
struct Child {
  pid_t pid = -1;
  Descriptor errors;  ///< what it writes to standard error; not of rank 0
  std::string line;   ///< of that, the last one so far
  bool running = false;
  int status = 0;

  bool died() const { return !running && !(WIFEXITED(status) && WEXITSTATUS(status) <= 1); }
  int code() const { return WIFEXITED(status) ? WEXITSTATUS(status) : -1; }
};

std::vector<std::string> environment_of(int64_t rank, int64_t size, const Meeting& meeting) {
  std::vector<std::string> result;
  // LibTorch warns of every connection that breaks; what broke is said here.
  const std::array<std::string, 8> ours = {concat("RANK=", rank),
                                           concat("WORLD_SIZE=", size),
                                           concat("LOCAL_RANK=", rank),
                                           concat("LOCAL_WORLD_SIZE=", size),
                                           "MASTER_ADDR=127.0.0.1",
                                           concat("MASTER_PORT=", meeting.port),
                                           concat("HADAL_LISTENING=", meeting.socket.get()),
                                           "TORCH_CPP_LOG_LEVEL=ERROR"};
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const std::string name = text.substr(0, text.find('=') + 1);
    const bool replaced = std::any_of(
        ours.begin(), ours.end(), [&](const std::string& own) { return own.starts_with(name); });
    if (!replaced) result.push_back(text);
  }
  result.insert(result.end(), ours.begin(), ours.end());
  return result;
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (const std::string& text : texts) result.push_back(const_cast<char*>(text.c_str()));
  result.push_back(nullptr);
  return result;
}

Child start(const std::vector<std::string>& command,
            int64_t rank,
            int64_t size,
            const Meeting& meeting,
            const Signals& signals) {
  const std::vector<std::string> variables = environment_of(rank, size, meeting);
  const std::vector<char*> argv = pointers(command), envp = pointers(variables);
  int ends[2] = {-1, -1};
  HADAL_INPUT_CHECK(rank == 0 || ::pipe2(ends, O_CLOEXEC) == 0, "--ranks: no pipe for rank ", rank,
                    ": ", system_reason());
  const Descriptor null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  const pid_t launcher = ::getpid();
  Child child;
  child.pid = ::fork();
  if (child.pid == 0) {
    // Until exec only what may be called after fork(). A process group of its own: Ctrl-C reaches
    // ranks through the launcher alone, once.
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != launcher) ::_exit(kExitRankLost);
    ::dup2(null.get(), STDIN_FILENO);
    if (rank == 0) {
      ::fcntl(meeting.socket.get(), F_SETFD, 0);
    } else {
      ::dup2(null.get(), STDOUT_FILENO);
      ::dup2(ends[1], STDERR_FILENO);
    }
    pthread_sigmask(SIG_SETMASK, &signals.before(), nullptr);
    ::execve(argv[0], argv.data(), envp.data());
    ::_exit(127);
  }
  const std::string why = system_reason();
  if (child.pid > 0) ::setpgid(child.pid, child.pid);  // whichever of the two comes first
  if (ends[1] >= 0) ::close(ends[1]);
  child.errors = Descriptor(ends[0]);
  HADAL_INPUT_CHECK(child.pid > 0, "--ranks: rank ", rank, " cannot be started: ", why);
  child.running = true;
  return child;
}

/// All ranks of one attempt. Destroyed, it leaves no process behind.
class Group {
 public:
  Group(const Launch& what, Signals& signals) : signals_(signals) {
    const Meeting meeting;
    const std::vector<std::string> command = what.command();
    for (int64_t rank = 0; rank < what.ranks; ++rank)
      children_.push_back(start(command, rank, what.ranks, meeting, signals));
  }
  ~Group() {
    kill(SIGKILL);
    for (Child& child : children_)
      if (child.running) ::waitpid(child.pid, &child.status, 0);
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  /// Until all have ended or one has died: which one, or -1.
  int64_t watch() {
    for (;;) {
      wait();
      while (const int signal = signals_.take()) on_signal(signal);
      for (Child& child : children_) {
        if (child.running && ::waitpid(child.pid, &child.status, WNOHANG) == child.pid)
          child.running = false;
      }
      forward();
      const int64_t dead = first_dead();
      if (dead >= 0) return dead;
      if (std::none_of(children_.begin(), children_.end(),
                       [](const Child& child) { return child.running; }))
        return -1;
    }
  }

  const Child& child(int64_t rank) const { return children_[static_cast<size_t>(rank)]; }
  bool stopped() const { return num_signals_ > 0; }
  /// The worst exit code, where none has died.
  int code() const {
    int worst = 0;
    for (const Child& each : children_) worst = std::max(worst, each.code());
    return worst;
  }

 private:
  /// To the process group: whatever a rank has started ends with it.
  void kill(int signal) {
    for (const Child& child : children_)
      if (child.running) ::kill(-child.pid, signal);
  }

  void on_signal(int signal) {
    if (signal == SIGCHLD) return;
    kill(++num_signals_ > 1 ? SIGKILL : signal);
  }

  void wait() {
    std::vector<pollfd> files = {{signals_.descriptor(), POLLIN, 0}};
    for (const Child& child : children_)
      if (child.errors.get() >= 0) files.push_back({child.errors.get(), POLLIN, 0});
    ::poll(files.data(), files.size(), 1000);
  }

  /// Lines of the other ranks, each with its name before it.
  void forward() {
    for (size_t rank = 1; rank < children_.size(); ++rank) {
      Child& child = children_[rank];
      char buffer[4096];
      pollfd file = {child.errors.get(), POLLIN, 0};
      while (file.fd >= 0 && ::poll(&file, 1, 0) > 0) {
        const ssize_t count = ::read(file.fd, buffer, sizeof(buffer));
        if (count <= 0) {
          child.errors.reset();
          break;
        }
        for (ssize_t i = 0; i < count; ++i) take(static_cast<int64_t>(rank), child, buffer[i]);
      }
    }
  }

  static void take(int64_t rank, Child& child, char letter) {
    if (letter != '\n') {
      child.line += letter;
      return;
    }
    // The last word of one that dies is told with its death.
    constexpr std::string_view kLast = "hadal: ";
    if (child.line.starts_with(kLast)) {
      child.line.erase(0, kLast.size());
      child.errors.reset();
      return;
    }
    std::fprintf(stderr, "rank %lld: %s\n", static_cast<long long>(rank), child.line.c_str());
    child.line.clear();
  }

  /// Who died by itself rather than because another one had.
  int64_t first_dead() const {
    int64_t found = -1;
    for (size_t rank = 0; rank < children_.size(); ++rank) {
      if (!children_[rank].died()) continue;
      if (children_[rank].code() != kExitRankLost) return static_cast<int64_t>(rank);
      if (found < 0) found = static_cast<int64_t>(rank);
    }
    return found;
  }

  Signals& signals_;
  std::vector<Child> children_;
  int num_signals_ = 0;
};

std::string death(int64_t rank, const Child& child) {
  const std::string who = concat("rank ", rank, " (process ", child.pid, ")");
  if (WIFSIGNALED(child.status)) {
    const int signal = WTERMSIG(child.status);
    return concat(who, " was killed by signal ", signal, " (", ::strsignal(signal), ")");
  }
  return concat(who, " ended with code ", child.code(), child.line.empty() ? "" : ": ", child.line);
}

}  // namespace

int launch(const Launch& what) {
  HADAL_CHECK(what.ranks >= 1, "launch: ", what.ranks, " ranks");
  Signals signals;
  for (int64_t attempt = 0;; ++attempt) {
    Group group(what, signals);
    const int64_t dead = group.watch();
    if (dead < 0) return group.code();
    const Child& child = group.child(dead);
    const std::string how = death(dead, child);
    if (child.code() == kExitBadInput) {
      // Rank 0 has said it itself.
      if (dead > 0) throw InputError(concat("rank ", dead, ": ", child.line));
      return kExitBadInput;
    }
    if (group.stopped()) throw Error(concat(how, " while the run was being stopped"));
    if (attempt == what.restarts) {
      throw Error(concat(how, attempt == 0 ? "" : concat("; ", attempt, " restarts are used up")));
    }
    log::warn("launch", how, "; all ", what.ranks,
              " ranks start again from the newest checkpoint, ", attempt + 1, " of ",
              what.restarts);
  }
}

}  // namespace hadal::dist
