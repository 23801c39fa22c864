// The one file of the daemon that sees CLI11, whose headers take long to compile.
#include "daemon/flags.h"

#include <CLI/CLI.hpp>

namespace stillframe::daemon {

namespace {

void declare(CLI::App& app, Flags& flags) {
  app.add_option("--socket", flags.socket_path,
                 "Where to listen; default: the private socket of this user")
      ->envname("STILLFRAME_SOCKET")
      ->take_last();
  app.add_flag("--private", flags.is_private,
               "Detach, log beside the socket, end when nobody needs it");
  app.add_option("--io", flags.io, "Disk access: auto, uring or threads")
      ->envname("STILLFRAME_IO")
      ->check(CLI::IsMember({"auto", "uring", "threads"}));
  app.add_option("--arena-bytes-max", flags.arena_bytes_max,
                 "Most shared memory of one run in bytes; 0: half of the memory left")
      ->envname("STILLFRAME_ARENA_BYTES_MAX");
  app.add_option("--idle-exit-s", flags.idle_exit_s,
                 "End after that many seconds without work; 0: never; default 60 with --private")
      ->envname("STILLFRAME_IDLE_EXIT_S");
  app.add_option("--keep-slots-s", flags.keep_slots_s,
                 "How long the newest snapshot of a dead trainer stays in memory, in seconds")
      ->envname("STILLFRAME_KEEP_SLOTS_S");
  app.add_option("--log-level", flags.log_level, "debug, info, warning or error")
      ->envname("STILLFRAME_LOG_LEVEL");
  app.add_option("--report-fd", flags.report_fd, "")->group("");  // Between us and launch.cc.
  app.add_option("--gpu-drain-share", flags.gpu_drain_share,
                 "Share of the time in which a GPU is copied from, 0.01 to 1, lanes hbm and ipc")
      ->envname("STILLFRAME_GPU_DRAIN_SHARE")
      ->check(CLI::Range(0.01, 1.0));
  // Between us and launch.cc.
  app.add_option("--gpu-worker", flags.gpu_worker, "")->group("");
  app.add_option("--gpu-worker-socket", flags.gpu_worker_socket, "")->group("");
  app.set_version_flag("--version", std::string("stillframed ") + STILLFRAME_VERSION);
}

}  // namespace

std::optional<int> read_flags(int argc, char** argv, Flags& flags) {
  CLI::App app("The Stillframe daemon: makes checkpoints of training processes durable.");
  declare(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& ended) {  // --help among them.
    return app.exit(ended);
  }
  return std::nullopt;
}

}  // namespace stillframe::daemon
