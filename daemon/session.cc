#include "daemon/session.h"

#include <fcntl.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <filesystem>
#include <utility>

#include "base/os_error.h"
#include "base/text.h"
#include "format/manifest.h"
#include "format/names.h"
#include "format/utf8.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77  // Linux 6.5; asm-generic/socket.h.
#endif

namespace stillframe::daemon {

namespace wire = shm::wire;
using asio::posix::stream_descriptor;

namespace {

constexpr std::uint32_t kSlotCountMax = 8;
constexpr std::chrono::milliseconds kBusyTimeoutMax = std::chrono::minutes(10);
constexpr std::size_t kRunPathBytesMax = 3000;
constexpr std::size_t kLaneBytesMax = 512;
constexpr std::chrono::seconds kHelloTimeout{5};

// Tells the peer's end even when forked children still hold its socket open (SHM-15). Empty where
// the kernel has neither way; then the socket's end is all we see.
UniqueFd open_pidfd(int socket, pid_t pid) {
  int fd = -1;
  socklen_t bytes = sizeof fd;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &bytes) == 0) return UniqueFd(fd);
  return UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
}

// Where the daemon looks a run up: absolute, links in its parents resolved.
Result<std::string> canonical_run_path(const std::string& path) {
  if (path.empty() || path.size() > kRunPathBytesMax || path[0] != '/' ||
      path.find('\0') != std::string::npos) {
    return Error(Code::kInvalidArgument,
                 concat("run path of ", path.size(),
                        " bytes: must be absolute, without NUL, at most ", kRunPathBytesMax));
  }
  std::error_code error;
  auto canonical = std::filesystem::weakly_canonical(path, error);
  if (error) return os_error(concat("resolve ", path), error.value());
  std::string text = canonical.string();
  while (text.size() > 1 && text.back() == '/') text.pop_back();
  return text;
}

constexpr std::size_t kBestCountMax = 16;

Result<catalog::RetentionPolicy> retention_of(const wire::AttachT& request) {
  if (request.best.size() > kBestCountMax) {
    return Error(Code::kInvalidArgument,
                 concat(request.best.size(), " criteria of best, at most ", kBestCountMax));
  }
  catalog::RetentionPolicy policy{
      .keep_last = request.keep_last, .keep_every = request.keep_every, .best = {}};
  for (const auto& best : request.best) {
    if (!format::is_metric_name(best->metric)) {
      return Error(Code::kInvalidArgument, concat("best: ", format::printable(best->metric),
                                                  " is not the name of a metric"));
    }
    const auto mode = best->is_max ? format::BestMode::kMax : format::BestMode::kMin;
    policy.best.push_back({.rule = {.metric = best->metric, .mode = mode}, .count = best->count});
  }
  return policy;
}

}  // namespace

Session::Session(Environment& environment, SessionHost& host, shm::Channel channel,
                 shm::PeerCredentials peer)
    : environment_(environment),
      host_(host),
      channel_(std::move(channel)),
      peer_(peer),
      socket_(environment.context, channel_.fd()),
      tasks_(environment.context),
      outgoing_changed_(environment.context),
      greeted_(environment.context) {
  if (UniqueFd pidfd = open_pidfd(channel_.fd(), peer.pid); pidfd) {
    pidfd_.emplace(environment.context, pidfd.release());
  }
}

asio::awaitable<void> Session::run() {
  // This frame holds the last reference until every task is joined.
  const auto self = shared_from_this();
  tasks_.spawn(write_messages());
  tasks_.spawn(expect_hello());
  if (pidfd_) tasks_.spawn(watch_peer());
  co_await read_messages();
  stop("the trainer went away");
  co_await tasks_.join();
  (void)socket_.release();  // The channel closes it.
}

void Session::stop(const std::string& reason) {
  if (is_ending_) return;
  is_ending_ = true;
  leave_run(false, reason);
  boost::system::error_code ignored;
  socket_.cancel(ignored);
  if (pidfd_) pidfd_->cancel(ignored);
  if (ring_event_) ring_event_->cancel(ignored);
  outgoing_changed_.notify();
  greeted_.notify();
}

