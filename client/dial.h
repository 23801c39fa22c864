#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/result.h"
#include "base/rng.h"
#include "client/connection.h"
#include "client/deadline.h"

namespace stillframe::client {

struct DialOptions {
  std::string socket_path;  // Empty: shm::socket_candidates().
  std::string daemon_path;  // Empty: find_daemon()'s places.
  bool may_start = true;    // A private daemon, where the look-up allows it.
  std::string role = "trainer";
  // How long one that listens may take to answer; 0: until the deadline. One that takes longer is
  // stopped or stuck, and none is started in its place.
  std::uint64_t answer_ms = 0;
};

struct Dialled {
  std::shared_ptr<Connection> connection;
  std::string socket_path;
  std::string daemon_version;
  std::uint64_t daemon_nonce = 0;
};

// Finds a daemon that listens, or starts one, and greets it. A socket that was named (here or by
// STILLFRAME_SOCKET) never has a daemon started for it, unless daemon_path is named as well.
//
// Refused during another daemon's end, it tries again until the deadline, with jitter from `rng`,
// so that the ranks of a node do not try in step. kUnavailable: none is there and none could be
// started. kInvalidArgument: it speaks another protocol, or belongs to somebody who is neither root
// nor us.
Result<Dialled> dial(const DialOptions& options, Rng& rng, Deadline deadline);

}  // namespace stillframe::client
