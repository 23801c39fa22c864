// stillframed: takes snapshots from training processes on this node and makes them durable.
//
//   stillframed --socket PATH             a service, in the foreground, until SIGTERM
//   stillframed --private --socket PATH   what the first client starts: detaches, ends when idle
//   stillframed --gpu-worker UUID         what the daemon starts for a GPU
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/text.h"
#include "daemon/flags.h"
#include "daemon/gpu_worker.h"
#include "daemon/launch.h"
#include "daemon/server.h"
#include "shm/socket_path.h"

namespace stillframe::daemon {
namespace {

BackendFactory backend_factory(const std::string& io) {
  uring::BackendOptions options;
  if (io == "uring") options.choice = uring::BackendOptions::Choice::kUring;
  if (io == "threads") options.choice = uring::BackendOptions::Choice::kThreads;
  return [options] { return uring::create_backend(options); };
}

std::shared_ptr<spdlog::logger> make_logger(const std::string& level) {
  auto log = std::make_shared<spdlog::logger>("stillframed",
                                              std::make_shared<spdlog::sinks::stderr_sink_mt>());
  log->set_pattern("%Y-%m-%dT%H:%M:%S.%eZ %l %v", spdlog::pattern_time_type::utc);
  log->set_level(spdlog::level::from_str(level));
  log->flush_on(spdlog::level::info);
  return log;
}

// Registered buffers and locked pages: as much as this process may have anyway.
void raise_limits() {
  for (const auto resource : {RLIMIT_MEMLOCK, RLIMIT_NOFILE}) {
    rlimit limit{};
    if (::getrlimit(resource, &limit) != 0) continue;
    limit.rlim_cur = limit.rlim_max;
    (void)::setrlimit(resource, &limit);
  }
}

// Serves until the end. The locked socket file goes last, while the lock is still held.
Status serve(const Flags& flags, spdlog::logger& log) {
  auto lock = lock_socket(flags.socket_path);
  if (!lock) return std::move(lock).error();
  if (!*lock) {
    // Another one serves, starts or is about to leave; the client tries again until its deadline.
    log.info("another daemon has {}", flags.socket_path);
    report_to_launcher(flags.report_fd, "");
    return ok();
  }
  auto listener = shm::listen_at(flags.socket_path, 0600);
  if (!listener) return std::move(listener).error();

  asio::io_context context(1);
  const SystemClock clock;
  SystemRng rng;
  HashPool hash_pool(std::clamp(std::thread::hardware_concurrency() / 8, 1U, 4U));
  Environment environment{.context = context,
                          .clock = clock,
                          .rng = rng,
                          .hash_pool = hash_pool,
                          .log = log,
                          .backend_factory = backend_factory(flags.io),
                          .instance_nonce = rng.next(),
                          .arena_bytes_max = flags.arena_bytes_max,
                          .gpu_drain_share = flags.gpu_drain_share,
                          .keep_slots = std::chrono::seconds(flags.keep_slots_s)};
  const std::int64_t idle_exit_s =
      flags.idle_exit_s >= 0 ? flags.idle_exit_s : (flags.is_private ? 60 : 0);
  ServerOptions options{.socket_path = flags.socket_path,
                        .idle_exit = std::chrono::seconds(idle_exit_s),
                        .is_private = flags.report_fd >= 0};
  Server server(environment, std::move(options), *std::move(listener));
  log.info("stillframed {} listens at {}", STILLFRAME_VERSION, flags.socket_path);
  report_to_launcher(flags.report_fd, "");

  TaskScope tasks(context);
  tasks.spawn(server.run());
  context.run();
  (void)::unlink(flags.socket_path.c_str());
  log.info("stillframed ends");
  return ok();
}

Status find_socket(Flags& flags) {
  if (flags.socket_path.empty()) {
    auto directory = shm::private_socket_directory();
    if (!directory) return std::move(directory).error();
    flags.socket_path = concat(*directory, '/', shm::socket_file_name());
  }
  return ok();
}

int run_worker(const Flags& flags) {
  raise_limits();
  (void)std::signal(SIGPIPE, SIG_IGN);
  const auto log = make_logger(flags.log_level);
  auto served = run_gpu_worker({.gpu_uuid = flags.gpu_worker,
                                .daemon_socket = UniqueFd(flags.gpu_worker_socket),
                                .drain_share = flags.gpu_drain_share},
                               *log);
  if (served) return 0;
  log->error("GPU worker of {} ends: {}", flags.gpu_worker, served.error().message());
  log->flush();
  std::_Exit(1);  // Without a word to the driver.
}

int run(int argc, char** argv) {
  Flags flags;
  if (const auto exit_status = read_flags(argc, argv, flags)) return *exit_status;
  (void)::umask(077);
  if (!flags.gpu_worker.empty()) return run_worker(flags);

  auto found = find_socket(flags);
  if (found && flags.is_private && flags.report_fd < 0) {
    std::vector<std::string> arguments(argv, argv + argc);
    // Said again, so that the child does not look it up in another environment.
    arguments.push_back(concat("--socket=", flags.socket_path));
    auto launched = launch_detached(arguments, concat(flags.socket_path, ".log"));
    if (launched) return 0;
    std::fprintf(stderr, "stillframed: %s\n", std::string(launched.error().message()).c_str());
    return 1;
  }
  if (found) {
    if (flags.report_fd >= 0) reset_affinity();
    raise_limits();
    // A client that goes away is an error value of send(), not a signal.
    (void)std::signal(SIGPIPE, SIG_IGN);
    const auto log = make_logger(flags.log_level);
    found = serve(flags, *log);
  }
  if (found) return 0;
  const std::string reason(found.error().message());
  report_to_launcher(flags.report_fd, reason);
  std::fprintf(stderr, "stillframed: %s\n", reason.c_str());
  return 1;
}

}  // namespace
}  // namespace stillframe::daemon

int main(int argc, char** argv) { return stillframe::daemon::run(argc, argv); }
