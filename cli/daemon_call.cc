#include "cli/daemon_call.h"

#include <utility>
#include <vector>

#include "base/text.h"
#include "cli/text.h"
#include "shm/channel.h"
#include "shm/socket_path.h"

namespace stillframe::cli {

namespace wire = shm::wire;

namespace {

struct Connected {
  shm::Channel channel;
  std::string socket_path;
};

Result<Connected> connect(const Options& options) {
  std::vector<std::string> paths;
  if (!options.socket_path.empty()) {
    paths.push_back(options.socket_path);
  } else {
    auto candidates = shm::socket_candidates();
    if (!candidates) return std::move(candidates).error();
    paths = std::move(candidates->paths);
  }
  for (std::string& path : paths) {
    auto channel = shm::Channel::connect(path);
    if (channel) {
      return Connected{.channel = *std::move(channel), .socket_path = std::move(path)};
    }
  }
  return Error(Code::kNotFound,
               concat("no daemon listens at ", joined(paths, " or "),
                      "; the first save of a trainer starts one, or name it with --socket"));
}

// One request, one answer. What a daemon sends unasked carries request 0 and is passed over.
Result<wire::MessageT> exchange(Tool& tool, shm::Channel& channel, const wire::MessageT& request,
                                std::int64_t deadline_ns) {
  auto sent = channel.send(request);
  if (!sent) return std::move(sent).error();
  if (!*sent) return Error(Code::kUnavailable, "the daemon does not read its socket");
  for (;;) {
    const std::int64_t left_ms = (deadline_ns - tool.clock().monotonic_ns()) / 1'000'000;
    if (left_ms <= 0) {
      return Error(Code::kUnavailable, "the daemon did not answer in time; try again");
    }
    auto readable = channel.wait_readable(static_cast<int>(left_ms));
    if (!readable) return std::move(readable).error();
    if (!*readable) continue;
    auto packet = channel.receive();
    if (!packet) return std::move(packet).error();
    if (!*packet || (*packet)->message.request != request.request) continue;
    if (const wire::FailureT* failure = (*packet)->message.body.AsFailure(); failure != nullptr) {
      return shm::from_wire(*failure);
    }
    return std::move((*packet)->message);
  }
}

}  // namespace

Result<DaemonAnswer> call_daemon(Tool& tool, wire::MessageT request, int timeout_ms) {
  auto connected = connect(tool.options());
  if (!connected) return std::move(connected).error();
  const std::int64_t deadline_ns =
      tool.clock().monotonic_ns() + std::int64_t{timeout_ms} * 1'000'000;

  wire::HelloT hello;
  hello.protocol_version = shm::kProtocolVersion;
  hello.version = STILLFRAME_VERSION;
  hello.role = "tool";
  auto greeted =
      exchange(tool, connected->channel, shm::make_message(1, std::move(hello)), deadline_ns);
  if (!greeted) return std::move(greeted).error();

  request.request = 2;
  auto answer = exchange(tool, connected->channel, request, deadline_ns);
  if (!answer) return std::move(answer).error();
  return DaemonAnswer{.message = *std::move(answer),
                      .socket_path = std::move(connected->socket_path)};
}

}  // namespace stillframe::cli
