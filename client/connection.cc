#include "client/connection.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <utility>

#include "base/os_error.h"
#include "base/text.h"

namespace stillframe::client {

namespace wire = shm::wire;

Result<std::shared_ptr<Connection>> Connection::open(shm::Channel channel,
                                                     std::string socket_path) {
  UniqueFd wake_event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_event) return os_error("eventfd for the connection", errno);
  std::optional<Liveness> liveness;
  if (!socket_path.empty()) liveness.emplace(std::move(socket_path));
  return std::shared_ptr<Connection>(
      new Connection(std::move(channel), std::move(wake_event), std::move(liveness)));
}

void Connection::set_handlers(Handlers handlers) {
  const std::lock_guard lock(mutex_);
  handlers_ = std::move(handlers);
}

Result<shm::Packet> Connection::call(wire::MessageT message, std::span<const int> fds,
                                     Deadline deadline, WhenLate when_late) {
  std::unique_lock lock(mutex_);
  const std::uint64_t request = next_request_++;
  const char* const what = wire::EnumNameBody(message.body.type);
  message.request = request;
  replies_.emplace(request, std::nullopt);
  auto sent = send_locked(lock, message, fds, deadline);
  if (!sent) {
    replies_.erase(request);
    return std::move(sent).error();
  }
  auto answered = wait_locked(
      lock, [this, request] { return replies_.at(request).has_value(); }, deadline);
  std::optional<shm::Packet> reply = std::move(replies_.at(request));
  replies_.erase(request);
  if (!answered) return std::move(answered).error();
  if (!reply) {
    const Error late(Code::kUnavailable, concat("the daemon did not answer ", what, " in time"),
                     ETIMEDOUT);
    if (when_late == WhenLate::kDrop) drop_locked(late);
    return late;
  }
  if (const wire::FailureT* failure = reply->message.body.AsFailure(); failure != nullptr) {
    return shm::from_wire(*failure);
  }
  return *std::move(reply);
}

Status Connection::send(const wire::MessageT& message, std::span<const int> fds,
                        Deadline deadline) {
  std::unique_lock lock(mutex_);
  return send_locked(lock, message, fds, deadline);
}

Status Connection::send_locked(std::unique_lock<std::mutex>& lock, const wire::MessageT& message,
                               std::span<const int> fds, Deadline deadline) {
  for (;;) {
    if (gone_) return *gone_;
    auto sent = channel_.send(message, fds);
    if (!sent) {
      // What cannot be encoded, or a lack of descriptors, leaves the connection as it was.
      const Error& error = sent.error();
      if (error.code() == Code::kInvalidArgument || error.code() == Code::kResourceExhausted) {
        return error;
      }
      // A daemon that refused us may have said why before it left.
      drain_locked();
      drop_locked(Error(Code::kUnavailable, concat("the daemon is gone: ", error.message()),
                        error.native()));
      return *gone_;
    }
    if (*sent) return ok();
    if (deadline.has_passed()) {
      return Error(Code::kUnavailable, "the daemon does not read its socket");
    }
    pollfd writable{.fd = channel_.fd(), .events = POLLOUT, .revents = 0};
    const int rest_ms = deadline.rest_ms();
    lock.unlock();
    (void)::poll(&writable, 1, rest_ms);
    lock.lock();
  }
}

Result<bool> Connection::wait(const std::function<bool()>& is_done, Deadline deadline) {
  std::unique_lock lock(mutex_);
  return wait_locked(lock, is_done, deadline);
}

Result<bool> Connection::wait_locked(std::unique_lock<std::mutex>& lock,
                                     const std::function<bool()>& is_done, Deadline deadline) {
  for (;;) {
    // Before is_done() is asked: a wake() after that must end the poll below. And only by the
    // thread that polls next: another one would take the wake from the one that polls now.
    if (!is_polled_) {
      std::uint64_t count = 0;
      (void)!::read(wake_event_.get(), &count, sizeof count);
    }
    drain_locked();
    if (is_done()) return true;
    if (gone_) return *gone_;
    if (deadline.has_passed()) return false;
    if (is_polled_) {
      (void)changed_.wait_until(lock, deadline.time());
      continue;
    }
    int rest_ms = deadline.rest_ms();
    if (liveness_) {
      auto alive = liveness_->look();
      if (!alive) {
        drop_locked(alive.error());
        return *gone_;
      }
      rest_ms = std::min(rest_ms, liveness_->rest_ms());
    }
    is_polled_ = true;
    // poll(2) takes no notice of a negative descriptor.
    pollfd waiting[] = {{.fd = channel_.fd(), .events = POLLIN, .revents = 0},
                        {.fd = wake_event_.get(), .events = POLLIN, .revents = 0},
                        {.fd = liveness_ ? liveness_->fd() : -1, .events = POLLIN, .revents = 0}};
    lock.unlock();
    (void)::poll(waiting, std::size(waiting), rest_ms);  // Whatever ended it, the loop looks.
    lock.lock();
    is_polled_ = false;
    changed_.notify_all();
  }
}

void Connection::wake() {
  const std::lock_guard lock(mutex_);
  wake_locked();
}

void Connection::wake_locked() {
  changed_.notify_all();
  const std::uint64_t one = 1;
  if (is_polled_) (void)!::write(wake_event_.get(), &one, sizeof one);
}

void Connection::take_in() {
  const std::lock_guard lock(mutex_);
  drain_locked();
}

void Connection::drain_locked() {
  bool is_news = false;
  while (!gone_) {
    auto received = channel_.receive();
    if (!received) {
      const Error& error = received.error();
      drop_locked(error.code() == Code::kInvalidArgument
                      ? Error(Code::kUnavailable,
                              concat("the daemon broke the protocol: ", error.message()))
                      : Error(Code::kUnavailable, concat("the daemon is gone: ", error.message()),
                              error.native()));
      return;
    }
    if (!*received) break;
    is_news = true;
    shm::Packet packet = *std::move(*received);
    if (packet.message.request == 0) {
      if (handlers_.on_message) handlers_.on_message(std::move(packet.message));
      continue;
    }
    // Nobody waits any more for a reply that is not there.
    const auto reply = replies_.find(packet.message.request);
    if (reply != replies_.end() && !reply->second) reply->second.emplace(std::move(packet));
  }
  if (is_news && liveness_) liveness_->heard();
  if (is_news) wake_locked();
}

void Connection::drop(const Error& reason) {
  const std::lock_guard lock(mutex_);
  drop_locked(reason);
}

void Connection::drop_locked(const Error& reason) {
  if (gone_) return;
  gone_ = reason;
  // Not closed: another thread may be polling it. The daemon sees the end at once all the same.
  (void)::shutdown(channel_.fd(), SHUT_RDWR);
  if (handlers_.on_gone) handlers_.on_gone(reason);
  wake_locked();
}

bool Connection::is_open() const {
  const std::lock_guard lock(mutex_);
  return !gone_.has_value();
}

}  // namespace stillframe::client
