#include "client/liveness.h"

#include <cerrno>
#include <cstdint>
#include <new>
#include <utility>

#include "shm/messages.h"

namespace stillframe::client {

namespace {

// A daemon answers within milliseconds; a machine at its limits may take seconds.
constexpr std::uint64_t kSilenceMs = 5'000;
constexpr std::uint64_t kAnswerMs = 5'000;

bool has_answered(shm::Channel& question) {
  auto answer = question.receive();
  return !answer || *answer;
}

Error unanswered() {
  return Error(Code::kUnavailable, "the daemon does not answer: it is stopped or stuck", ETIMEDOUT);
}

}  // namespace

Liveness::Liveness(std::string socket_path)
    : socket_path_(std::move(socket_path)), next_(Deadline::after_ms(kSilenceMs)) {}

void Liveness::be_content() noexcept {
  question_.reset();
  has_spoken_ = false;
  next_ = Deadline::after_ms(kSilenceMs);
}

Status Liveness::look() noexcept {
  try {
    // An answer, whatever it says, or even that it hangs up: it acts.
    if (has_spoken_ || (question_ && has_answered(*question_))) {
      be_content();
    } else if (next_.has_passed()) {
      if (question_) return unanswered();
      ask();
    }
  } catch (const std::bad_alloc&) {
    be_content();  // Asked again after another while; what waits has its own deadline.
  }
  return ok();
}

void Liveness::ask() {
  shm::wire::HelloT hello;
  hello.protocol_version = shm::kProtocolVersion;
  hello.version = STILLFRAME_VERSION;
  hello.role = "tool";
  auto channel = shm::Channel::connect(socket_path_);
  // It has stopped listening, as it does when it ends: the connection itself will tell.
  if (!channel || !channel->send(shm::make_message(0, std::move(hello)))) {
    be_content();
    return;
  }
  question_ = *std::move(channel);
  next_ = Deadline::after_ms(kAnswerMs);
}

}  // namespace stillframe::client