void Session::leave_run(bool clean, const std::string& reason) {
  if (!run_) return;
  if (capturing_) {
    // What was published before the end may complete the capture only if the client said so.
    (void)run_->end_capture(*capturing_, Error(Code::kCancelled, reason));
    capturing_.reset();
  }
  run_->leave(clean);
  run_.reset();
}

// Half-open connections must not fill the places of those that have something to say.
asio::awaitable<void> Session::expect_hello() {
  const auto deadline = std::chrono::steady_clock::now() + kHelloTimeout;
  while (role_.empty() && !is_ending_ && std::chrono::steady_clock::now() < deadline) {
    co_await greeted_.wait(deadline);
  }
  if (!role_.empty() || is_ending_) co_return;
  environment_.log.warn("client pid={} dropped: it said no Hello", peer_.pid);
  stop("the client said no Hello");
}

asio::awaitable<void> Session::watch_peer() {
  const auto result = co_await pidfd_->async_wait(stream_descriptor::wait_read,
                                                  asio::as_tuple(asio::use_awaitable));
  if (std::get<0>(result)) co_return;
  // What it sent before its death still counts: a capture that it ended is a snapshot.
  is_peer_dead_ = true;
  // A request that it still waited for is all that there can be: it sends nothing beside it.
  if (is_handling_) stop("the trainer died");
  boost::system::error_code ignored;
  socket_.cancel(ignored);
}

asio::awaitable<void> Session::read_messages() {
  while (!is_ending_) {
    auto received = channel_.receive();
    if (!received) {
      if (received.error().code() == Code::kInvalidArgument) {
        environment_.log.warn("client pid={} dropped: {}", peer_.pid, received.error().message());
      }
      co_return;
    }
    if (*received) {
      shm::Packet packet = **std::move(received);
      is_handling_ = true;
      co_await handle(std::move(packet));
      is_handling_ = false;
      offer_slot();
      continue;
    }
    if (is_peer_dead_) co_return;
    // Ends with an error when the session ends or the peer dies; the loop looks which.
    (void)co_await socket_.async_wait(stream_descriptor::wait_read,
                                      asio::as_tuple(asio::use_awaitable));
  }
}

asio::awaitable<void> Session::write_messages() {
  while (!is_ending_) {
    if (outgoing_.empty()) {
      co_await outgoing_changed_.wait();
      continue;
    }
    std::vector<int> fds;
    for (const UniqueFd& fd : outgoing_.front().fds) fds.push_back(fd.get());
    auto sent = channel_.send(outgoing_.front().message, fds);
    if (!sent) {
      stop("the trainer's socket failed");
      co_return;
    }
    if (*sent) {
      outgoing_.pop_front();
      continue;
    }
    const auto waited = co_await socket_.async_wait(stream_descriptor::wait_write,
                                                    asio::as_tuple(asio::use_awaitable));
    if (std::get<0>(waited) && is_peer_dead_) co_return;
  }
}

void Session::queue(wire::MessageT message, std::vector<UniqueFd> fds) {
  if (is_ending_) return;
  if (outgoing_.size() >= kOutgoingCountMax) {
    // It has not read for a thousand messages: stopped, or hostile.
    stop("the client does not read");
    return;
  }
  outgoing_.push_back({.message = std::move(message), .fds = std::move(fds)});
  outgoing_changed_.notify();
}

void Session::answer_to(std::uint64_t id, Result<wire::MessageT> answer) {
  if (answer) {
    answer->request = id;
    queue(*std::move(answer));
  } else {
    queue(shm::make_message(id, shm::to_wire(answer.error())));
  }
}

