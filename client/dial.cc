#include "client/dial.h"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

#include "base/text.h"
#include "client/autostart.h"
#include "shm/messages.h"
#include "shm/socket_path.h"

namespace stillframe::client {

namespace wire = shm::wire;

namespace {

constexpr int kPauseMsMin = 5;
constexpr int kPauseMsMax = 200;

Result<shm::SocketCandidates> places_to_try(const DialOptions& options) {
  shm::SocketCandidates places;
  if (!options.socket_path.empty()) {
    places.paths.push_back(options.socket_path);
  } else {
    auto candidates = shm::socket_candidates();
    if (!candidates) return std::move(candidates).error();
    places = *std::move(candidates);
  }
  places.may_start = options.may_start && (places.may_start || !options.daemon_path.empty());
  return places;
}

// Whoever can bind a socket's path there could pretend to be a daemon; only root and we may.
Status check_peer(const Connection& connection, const std::string& path) {
  auto peer = connection.peer();
  if (!peer) return std::move(peer).error();
  if (peer->uid == 0 || peer->uid == ::geteuid()) return ok();
  return Error(Code::kInvalidArgument, concat("the daemon at ", path, " belongs to user ",
                                              peer->uid, ", neither root nor ", ::geteuid()));
}

Result<Dialled> greet(const std::string& path, const DialOptions& options, Deadline deadline) {
  auto channel = shm::Channel::connect(path);
  if (!channel) return std::move(channel).error();
  auto connection = Connection::open(*std::move(channel), path);
  if (!connection) return std::move(connection).error();
  auto trusted = check_peer(**connection, path);
  if (!trusted) return std::move(trusted).error();

  wire::HelloT hello;
  hello.protocol_version = shm::kProtocolVersion;
  hello.version = STILLFRAME_VERSION;
  hello.role = options.role;
  if (options.answer_ms != 0) deadline = deadline.earlier_of(Deadline::after_ms(options.answer_ms));
  auto reply = (*connection)->call(shm::make_message(0, std::move(hello)), {}, deadline);
  if (!reply) return std::move(reply).error();
  const wire::HelloReplyT* const answer = reply->message.body.AsHelloReply();
  if (answer == nullptr || answer->protocol_version != shm::kProtocolVersion) {
    return Error(Code::kInvalidArgument,
                 concat("what listens at ", path, " does not speak protocol version ",
                        shm::kProtocolVersion, "; use the daemon of this version"));
  }
  return Dialled{.connection = *std::move(connection),
                 .socket_path = path,
                 .daemon_version = answer->version,
                 .daemon_nonce = answer->daemon_nonce};
}

// Between two tries, never past the deadline: there is no event to wait for while another daemon
// ends.
void pause(Rng& rng, int& pause_ms, Deadline deadline) {
  const int jittered_ms =
      kPauseMsMin + static_cast<int>(rng.next() % static_cast<std::uint64_t>(pause_ms));
  (void)::poll(nullptr, 0, std::min(jittered_ms, deadline.rest_ms()));
  pause_ms = std::min(2 * pause_ms, kPauseMsMax);
}

Error nobody_listens(const shm::SocketCandidates& places, const std::optional<Error>& reason) {
  std::string tried;
  for (const std::string& path : places.paths) {
    tried += concat(tried.empty() ? "" : ", ", path);
  }
  return Error(Code::kUnavailable,
               concat("no daemon at ", tried, reason ? ": " : "",
                      reason ? reason->message() : std::string_view()),
               reason ? reason->native() : 0);
}

}  // namespace

Result<Dialled> dial(const DialOptions& options, Rng& rng, Deadline deadline) {
  const auto places = places_to_try(options);
  if (!places) return places.error();
  int pause_ms = 4 * kPauseMsMin;
  for (;;) {
    std::optional<Error> reason;
    for (const std::string& path : places->paths) {
      auto dialled = greet(path, options, deadline);
      if (dialled) return dialled;
      reason.emplace(std::move(dialled).error());
    }
    // What another try cannot change: a foreign daemon, or a socket that we may not open.
    if (reason && reason->code() == Code::kInvalidArgument) return *reason;
    if (reason && reason->native() == ETIMEDOUT && options.answer_ms != 0) return *reason;
    if (!places->may_start || deadline.has_passed()) return nobody_listens(*places, reason);

    const auto program = find_daemon(options.daemon_path);
    if (!program) return program.error();
    auto started = start_daemon(*program, places->paths.back(), deadline);
    if (!started) return std::move(started).error();
    auto dialled = greet(places->paths.back(), options, deadline);
    if (dialled) return dialled;
    pause(rng, pause_ms, deadline);
  }
}

}  // namespace stillframe::client
