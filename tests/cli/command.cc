#include "tests/cli/command.h"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <utility>

#include "base/check.h"
#include "shm/channel.h"

extern char** environ;

namespace stillframe::cli {

namespace {

struct Pipe {
  UniqueFd reader;
  UniqueFd writer;
};

Pipe make_pipe() {
  std::array<int, 2> fds{};
  check(::pipe2(fds.data(), O_CLOEXEC) == 0, "a test can make a pipe");
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> list;
  for (std::string& text : texts) list.push_back(text.data());
  list.push_back(nullptr);
  return list;
}

// Ours, without what would change the answers of the commands.
std::vector<std::string> environment(const std::vector<std::string>& variables) {
  std::vector<std::string> list;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    if (!text.starts_with("STILLFRAME_") && !text.starts_with("NO_COLOR=")) list.emplace_back(text);
  }
  list.insert(list.end(), variables.begin(), variables.end());
  return list;
}

pid_t start(const char* program, std::vector<std::string> arguments,
            std::vector<std::string> variables, int out, int err) {
  arguments.insert(arguments.begin(), program);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, err, STDERR_FILENO);
  pid_t pid = -1;
  const int failed = ::posix_spawn(&pid, program, &actions, nullptr, pointers(arguments).data(),
                                   pointers(variables).data());
  ::posix_spawn_file_actions_destroy(&actions);
  check(failed == 0, "the program under test starts");
  return pid;
}

int reap(pid_t pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Reads both to their ends; at once, so that neither fills up and stops the writer.
void drain(const UniqueFd& out, const UniqueFd& err, Outcome& outcome) {
  std::array<pollfd, 2> watched = {pollfd{out.get(), POLLIN, 0}, pollfd{err.get(), POLLIN, 0}};
  while (watched[0].fd >= 0 || watched[1].fd >= 0) {
    if (::poll(watched.data(), watched.size(), -1) < 0) continue;
    for (std::size_t i = 0; i < watched.size(); ++i) {
      if (watched[i].fd < 0 || watched[i].revents == 0) continue;
      std::array<char, 65536> piece{};
      const ssize_t count = ::read(watched[i].fd, piece.data(), piece.size());
      if (count <= 0) {
        watched[i].fd = -1;
      } else {
        (i == 0 ? outcome.out : outcome.err).append(piece.data(), static_cast<std::size_t>(count));
      }
    }
  }
}

}  // namespace

boost::json::value Outcome::json() const {
  boost::system::error_code failed;
  auto document = boost::json::parse(out, failed);
  return failed ? boost::json::value(nullptr) : document;
}

bool Outcome::has_one_error_line() const {
  return err.starts_with("stillframe: ") && std::count(err.begin(), err.end(), '\n') == 1 &&
         err.ends_with('\n');
}

Outcome stillframe(const std::vector<std::string>& arguments,
                   const std::vector<std::string>& variables) {
  Pipe out = make_pipe();
  Pipe err = make_pipe();
  const pid_t pid =
      start(STILLFRAME_CLI, arguments, environment(variables), out.writer.get(), err.writer.get());
  out.writer = UniqueFd();
  err.writer = UniqueFd();
  Outcome outcome;
  drain(out.reader, err.reader, outcome);
  outcome.exit_code = reap(pid);
  return outcome;
}

DaemonProcess::DaemonProcess(const std::string& socket_path) : socket_path_(socket_path) {
  const UniqueFd log(::open((socket_path + ".log").c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  pid_ = start(STILLFRAME_DAEMON, {"--socket", socket_path}, environment({}), log.get(), log.get());
}

DaemonProcess::~DaemonProcess() {
  (void)::kill(pid_, SIGKILL);
  (void)reap(pid_);
}

bool DaemonProcess::wait_listening() const {
  // There is nothing to be told by: the daemon's own readiness is that its socket answers.
  for (;;) {
    if (shm::Channel::connect(socket_path_)) return true;
    siginfo_t ended{};
    const int waited =
        ::waitid(P_PID, static_cast<id_t>(pid_), &ended, WEXITED | WNOHANG | WNOWAIT);
    if (waited != 0 || ended.si_pid == pid_) return false;
    (void)::usleep(1000);
  }
}

}  // namespace stillframe::cli