asio::awaitable<void> Session::handle(shm::Packet packet) {
  const std::uint64_t id = packet.message.request;
  const auto reply = [this, id](Result<wire::MessageT> answer) {
    answer_to(id, std::move(answer));
  };
  const wire::BodyUnion& body = packet.message.body;
  if (role_.empty() && body.type != wire::Body::Hello) {
    stop("the client did not begin with Hello");
    co_return;
  }
  switch (body.type) {
    case wire::Body::Hello: {
      const wire::HelloT& hello = *body.AsHello();
      if (hello.protocol_version != shm::kProtocolVersion) {
        reply(Error(Code::kInvalidArgument,
                    concat("protocol version ", hello.protocol_version, ", this daemon speaks ",
                           shm::kProtocolVersion, "; restart the daemon or the trainer")));
        co_return;
      }
      role_ = hello.role.empty() ? "client" : hello.role.substr(0, 32);
      greeted_.notify();
      wire::HelloReplyT answer;
      answer.protocol_version = shm::kProtocolVersion;
      answer.version = STILLFRAME_VERSION;
      answer.daemon_nonce = environment_.instance_nonce;
      reply(shm::make_message(id, std::move(answer)));
      co_return;
    }
    case wire::Body::Attach: {
      auto answer = co_await attach(*body.AsAttach());
      reply(std::move(answer));
      co_return;
    }
    case wire::Body::RegisterLayout: {
      auto answer = co_await register_layout(*body.AsRegisterLayout(), std::move(packet.fds));
      if (!answer) {
        reply(std::move(answer).error());
        co_return;
      }
      answer->message.request = id;
      queue(std::move(answer->message), std::move(answer->fds));
      // After the reply, so that the client knows the layout that they are about.
      if (run_ && run_->arena() != nullptr) {
        for (std::size_t i = 0; i < run_->arena()->slots().size(); ++i) {
          if (run_->arena()->slots()[i].state != RankArena::SlotState::kPreparing) {
            tell_ready(plan_->layout_id, i);
          }
        }
      }
      co_return;
    }
    case wire::Body::BeginSave: {
      const bool takes_offer = body.AsBeginSave()->offered_ticket != 0;
      auto answer = co_await begin_save(*body.AsBeginSave(), std::move(packet.fds));
      if (!takes_offer) {
        reply(std::move(answer));
      } else if (!answer) {
        // It goes on as if the save had begun, and nothing that it may send can be refused.
        environment_.log.warn("client pid={} dropped: {}", peer_.pid, answer.error().message());
        stop(std::string(answer.error().message()));
      }
      co_return;
    }
    case wire::Body::EndCapture: {
      // Has no reply: the save's end says it.
      auto ended = end_capture(*body.AsEndCapture());
      if (!ended) {
        environment_.log.warn("client pid={} dropped: {}", peer_.pid, ended.error().message());
        stop(std::string(ended.error().message()));
      }
      co_return;
    }
    case wire::Body::Settle: {
      auto answer = co_await settle(*body.AsSettle());
      reply(std::move(answer));
      co_return;
    }
    case wire::Body::OpenGpuWorker: {
      auto answer = co_await open_gpu_worker(*body.AsOpenGpuWorker());
      if (!answer) {
        reply(std::move(answer).error());
        co_return;
      }
      answer->message.request = id;
      queue(std::move(answer->message), std::move(answer->fds));
      co_return;
    }
    case wire::Body::LaneInUse: {
      const wire::LaneInUseT& lane = *body.AsLaneInUse();
      if (run_)
        run_->set_lane(lane.lane.substr(0, kLaneBytesMax), lane.reason.substr(0, kLaneBytesMax));
      co_return;
    }
    case wire::Body::LendSlot: reply(lend_slot(*body.AsLendSlot())); co_return;
    case wire::Body::ReturnSlot:
      if (run_) run_->return_slot(body.AsReturnSlot()->slot);
      reply(shm::make_message(id, wire::DoneT()));
      co_return;
    case wire::Body::Retire: {
      const wire::RetireT& request = *body.AsRetire();
      start_change(id, request.run_path, std::nullopt, request.sequence);
      co_return;
    }
    case wire::Body::SetTag: {
      const wire::SetTagT& request = *body.AsSetTag();
      start_change(id, request.run_path, request.tag, request.sequence);
      co_return;
    }
    case wire::Body::Status: {
      wire::StatusReplyT answer;
      answer.json = host_.status_json();
      reply(shm::make_message(id, std::move(answer)));
      co_return;
    }
    case wire::Body::Detach:
      leave_run(true, "the trainer detached");
      reply(shm::make_message(id, wire::DoneT()));
      co_return;
    case wire::Body::NONE:
    case wire::Body::Failure:
    case wire::Body::HelloReply:
    case wire::Body::AttachReply:
    case wire::Body::LayoutReply:
    case wire::Body::SlotReady:
    case wire::Body::BeginSaveReply:
    case wire::Body::SaveEnded:
    case wire::Body::SettleReply:
    case wire::Body::LendSlotReply:
    case wire::Body::Done:
    case wire::Body::StatusReply:
    case wire::Body::SlotOffer:
    case wire::Body::GpuWorkerReply:
    case wire::Body::ServeClient:
    case wire::Body::GpuWorkerReady:
    case wire::Body::GpuWorkerIdle:
    case wire::Body::MakeGpuRing:
    case wire::Body::GpuRingReply:
    case wire::Body::DrainGpuRing:
    case wire::Body::PlanGpu:
    case wire::Body::LeaseGpu:
    case wire::Body::CaptureGpu:
    case wire::Body::GpuChunk:
    case wire::Body::HurryGpu: break;
  }
  environment_.log.warn("client pid={} dropped: it sent a message that is not for a daemon",
                        peer_.pid);
  stop("the client sent a message that is not for a daemon");
}

