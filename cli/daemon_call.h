#pragma once

#include <string>

#include "base/result.h"
#include "cli/tool.h"
#include "shm/messages.h"

namespace stillframe::cli {

struct DaemonAnswer {
  shm::wire::MessageT message;
  std::string socket_path;  // Who answered.
};

// Sends one request to the daemon that a trainer of this user would find, and waits for its answer
// for at most `timeout_ms`. Never starts one. kNotFound: none listens; the message names the
// sockets tried. A Failure of the daemon is this call's error. kUnavailable: no answer in time.
Result<DaemonAnswer> call_daemon(Tool& tool, shm::wire::MessageT request, int timeout_ms);

}  // namespace stillframe::cli
