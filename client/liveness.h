#pragma once

#include <optional>
#include <string>

#include "base/result.h"
#include "client/deadline.h"
#include "shm/channel.h"

namespace stillframe::client {

// Whether a daemon that says nothing still does anything. It may be silent for minutes while it
// writes, and its socket stays open while it is stopped; so, after a while of silence, it is
// greeted on a connection of its own, which one that lives answers at once.
//
// Never waits.
class Liveness {
 public:
  explicit Liveness(std::string socket_path);

  // It has said something. Any thread that holds the connection's lock may say so, while another
  // polls fd(): nothing is closed before the next look().
  void heard() noexcept { has_spoken_ = true; }
  // Asks, or looks for the answer, when it is time. kUnavailable, ETIMEDOUT: there is none.
  Status look() noexcept;
  // What to poll for the answer; -1 while none is awaited.
  int fd() const noexcept { return question_ ? question_->fd() : -1; }
  // Until look() has something to do.
  int rest_ms() const { return next_.rest_ms(); }

 private:
  void ask();
  void be_content() noexcept;

  std::string socket_path_;
  std::optional<shm::Channel> question_;
  bool has_spoken_ = false;
  Deadline next_;  // Of the answer while there is a question, else of asking.
};

}  // namespace stillframe::client