Task<wire::MessageT> Session::attach(const wire::AttachT& request) {
  if (run_) co_return Error(Code::kInvalidArgument, "this connection is attached already");
  if (request.world_size != 1 || request.rank != 0) {
    co_return Error(Code::kInvalidArgument,
                    concat("rank ", request.rank, " of ", request.world_size,
                           ": this version serves runs of one rank (world size 1)"));
  }
  auto path = canonical_run_path(request.run_path);
  if (!path) co_return std::move(path).error();

  TrainerOptions options;
  options.rank = request.rank;
  options.world_size = request.world_size;
  auto retention = retention_of(request);
  if (!retention) co_return std::move(retention).error();
  options.retention = *std::move(retention);
  options.framework = request.framework.substr(0, 128);
  options.python_version = request.python_version.substr(0, 64);
  options.arena_bytes_max = request.arena_bytes_max;
  options.slot_count = request.slot_count == 0 ? 2 : std::min(request.slot_count, kSlotCountMax);

  run_path_ = *path;
  auto opened = co_await host_.open_run(*path, request.force_filesystem);
  if (!opened) co_return std::move(opened).error();
  if (is_ending_) co_return Error(Code::kCancelled, "the client went away");
  auto entered = (*opened)->enter(std::move(options), peer_.pid);
  if (!entered) co_return std::move(entered).error();
  run_ = *std::move(opened);

  wire::AttachReplyT answer;
  answer.run_id = run_->contents().run_id;
  const catalog::Checkpoint* newest = run_->contents().newest();
  answer.newest_sequence = newest == nullptr ? 0 : newest->manifest.sequence;
  answer.warnings = run_->warnings();
  co_return shm::make_message(0, std::move(answer));
}

