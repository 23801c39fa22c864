#pragma once

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "daemon/environment.h"
#include "daemon/run.h"
#include "daemon/session.h"

namespace stillframe::daemon {

// What `stillframe status` shows. A view; lives for one call.
struct DaemonStatus {
  const Environment& environment;
  std::string socket_path;
  bool is_private = false;
  std::int64_t started_ns = 0;
  std::map<std::string, pid_t> gpu_workers;  // By the UUID of their GPU.
  std::vector<const Session*> sessions;
  std::vector<const Run*> runs;
};

// One JSON object. At most 60 KB, so that it fits a message:
// of very many runs the last are left out and "truncated" says so.
std::string to_json(const DaemonStatus& status);

}  // namespace stillframe::daemon
