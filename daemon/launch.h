#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/unique_fd.h"

namespace stillframe::daemon {

// Starts this program again as a daemon of its own: new session, cwd /, stdin from /dev/null,
// output to `log_path`, every other descriptor closed, default signals and affinity. A notebook or
// a pipe of the trainer that started us must not wait for it. Returns once it listens. By
// posix_spawn, never fork: the caller of a caller may hold a CUDA context (GPU-18).
//
// kUnavailable: it did not come up; the message has its reason.
Status launch_detached(const std::vector<std::string>& arguments, const std::string& log_path);

// Starts this program again as the worker of a GPU, the only one that it sees: `socket` is its way
// to us, stdin is /dev/null, the output ours, every other descriptor closed. The caller reaps it.
Result<pid_t> launch_gpu_worker(const std::string& gpu_uuid, int socket,
                                const std::vector<std::string>& options);

// In the daemon so started: tells the launcher that we listen, or why not (empty: we do).
void report_to_launcher(int fd, std::string_view failure);

// In the daemon so started: undoes an affinity inherited from a trainer that pinned itself.
void reset_affinity() noexcept;

// The one daemon of a socket path: an exclusive lock on `<socket_path>.lock`, held for the daemon's
// life, so that start and exit cannot overlap. nullopt: another daemon has it.
Result<std::optional<UniqueFd>> lock_socket(const std::string& socket_path);

}  // namespace stillframe::daemon