Task<Session::Outgoing> Session::register_layout(const wire::RegisterLayoutT& request,
                                                 std::vector<UniqueFd> fds) {
  if (!run_) co_return Error(Code::kInvalidArgument, "attach to a run first");
  if (capturing_) co_return Error(Code::kInvalidArgument, "a capture is in progress");
  if (fds.empty()) co_return Error(Code::kInvalidArgument, "the layout's memfd is missing");
  auto blob = shm::read_sealed_memfd(fds[0].get(), request.layout_bytes, shm::kLayoutBytesMax);
  if (!blob) co_return std::move(blob).error();
  auto plan = plan_snapshot(std::as_bytes(std::span(*blob)));
  if (!plan) co_return std::move(plan).error();
  auto shared_plan = std::make_shared<const SnapshotPlan>(*std::move(plan));

  auto ring = shm::RingConsumer::create(shm::ring_capacity_for(shared_plan->extent_count));
  if (!ring) co_return std::move(ring).error();

  UniqueFd kept = fds.size() > 1 ? std::move(fds[1]) : UniqueFd();
  std::function<void(std::size_t)> on_ready =
      [weak = weak_from_this(), layout_id = shared_plan->layout_id](std::size_t slot) {
        // While the reply is not out yet, plan_ is an earlier one; handle() tells those.
        const auto session = weak.lock();
        if (session && session->plan_ && session->plan_->layout_id == layout_id) {
          session->tell_ready(layout_id, slot);
          session->offer_slot();
        }
      };
  std::function<void()> on_free = [weak = weak_from_this(), layout_id = shared_plan->layout_id] {
    const auto session = weak.lock();
    if (session && session->plan_ && session->plan_->layout_id == layout_id) session->offer_slot();
  };
  const std::shared_ptr<Run> run = run_;
  auto registered = co_await run->register_layout(shared_plan, std::move(kept), std::move(on_ready),
                                                  std::move(on_free));
  if (!registered) co_return std::move(registered).error();
  if (is_ending_ || !run_) co_return Error(Code::kCancelled, "the client went away");

  if (ring_event_) {
    boost::system::error_code ignored;
    ring_event_->cancel(ignored);
  }
  ring_.emplace(*std::move(ring));
  plan_ = shared_plan;
  ring_event_ = std::make_shared<stream_descriptor>(environment_.context,
                                                    ::fcntl(ring_->event_fd(), F_DUPFD_CLOEXEC, 0));
  tasks_.spawn(watch_ring(ring_event_));

  Outgoing answer;
  wire::LayoutReplyT reply;
  reply.layout_id = plan_->layout_id;
  reply.slot_count = static_cast<std::uint32_t>(registered->arena->slots().size());
  reply.slot_bytes = registered->arena->slot_bytes();
  reply.ring_capacity = shm::ring_capacity_for(plan_->extent_count);
  reply.arena_kept = registered->is_kept;
  answer.message = shm::make_message(0, std::move(reply));
  for (const int fd : {registered->arena->memory_fd(), ring_->memory_fd(), ring_->event_fd()}) {
    answer.fds.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!answer.fds.back()) co_return os_error("duplicate a descriptor for the client", errno);
  }
  co_return answer;
}

void Session::tell_ready(std::uint64_t layout_id, std::size_t slot) {
  wire::SlotReadyT ready;
  ready.layout_id = layout_id;
  ready.slot = static_cast<std::uint32_t>(slot);
  ready.page_kind = name(run_->arena()->slots()[slot].page_kind);
  queue(shm::make_message(0, std::move(ready)));
}

void Session::offer_slot() {
  // Not while a request is at work: it may be one that waits for that slot.
  if (is_ending_ || is_handling_ || !run_ || !plan_ || capturing_) return;
  const auto offer = run_->offer_slot();
  if (!offer) return;
  wire::SlotOfferT message;
  message.layout_id = plan_->layout_id;
  message.ticket = offer->ticket;
  message.slot = static_cast<std::uint32_t>(offer->slot);
  message.sequence = offer->sequence;
  queue(shm::make_message(0, std::move(message)));
}

Result<std::string> Session::state_of(const wire::BeginSaveT& request, std::vector<UniqueFd> fds) {
  if (request.state.size() == request.state_bytes) {
    return std::string(request.state.begin(), request.state.end());
  }
  if (fds.empty()) return Error(Code::kInvalidArgument, "the memfd of state.json is missing");
  return shm::read_sealed_memfd(fds[0].get(), request.state_bytes, format::kStateBytesMax);
}

