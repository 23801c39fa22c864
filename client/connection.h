#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "base/result.h"
#include "base/unique_fd.h"
#include "client/deadline.h"
#include "client/liveness.h"
#include "shm/channel.h"

namespace stillframe::client {

// A connection to the daemon, shared by the threads of a session. There is no thread of its own:
// whoever waits takes in what comes, for itself and for the others; one of the waiting threads
// polls the socket, the others wait for that one.
//
// Once gone it stays gone, every call answers kUnavailable at once, and a new one is made.
class Connection {
 public:
  // Called with the connection's lock held, so they must not call it back.
  struct Handlers {
    std::function<void(shm::wire::MessageT message)> on_message;  // What the daemon says unasked.
    std::function<void(const Error& reason)> on_gone;             // Once.
  };

  // A daemon behind `socket_path` that says nothing while somebody waits is asked there whether it
  // lives (Liveness); where it does not, the connection is gone. Empty: it is not asked.
  // kResourceExhausted: no descriptor left.
  static Result<std::shared_ptr<Connection>> open(shm::Channel channel, std::string socket_path);
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Empty ones end the delivery: after it returned, no handler runs.
  void set_handlers(Handlers handlers);

  // Sends a request and waits for its reply. A Failure is returned as the Error that it carries.
  // kUnavailable also when the deadline passes. A reply that comes after it is not looked at; where
  // that would lose a slot or leave the two sides of different minds, the connection goes too.
  enum class WhenLate : std::uint8_t { kDrop, kKeep };
  Result<shm::Packet> call(shm::wire::MessageT message, std::span<const int> fds, Deadline deadline,
                           WhenLate when_late = WhenLate::kDrop);
  // Sends what has no reply.
  Status send(const shm::wire::MessageT& message, std::span<const int> fds, Deadline deadline);

  // Waits until `is_done` says so (true) or the deadline passes (false). kUnavailable: the
  // connection is gone and it does not. `is_done` is called with the lock held. Who changes what it
  // looks at, other than in a handler, calls wake().
  Result<bool> wait(const std::function<bool()>& is_done, Deadline deadline);
  void wake();

  // Takes in what has come; does not wait.
  void take_in();

  void drop(const Error& reason);
  bool is_open() const;
  Result<shm::PeerCredentials> peer() const { return channel_.peer(); }

 private:
  Connection(shm::Channel channel, UniqueFd wake_event, std::optional<Liveness> liveness)
      : channel_(std::move(channel)),
        wake_event_(std::move(wake_event)),
        liveness_(std::move(liveness)) {}

  Status send_locked(std::unique_lock<std::mutex>& lock, const shm::wire::MessageT& message,
                     std::span<const int> fds, Deadline deadline);
  Result<bool> wait_locked(std::unique_lock<std::mutex>& lock, const std::function<bool()>& is_done,
                           Deadline deadline);
  void drain_locked();
  void drop_locked(const Error& reason);
  void wake_locked();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  shm::Channel channel_;
  UniqueFd wake_event_;               // Ends the poll of the thread that polls.
  std::optional<Liveness> liveness_;  // Looked at by the thread that polls.
  bool is_polled_ = false;            // One of the waiting threads is in poll().
  Handlers handlers_;
  std::optional<Error> gone_;
  std::uint64_t next_request_ = 1;
  std::map<std::uint64_t, std::optional<shm::Packet>> replies_;  // By request; empty: not yet.
};

}  // namespace stillframe::client
