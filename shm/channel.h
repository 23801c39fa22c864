#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "base/unique_fd.h"
#include "shm/messages.h"

namespace stillframe::shm {

inline constexpr std::size_t kFdsPerMessageMax = 4;

struct Packet {
  wire::MessageT message;
  std::vector<UniqueFd> fds;  // At most kFdsPerMessageMax, close-on-exec.
};

struct PeerCredentials {
  pid_t pid = 0;  // 0 across PID namespaces.
  uid_t uid = 0;
  gid_t gid = 0;
};

// One end of a SOCK_SEQPACKET connection: whole messages with descriptors, never a partial one.
// The socket is non-blocking; both calls say so by nullopt / false. One thread at a time.
class Channel {
 public:
  Channel() = default;
  // A connected SOCK_SEQPACKET socket, blocking or not.
  explicit Channel(UniqueFd socket);

  // Connects to a filesystem path. kNotFound / kUnavailable (refused): nobody listens there.
  static Result<Channel> connect(const std::string& path);

  // nullopt: nothing there now. kUnavailable: the peer is gone. kInvalidArgument: a malformed
  // message, or descriptors that were cut off (MSG_CTRUNC); everything received with it is closed,
  // and the connection should be dropped.
  Result<std::optional<Packet>> receive();

  // False: the peer does not read and the socket is full; try again when it is writable.
  // `fds` stay the caller's.
  Result<bool> send(const wire::MessageT& message, std::span<const int> fds = {});

  // Waits until receive() may have something, for at most `timeout_ms`. True: it may.
  Result<bool> wait_readable(int timeout_ms);

  Result<PeerCredentials> peer() const;
  int fd() const noexcept { return socket_.get(); }
  explicit operator bool() const noexcept { return static_cast<bool>(socket_); }
  [[nodiscard]] int release() noexcept { return socket_.release(); }

 private:
  UniqueFd socket_;
};

// Binds and listens, mode 0600 for a daemon of one user. Removes a stale socket file
// first, which is right only for the holder of the directory's lock.
Result<UniqueFd> listen_at(const std::string& path, mode_t mode);

// A memfd with `bytes` in it, sealed against every change. For layouts and state.json.
Result<UniqueFd> make_sealed_memfd(const char* name, std::string_view bytes);
// Copies what a peer sent out of its memfd, once, into private memory. kInvalidArgument unless it
// is a memfd sealed with SHRINK and GROW (SHM-2, SHM-3) whose size is exactly `bytes`, at most
// `bytes_max`.
Result<std::string> read_sealed_memfd(int fd, std::uint64_t bytes, std::uint64_t bytes_max);

}  // namespace stillframe::shm
