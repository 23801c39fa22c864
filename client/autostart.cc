#include "client/autostart.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "base/os_error.h"
#include "base/text.h"
#include "base/unique_fd.h"

extern char** environ;  // NOLINT: POSIX has no header for it.

namespace stillframe::client {

namespace {

constexpr std::string_view kDaemonName = "stillframed";
constexpr const char* kDaemonVariable = "STILLFRAME_DAEMON";
constexpr std::size_t kReasonBytesMax = 1500;

bool is_program(const std::string& path) {
  struct stat status = {};
  return ::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode) &&
         ::access(path.c_str(), X_OK) == 0;
}

// "" where the loader cannot tell.
std::string own_directory() {
  // Any address inside this library will do.
  static constexpr char kAnchor = 0;
  Dl_info info = {};
  if (::dladdr(&kAnchor, &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string_view file = info.dli_fname;
  const auto slash = file.rfind('/');
  return slash == std::string_view::npos ? "" : std::string(file.substr(0, slash));
}

std::vector<std::string> usual_places() {
  std::vector<std::string> places;
  if (const std::string own = own_directory(); !own.empty()) {
    places.push_back(concat(own, '/', kDaemonName));
    places.push_back(concat(own, "/../bin/", kDaemonName));
  }
  const char* const path = std::getenv("PATH");
  std::string_view rest = path == nullptr ? "" : path;
  while (!rest.empty()) {
    const auto colon = rest.find(':');
    const std::string_view directory = rest.substr(0, colon);
    // A relative entry would start whatever the working directory holds.
    if (!directory.empty() && directory[0] == '/') {
      places.push_back(concat(directory, '/', kDaemonName));
    }
    rest = colon == std::string_view::npos ? "" : rest.substr(colon + 1);
  }
  return places;
}

// What posix_spawn wants, freed at the end of the scope.
class SpawnSettings {
 public:
  SpawnSettings() {
    (void)::posix_spawn_file_actions_init(&actions_);
    (void)::posix_spawnattr_init(&attributes_);
  }
  SpawnSettings(const SpawnSettings&) = delete;
  SpawnSettings& operator=(const SpawnSettings&) = delete;
  ~SpawnSettings() {
    (void)::posix_spawnattr_destroy(&attributes_);
    (void)::posix_spawn_file_actions_destroy(&actions_);
  }
  posix_spawn_file_actions_t* actions() noexcept { return &actions_; }
  posix_spawnattr_t* attributes() noexcept { return &attributes_; }

 private:
  posix_spawn_file_actions_t actions_;
  posix_spawnattr_t attributes_;
};

// All that the launcher writes until it ends. False: the deadline passed first.
bool read_until_end(int fd, std::string& text, Deadline deadline) {
  for (;;) {
    pollfd waiting{.fd = fd, .events = POLLIN, .revents = 0};
    const int ready = ::poll(&waiting, 1, deadline.rest_ms());
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return false;
    std::array<char, 512> piece;
    const ssize_t bytes = ::read(fd, piece.data(), piece.size());
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes <= 0) return true;
    if (text.size() < kReasonBytesMax) text.append(piece.data(), static_cast<std::size_t>(bytes));
  }
}

// The launcher's exit status; -1 when somebody else reaped it (a host that ignores SIGCHLD or waits
// for any child).
int reap(pid_t pid) {
  int status = 0;
  pid_t reaped = -1;
  do {
    reaped = ::waitpid(pid, &status, 0);
  } while (reaped < 0 && errno == EINTR);
  return reaped == pid ? status : -1;
}

}  // namespace

Result<std::string> find_daemon(const std::string& wanted) {
  if (!wanted.empty()) {
    if (is_program(wanted)) return wanted;
    return Error(Code::kUnavailable, concat("the daemon ", wanted, " is not an executable file"));
  }
  if (const char* const variable = std::getenv(kDaemonVariable);
      variable != nullptr && variable[0] != '\0') {
    if (is_program(variable)) return std::string(variable);
    return Error(Code::kUnavailable, concat("the daemon ", variable, " named by ", kDaemonVariable,
                                            " is not an executable file"));
  }
  std::string looked_for;
  for (const std::string& place : usual_places()) {
    if (is_program(place)) return place;
    looked_for += concat(looked_for.empty() ? "" : ", ", place);
  }
  return Error(Code::kUnavailable, concat("no daemon to start: looked for ", looked_for,
                                          "; install it or set ", kDaemonVariable));
}

Status start_daemon(const std::string& program, const std::string& socket_path, Deadline deadline) {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return os_error("pipe to the daemon", errno);
  const UniqueFd report(ends[0]);
  UniqueFd report_end(ends[1]);

  SpawnSettings settings;
  (void)::posix_spawn_file_actions_addopen(settings.actions(), 0, "/dev/null", O_RDONLY, 0);
  (void)::posix_spawn_file_actions_addopen(settings.actions(), 1, "/dev/null", O_WRONLY, 0);
  (void)::posix_spawn_file_actions_adddup2(settings.actions(), report_end.get(), 2);
  // The host's own descriptors may lack close-on-exec.
  (void)::posix_spawn_file_actions_addclosefrom_np(settings.actions(), 3);
  sigset_t none;
  sigset_t all;
  (void)::sigemptyset(&none);
  (void)::sigfillset(&all);
  (void)::posix_spawnattr_setsigmask(settings.attributes(), &none);
  (void)::posix_spawnattr_setsigdefault(settings.attributes(), &all);
  (void)::posix_spawnattr_setflags(settings.attributes(),
                                   POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);

  std::string words[] = {program, "--private", "--socket", socket_path};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_t pid = 0;
  const int error = ::posix_spawn(&pid, program.c_str(), settings.actions(), settings.attributes(),
                                  argv.data(), environ);
  if (error != 0) {
    return Error(Code::kUnavailable,
                 concat("start ", program, ": ", os_error("spawn", error).message()), error);
  }
  report_end = UniqueFd();

  std::string reason;
  if (!read_until_end(report.get(), reason, deadline)) {
    // Only while it is still our child: a host that reaps all children may have done so, and the
    // number may be another process by now.
    if (::waitpid(pid, nullptr, WNOHANG) == 0) {
      (void)::kill(pid, SIGKILL);
      (void)reap(pid);
    }
    return Error(Code::kUnavailable,
                 concat("the daemon ", program, " did not listen at ", socket_path, " in time"));
  }
  const int status = reap(pid);
  if (status == 0 || status == -1) return ok();
  while (!reason.empty() && (reason.back() == '\n' || reason.back() == ' ')) reason.pop_back();
  if (reason.empty()) reason = concat("wait status ", status);
  return Error(Code::kUnavailable, concat("the daemon ", program, " did not start: ", reason));
}

}  // namespace stillframe::client