Task<wire::MessageT> Session::begin_save(const wire::BeginSaveT& request,
                                         std::vector<UniqueFd> fds) {
  if (!run_ || !plan_) co_return Error(Code::kInvalidArgument, "register a layout first");
  if (capturing_) {
    co_return Error(Code::kInvalidArgument, "the capture before has not ended: one at a time");
  }
  auto state = state_of(request, std::move(fds));
  if (!state) co_return std::move(state).error();

  const std::int64_t asked_ns = environment_.clock.monotonic_ns();
  Run::Begin begin;
  begin.step = request.step;
  for (const auto& metric : request.metrics) begin.metrics[metric->name] = metric->value;
  begin.state_json = *std::move(state);
  begin.has_pickle = request.has_pickle;
  begin.offered_ticket = request.offered_ticket;
  begin.deadline = std::chrono::steady_clock::now() +
                   std::min(std::chrono::milliseconds(request.busy_timeout_ms), kBusyTimeoutMax);

  std::function<void(const ActiveSave&, const std::optional<Error>&, std::int64_t)> on_ended =
      [weak = weak_from_this()](const ActiveSave& save, const std::optional<Error>& failure,
                                std::int64_t ended_ns) {
        if (const auto session = weak.lock()) session->tell_ended(save, failure, ended_ns);
      };
  const std::shared_ptr<Run> run = run_;
  auto save = co_await run->begin_save(std::move(begin), plan_, std::move(on_ended));
  if (!save) co_return std::move(save).error();
  if (is_ending_) {
    (void)run->end_capture(**save, Error(Code::kCancelled, "the client went away"));
    co_return Error(Code::kCancelled, "the client went away");
  }
  capturing_ = *std::move(save);
  for (const shm::ExtentRecord& record : std::exchange(early_records_, {})) {
    if (record.ticket != capturing_->ticket) continue;
    auto accepted = capturing_->stream.accept(record);
    if (!accepted) co_return std::move(accepted).error();
  }

  wire::BeginSaveReplyT answer;
  answer.ticket = capturing_->ticket;
  answer.slot = static_cast<std::uint32_t>(capturing_->slot);
  answer.sequence = capturing_->request.sequence;
  answer.busy_wait_ns = static_cast<std::uint64_t>(capturing_->accepted_ns - asked_ns);
  co_return shm::make_message(0, std::move(answer));
}

Status Session::end_capture(const wire::EndCaptureT& request) {
  if (!capturing_ || capturing_->ticket != request.ticket) {
    return Error(Code::kInvalidArgument,
                 concat("EndCapture for ticket ", request.ticket, ", which captures nothing"));
  }
  auto drained = drain_ring();
  if (!drained) return drained;
  const std::shared_ptr<ActiveSave> save = std::exchange(capturing_, nullptr);
  std::optional<Error> reason;
  if (!request.complete) reason.emplace(Code::kCancelled, request.reason);
  return run_->end_capture(*save, std::move(reason));
}

asio::awaitable<void> Session::watch_ring(std::shared_ptr<stream_descriptor> event) {
  while (!is_ending_) {
    const auto waited = co_await event->async_wait(stream_descriptor::wait_read,
                                                   asio::as_tuple(asio::use_awaitable));
    // Another layout has another ring, and another of these coroutines.
    if (std::get<0>(waited) || event != ring_event_) co_return;
    ring_->clear_event();
    auto drained = drain_ring();
    if (!drained) {
      environment_.log.warn("client pid={} dropped: {}", peer_.pid, drained.error().message());
      stop(std::string(drained.error().message()));
    }
  }
}

Status Session::drain_ring() {
  if (!ring_) return ok();
  auto records = ring_->take();
  if (!records) return std::move(records).error();
  for (const shm::ExtentRecord& record : *records) {
    if (!capturing_ && run_ && run_->offer() && record.ticket == run_->offer()->ticket) {
      if (early_records_.size() >= plan_->extent_count) {
        return Error(Code::kInvalidArgument, "ring: more extents than the layout has");
      }
      early_records_.push_back(record);
      continue;
    }
    // A copier may still publish what belongs to a capture that was voided: dropped (DUR-13).
    if (!capturing_ || record.ticket != capturing_->ticket) continue;
    auto accepted = capturing_->stream.accept(record);
    if (!accepted) return accepted;
  }
  return ok();
}

