#pragma once

#include <string>

#include "base/result.h"
#include "base/unique_fd.h"

namespace spdlog {
class logger;
}

namespace stillframe::daemon {

struct GpuWorkerOptions {
  std::string gpu_uuid;
  UniqueFd daemon_socket;    // The control connection.
  double drain_share = 0.5;  // Of the time, spent with copies that nobody waits for.
};

// The process that has a GPU's context, so that the daemon has none: an error of the GPU that is
// for good ends this process alone, and the daemon starts another (GPU-15). Returns when the daemon
// has gone or wants it to end. The Error: the GPU's; all clients are gone then.
Status run_gpu_worker(GpuWorkerOptions options, spdlog::logger& log);

}  // namespace stillframe::daemon
