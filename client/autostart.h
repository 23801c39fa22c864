#pragma once

#include <string>

#include "base/result.h"
#include "client/deadline.h"

namespace stillframe::client {

// The file to start: `wanted` or $STILLFRAME_DAEMON, which must then be there; else "stillframed"
// beside this library, in ../bin of it, or in $PATH. kUnavailable lists where it was looked for.
Result<std::string> find_daemon(const std::string& wanted);

// Starts a private daemon at `socket_path` and waits until it listens. It detaches itself; what we
// start is its launcher, which we reap, and which tells the reason when it fails. By posix_spawn,
// never fork: this process may hold a CUDA context (GPU-18).
//
// Ok also when another daemon holds that socket, which may be one that is about to end: the caller
// tries to connect again until its own deadline. kUnavailable: it did not start, with its words.
Status start_daemon(const std::string& program, const std::string& socket_path, Deadline deadline);

}  // namespace stillframe::client
