#pragma once

#include <string>
#include <vector>

#include "base/result.h"

namespace stillframe::shm {

// $XDG_RUNTIME_DIR/stillframe when that variable names a directory of ours, else
// /run/stillframe-UID for root, else /tmp/stillframe-UID. Made with mode 0700 when absent.
// kInvalidArgument: it exists and is not ours alone (owner, mode, a link).
Result<std::string> private_socket_directory();

// "stillframed-p1-<build id>.sock" in that directory; "stillframed-p1-<build id>.lock" beside it
// guards start and exit.
std::string socket_file_name();
std::string lock_file_name();
std::string log_file_name();

inline constexpr const char* kSocketVariable = "STILLFRAME_SOCKET";
inline constexpr const char* kSystemSocket = "/run/stillframe/stillframed.sock";

// The sockets to try, in order: STILLFRAME_SOCKET alone when it is set; else the system socket, if
// there is one, then the private one.
struct SocketCandidates {
  std::vector<std::string> paths;
  bool may_start = false;  // Nothing was demanded by name, so a private daemon may be started.
};
Result<SocketCandidates> socket_candidates();

}  // namespace stillframe::shm
