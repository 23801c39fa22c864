#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace stillframe::daemon {

// What stillframed was started with; each has an environment variable where --help names one.
struct Flags {
  std::string socket_path;
  bool is_private = false;
  int report_fd = -1;
  std::string io = "auto";
  std::string log_level = "info";
  std::uint64_t arena_bytes_max = 0;
  std::int64_t idle_exit_s = -1;
  std::int64_t keep_slots_s = 600;
  std::string gpu_worker;
  int gpu_worker_socket = -1;
  double gpu_drain_share = 0.5;
};

// Reads them. A status: the process is to end with it, for help was printed, or what is wrong.
std::optional<int> read_flags(int argc, char** argv, Flags& flags);

}  // namespace stillframe::daemon
