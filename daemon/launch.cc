#include "daemon/launch.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <spawn.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>

#include "base/os_error.h"
#include "base/text.h"

extern char** environ;  // NOLINT: POSIX has no header for it.

namespace stillframe::daemon {

namespace {

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
  void use_default_signals(int more_flags = 0) {
    sigset_t none;
    sigset_t all;
    (void)::sigemptyset(&none);
    (void)::sigfillset(&all);
    (void)::posix_spawnattr_setsigmask(&attributes_, &none);
    (void)::posix_spawnattr_setsigdefault(&attributes_, &all);
    (void)::posix_spawnattr_setflags(
        &attributes_,
        static_cast<short>(more_flags | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF));
  }
  posix_spawn_file_actions_t actions_;
  posix_spawnattr_t attributes_;
};

// The launcher's pipe has this number in the daemon.
constexpr int kReportFd = 3;
// And the daemon's socket in a GPU worker.
constexpr int kGpuWorkerSocketFd = 3;
constexpr int kStartTimeoutMs = 10'000;

}  // namespace

Status launch_detached(const std::vector<std::string>& arguments, const std::string& log_path) {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return os_error("pipe to the daemon", errno);
  const UniqueFd report(ends[0]);
  UniqueFd report_end(ends[1]);

  SpawnSettings settings;
  auto& actions = settings.actions_;
  (void)::posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  (void)::posix_spawn_file_actions_addopen(&actions, 1, log_path.c_str(),
                                           O_WRONLY | O_CREAT | O_TRUNC, 0600);
  (void)::posix_spawn_file_actions_adddup2(&actions, 1, 2);
  (void)::posix_spawn_file_actions_adddup2(&actions, report_end.get(), kReportFd);
  (void)::posix_spawn_file_actions_addclosefrom_np(&actions, kReportFd + 1);
  (void)::posix_spawn_file_actions_addchdir_np(&actions, "/");
  settings.use_default_signals(POSIX_SPAWN_SETSID);

  std::vector<std::string> words = arguments;
  words.push_back(concat("--report-fd=", kReportFd));
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_t pid = 0;
  const int error =
      ::posix_spawn(&pid, "/proc/self/exe", &actions, &settings.attributes_, argv.data(), environ);
  if (error != 0) return os_error(concat("start the daemon, log ", log_path), error);
  report_end = UniqueFd();

  // It writes a reason, or closes the pipe without one when it listens with "ok".
  std::string text;
  for (;;) {
    pollfd waiting{.fd = report.get(), .events = POLLIN, .revents = 0};
    const int ready = ::poll(&waiting, 1, kStartTimeoutMs);
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) {
      return Error(Code::kUnavailable,
                   concat("the daemon did not listen within ", kStartTimeoutMs / 1000,
                          " s; see its log ", log_path));
    }
    std::array<char, 1024> piece;
    const ssize_t bytes = ::read(report.get(), piece.data(), piece.size());
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes <= 0) break;
    text.append(piece.data(), static_cast<std::size_t>(bytes));
  }
  if (text == "ok") return ok();
  return Error(Code::kUnavailable,
               text.empty() ? concat("the daemon ended at once; see its log ", log_path) : text);
}

Result<pid_t> launch_gpu_worker(const std::string& gpu_uuid, int socket,
                                const std::vector<std::string>& options) {
  SpawnSettings settings;
  auto& actions = settings.actions_;
  (void)::posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  (void)::posix_spawn_file_actions_adddup2(&actions, socket, kGpuWorkerSocketFd);
  (void)::posix_spawn_file_actions_addclosefrom_np(&actions, kGpuWorkerSocketFd + 1);
  settings.use_default_signals();

  std::vector<std::string> words = {"stillframed", concat("--gpu-worker=", gpu_uuid),
                                    concat("--gpu-worker-socket=", kGpuWorkerSocketFd)};
  words.insert(words.end(), options.begin(), options.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  // Ours may hide that GPU: it is the environment of the client that started us.
  std::string visible = concat("CUDA_VISIBLE_DEVICES=", gpu_uuid);
  std::vector<char*> variables = {visible.data()};
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!std::string_view(*entry).starts_with("CUDA_VISIBLE_DEVICES=")) variables.push_back(*entry);
  }
  variables.push_back(nullptr);
  pid_t pid = 0;
  const int error = ::posix_spawn(&pid, "/proc/self/exe", &actions, &settings.attributes_,
                                  argv.data(), variables.data());
  if (error != 0) return os_error("start a GPU worker", error);
  return pid;
}

void report_to_launcher(int fd, std::string_view failure) {
  if (fd < 0) return;
  const std::string_view text = failure.empty() ? std::string_view("ok") : failure;
  // A launcher that is gone needs no answer.
  (void)!::write(fd, text.data(), text.size());
  (void)::close(fd);
}

void reset_affinity() noexcept {
  cpu_set_t every;
  CPU_ZERO(&every);
  for (std::size_t i = 0; i < CPU_SETSIZE; ++i) CPU_SET(i, &every);
  // The kernel cuts it to what the cpuset allows.
  (void)::sched_setaffinity(0, sizeof every, &every);
}

Result<std::optional<UniqueFd>> lock_socket(const std::string& socket_path) {
  const std::string path = concat(socket_path, ".lock");
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return os_error(concat("open ", path), errno);
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return std::optional<UniqueFd>();
    return os_error(concat("lock ", path), errno);
  }
  return std::optional<UniqueFd>(std::move(fd));
}

}  // namespace stillframe::daemon