void Session::tell_ended(const ActiveSave& save, const std::optional<Error>& failure,
                         std::int64_t ended_ns) {
  wire::SaveEndedT ended;
  ended.ticket = save.ticket;
  ended.sequence = save.request.sequence;
  ended.durable_ns = ended_ns;
  if (failure) ended.failure = std::make_unique<wire::FailureT>(shm::to_wire(*failure));
  queue(shm::make_message(0, std::move(ended)));
}

Task<wire::MessageT> Session::settle(const wire::SettleT& request) {
  if (!run_) co_return Error(Code::kInvalidArgument, "attach to a run first");
  const std::shared_ptr<Run> run = run_;
  auto settled = co_await run->settle(std::chrono::steady_clock::now() +
                                      std::chrono::milliseconds(request.timeout_ms));
  if (!settled) co_return std::move(settled).error();
  wire::SettleReplyT answer;
  const catalog::Checkpoint* newest = run->contents().newest();
  answer.newest_sequence = newest == nullptr ? 0 : newest->manifest.sequence;
  co_return shm::make_message(0, std::move(answer));
}

Task<Session::Outgoing> Session::open_gpu_worker(const wire::OpenGpuWorkerT& request) {
  if (!run_ || !plan_) co_return Error(Code::kInvalidArgument, "register a layout first");
  std::string uuid = request.gpu_uuid;
  std::shared_ptr<RankArena> arena = run_->shared_arena();
  auto opened = co_await host_.open_gpu_worker(std::move(uuid), std::move(arena));
  if (!opened) co_return std::move(opened).error();
  Outgoing answer;
  wire::GpuWorkerReplyT reply;
  reply.pid = opened->pid;
  answer.message = shm::make_message(0, std::move(reply));
  answer.fds.push_back(std::move(opened->socket));
  co_return answer;
}

Result<wire::MessageT> Session::lend_slot(const wire::LendSlotT& request) {
  wire::LendSlotReplyT answer;
  if (run_ && plan_) {
    if (const auto slot = run_->lend_slot(request.sequence, plan_->layout_id)) {
      answer.found = true;
      answer.slot = static_cast<std::uint32_t>(*slot);
      answer.layout_id = plan_->layout_id;
    }
  }
  return shm::make_message(0, std::move(answer));
}

void Session::start_change(std::uint64_t id, std::string run_path, std::optional<std::string> tag,
                           std::uint64_t sequence) {
  if (change_count_ >= kChangeCountMax) {
    answer_to(
        id, Error(Code::kResourceExhausted, concat(change_count_,
                                                   " changes of this connection wait for the run's "
                                                   "files; send the next when one is answered")));
    return;
  }
  ++change_count_;
  tasks_.spawn(change_run_and_answer(id, std::move(run_path), std::move(tag), sequence));
}

asio::awaitable<void> Session::change_run_and_answer(std::uint64_t id, std::string run_path,
                                                     std::optional<std::string> tag,
                                                     std::uint64_t sequence) {
  auto answer = co_await change_run(std::move(run_path), std::move(tag), sequence);
  --change_count_;
  answer_to(id, std::move(answer));
}

Task<wire::MessageT> Session::change_run(std::string run_path, std::optional<std::string> tag,
                                         std::uint64_t sequence) {
  auto path = canonical_run_path(run_path);
  if (!path) co_return std::move(path).error();
  auto run = host_.find_run(*path);
  if (!run) co_return std::move(run).error();
  Result<Unit> done = ok();
  if (tag) {
    done = co_await (*run)->set_tag(*std::move(tag), sequence);
  } else {
    done = co_await (*run)->retire(sequence);
  }
  if (!done) {
    // Who asked may not wait for the answer. One that is gone already was asked for twice.
    if (done.error().code() != Code::kNotFound) {
      environment_.log.warn("run={} checkpoint {}: {} failed: {}", *path, sequence,
                            tag ? "tagging" : "removing", done.error().message());
    }
    co_return std::move(done).error();
  }
  co_return shm::make_message(0, wire::DoneT());
}

}  // namespace stillframe::daemon
