#include "client/session.h"

#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "base/mapping.h"
#include "base/out_of_memory.h"
#include "base/step.h"
#include "base/text.h"
#include "client/remove.h"
#include "client/session_errors.h"
#include "format/json.h"
#include "format/manifest.h"

namespace stillframe::client {

namespace wire = shm::wire;

namespace {

// What a healthy daemon takes at most for what it need not wait for.
constexpr std::uint64_t kReplyTimeoutMs = 5'000;
constexpr std::uint64_t kConnectTimeoutMs = 10'000;
// A training that had a daemon waits less long for one that listens and says nothing.
constexpr std::uint64_t kHelloTimeoutMs = 2'000;
constexpr std::uint64_t kFirstSaveWaitMs = 60'000;
// A dead predecessor's end reaches the daemon a moment after a restarted trainer does.
constexpr std::uint64_t kTakeoverMs = 2'000;
constexpr int kTakeoverPauseMs = 20;
constexpr int kRemovePauseMs = 10;
constexpr std::size_t kScratchBytes = std::size_t{8} << 20;
constexpr std::size_t kReadySlotCountMax = 64;
// A dial that took longer than this and failed is not repeated for ten times as long.
constexpr std::int64_t kSlowDialNs = 1'000'000'000;
constexpr std::int64_t kDialPauseNsMax = 60'000'000'000;

kernels::CopyKernel choose_kernel(const Clock& clock) {
  void* const address = ::mmap(nullptr, 2 * kScratchBytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (address == MAP_FAILED) return kernels::runnable_kernels().back();
  const Mapping scratch(address, 2 * kScratchBytes);
  return kernels::choose_kernel(clock, scratch.bytes().first(kScratchBytes),
                                scratch.bytes().subspan(kScratchBytes));
}

// How long the daemon may look for a slot: the first save also waits for the arena's pages.
std::uint64_t slot_wait_ms(const Session::SaveRequest& request, bool is_first) {
  return is_first ? std::max<std::uint64_t>(kFirstSaveWaitMs, request.busy_timeout_ms)
                  : request.busy_timeout_ms;
}

}  // namespace

Session::Session(SessionOptions options)
    : options_(std::move(options)),
      owner_pid_(::getpid()),
      engine_(options_.copier_count != 0 ? options_.copier_count : default_copier_count()),
      gpus_(engine_, options_.gpus,
            [this](const std::string& gpu_uuid) { return open_gpu_worker(gpu_uuid); }) {}

Session::~Session() {
  // Without close(): the daemon learns of it as of a death.
  stop_engines(closed_error());
  if (const auto open = connection()) {
    open->set_handlers({});
    open->drop(closed_error());
  }
}

Result<std::shared_ptr<Session>> Session::attach(SessionOptions options, Deadline deadline) {
  std::shared_ptr<Session> session(new Session(std::move(options)));
  auto connected = session->connect(deadline);
  if (!connected) return std::move(connected).error();
  session->kernel_ = choose_kernel(session->clock_);
  return session;
}

// --- Connecting ----------------------------------------------------------------------------------

Status Session::connect(Deadline deadline) {
  const std::int64_t begin_ns = clock_.monotonic_ns();
  DialOptions how = options_.dial;
  if (is_attached_) how.answer_ms = kHelloTimeoutMs;
  auto dialled = dial(how, rng_, deadline);
  if (!dialled) {
    const std::int64_t duration_ns = clock_.monotonic_ns() - begin_ns;
    dial_again_ns_ = 0;
    if (duration_ns >= kSlowDialNs) {
      dial_error_ = dialled.error();
      dial_again_ns_ = clock_.monotonic_ns() + std::min(10 * duration_ns, kDialPauseNsMax);
    }
    return std::move(dialled).error();
  }
  socket_path_ = std::move(dialled->socket_path);
  daemon_version_ = std::move(dialled->daemon_version);
  gpus_.drop_workers();
  told_lane_ = "host";
  const std::shared_ptr<Connection> fresh = std::move(dialled->connection);
  auto attached = attach_run(*fresh, deadline);
  if (!attached) return attached;
  {
    const std::lock_guard lock(mutex_);
    connection_ = fresh;
    layout_id_ = 0;
    ready_slots_.clear();
    offer_.reset();
  }
  fresh->set_handlers(
      {.on_message = [this](wire::MessageT message) { on_message(std::move(message)); },
       .on_gone = [this](const Error& reason) { on_gone(reason); }});
  return ok();
}

Status Session::attach_run(Connection& connection, Deadline deadline) {
  const Deadline takeover = deadline.earlier_of(Deadline::after_ms(kTakeoverMs));
  for (;;) {
    auto reply = connection.call(shm::make_message(0, options_.attach), {}, deadline);
    if (reply) {
      const wire::AttachReplyT* const answer = reply->message.body.AsAttachReply();
      if (answer == nullptr) return protocol_error("no AttachReply");
      // Those of the first attach: the caller may hold the text until the session ends.
      if (!is_attached_) {
        for (const std::string& warning : answer->warnings) {
          warnings_ += concat(warnings_.empty() ? "" : "\n", warning);
        }
      }
      is_attached_ = true;
      return ok();
    }
    if (reply.error().code() != Code::kUnavailable || !connection.is_open() ||
        takeover.has_passed()) {
      return std::move(reply).error();
    }
    (void)::poll(nullptr, 0, std::min(kTakeoverPauseMs, takeover.rest_ms()));
  }
}

Status Session::ensure_connected(Deadline deadline) {
  const auto current = connection();
  if (current) current->take_in();
  if (current && current->is_open()) return ok();
  if (capturing_) {
    // Its ticket has failed with the daemon; nothing may write to the slot when the arena goes.
    stop_engines(gone_error());
    capturing_.reset();
  }
  if (dial_again_ns_ > clock_.monotonic_ns()) return *dial_error_;
  auto connected = connect(deadline);
  if (!connected) return connected;
  if (!layout_) return ok();
  const std::shared_ptr<const Layout> wanted = layout_;
  auto registered = or_out_of_memory([&] { return send_layout(wanted, deadline); });
  if (!registered) {
    // Attached without its layout it is of no use; the next attempt begins afresh.
    layout_ = wanted;
    connection()->drop(registered.error());
  }
  return registered;
}

std::shared_ptr<Connection> Session::connection() const {
  const std::lock_guard lock(mutex_);
  return connection_;
}

void Session::on_message(wire::MessageT message) {
  if (const wire::SaveEndedT* const ended = message.body.AsSaveEnded(); ended != nullptr) {
    std::optional<Error> failure;
    if (ended->failure) failure = shm::from_wire(*ended->failure);
    const std::uint64_t ticket = tickets_.set_ended(ended->ticket, failure, ended->durable_ns);
    if (failure && ticket != 0) engine_.abort(ticket, *failure);
    return;
  }
  if (const wire::SlotReadyT* const ready = message.body.AsSlotReady(); ready != nullptr) {
    const std::lock_guard lock(mutex_);
    if (ready_slots_.size() < kReadySlotCountMax) {
      ready_slots_.push_back(
          {.layout_id = ready->layout_id, .slot = ready->slot, .page_kind = ready->page_kind});
    }
  }
  if (const wire::SlotOfferT* const offer = message.body.AsSlotOffer(); offer != nullptr) {
    const std::lock_guard lock(mutex_);
    offer_ = Offer{.layout_id = offer->layout_id,
                   .ticket = offer->ticket,
                   .slot = offer->slot,
                   .sequence = offer->sequence};
  }
  // What a newer daemon says beside these concerns newer clients.
}

void Session::on_gone(const Error& reason) {
  tickets_.set_all_failed(
      Error(Code::kUnavailable,
            concat("the daemon was lost before the save was durable: ", reason.message()),
            reason.native()));
  engine_.abort(reason);
}

void Session::abandon(const Error& reason) noexcept {
  tickets_.set_all_failed(reason);
  engine_.abort(reason);
  const auto open = connection();
  if (!open) return;
  // Its handler may want memory for words; what matters has happened by then.
  (void)or_out_of_memory([&] {
    open->drop(reason);
    return ok();
  });
}

// --- Save ----------------------------------------------------------------------------------------

bool Session::has_ready_slot() const {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(
      ready_slots_, [this](const ReadySlot& ready) { return ready.layout_id == layout_id_; });
}

Bytes Session::slot_bytes_of(std::uint32_t slot) const {
  return arena_->bytes().subspan(slot * slot_bytes_, slot_bytes_);
}

Result<std::uint64_t> Session::begin_save(const SaveRequest& request,
                                          std::span<const sf_source> tensors) {
  const std::int64_t begin_ns = clock_.monotonic_ns();
  if (capturing_) {
    return Error(Code::kInvalidArgument, concat("save: the capture of ticket ", capturing_->ticket,
                                                " is neither published nor voided; one at a time"));
  }
  if (!layout_) return Error(Code::kInvalidArgument, "save: register a layout first");
  if (request.step < 0) {
    return Error(Code::kInvalidArgument,
                 concat("step ", request.step, " is negative; steps count from 0"));
  }
  if (request.state_json.size() > format::kStateBytesMax) {
    return Error(Code::kInvalidArgument, concat("save: state.json of ", request.state_json.size(),
                                                " bytes, at most ", format::kStateBytesMax));
  }
  STEP("client begin save");
  auto connected = ensure_connected(Deadline::after_ms(kConnectTimeoutMs));
  if (!connected) return std::move(connected).error();
  const std::uint64_t wait_ms = slot_wait_ms(request, !has_ready_slot());
  const Deadline deadline = Deadline::after_ms(wait_ms + kReplyTimeoutMs);
  auto ticket = begin_attempt(request, tensors, begin_ns);
  if (ticket || connection()->is_open() || deadline.has_passed()) return ticket;
  // The daemon had died, which only the attempt to talk to it told.
  connected = ensure_connected(Deadline::after_ms(kConnectTimeoutMs));
  if (!connected) return std::move(connected).error();
  return begin_attempt(request, tensors, begin_ns);
}

Result<std::uint64_t> Session::begin_attempt(const SaveRequest& request,
                                             std::span<const sf_source> tensors,
                                             std::int64_t begin_ns) {
  try {
    return start_capture(request, tensors, begin_ns);
  } catch (const std::bad_alloc&) {
    // Nobody has the ticket, so nobody could end it.
    if (capturing_) stop_engines(out_of_memory());
    capturing_.reset();
    throw;
  }
}

Result<std::uint64_t> Session::start_capture(const SaveRequest& request,
                                             std::span<const sf_source> tensors,
                                             std::int64_t begin_ns) {
  // Before the daemon gives a slot away for it.
  auto filled = sources_->fill(tensors);
  if (!filled) return std::move(filled).error();
  auto planned = gpus_.plan(layout_, tensors, request.capture == SF_CAPTURE_LAZY);
  if (!planned) return std::move(planned).error();

  tell_lane();

  const bool is_first = !has_ready_slot();
  const std::int64_t asked_ns = clock_.monotonic_ns();
  const std::uint64_t wait_ms = slot_wait_ms(request, is_first);
  auto reply = take_slot(request, wait_ms, Deadline::after_ms(wait_ms + kReplyTimeoutMs));
  if (!reply) return std::move(reply).error();
  capturing_ = Capturing{
      .ticket = 0, .daemon_ticket = reply->ticket, .slot = reply->slot, .check = request.check};
  const std::int64_t accepted_ns = clock_.monotonic_ns();
  auto populated = populate(reply->slot);
  if (!populated) {
    (void)end_capture(populated.error());
    return std::move(populated).error();
  }
  if (gpus_.is_needed() && gpus_.copies_to_slot()) register_slot(reply->slot);

  SaveInfo save;
  save.daemon_ticket = reply->ticket;
  save.sequence = reply->sequence;
  save.step = request.step;
  save.bytes = layout_->bytes;
  save.begin_ns = begin_ns;
  save.accepted_ns = accepted_ns;
  save.first_save_wait_ns = clock_.monotonic_ns() - accepted_ns;
  if (is_first) {
    save.first_save_wait_ns += accepted_ns - asked_ns;
  } else {
    save.busy_wait_ns = static_cast<std::int64_t>(reply->busy_wait_ns);
  }
  const std::uint64_t ticket = tickets_.add(std::move(save));
  capturing_->ticket = ticket;
  auto begun = begin_engines(request, tensors, ticket);
  if (begun && request.capture == SF_CAPTURE_EAGER) {
    // Everything is captured before this returns; the calling thread copies too.
    begun = copy_all(ticket);
    if (begun) begun = end_capture(std::nullopt);
  } else if (begun && gpus_.is_needed() && gpus_.is_eager()) {
    begun = copy_all(ticket);
  }
  if (!begun) {
    if (capturing_) (void)end_capture(begun.error());
    return std::move(begun).error();
  }
  tickets_.set_begin_call_ns(ticket, clock_.monotonic_ns() - begin_ns);
  return ticket;
}

Result<shm::Channel> Session::open_gpu_worker(const std::string& gpu_uuid) {
  constexpr std::uint64_t kPatienceMs = 25'000;  // The daemon's own, and a moment.
  const auto current = connection();
  if (!current) return gone_error();
  wire::OpenGpuWorkerT request;
  request.gpu_uuid = gpu_uuid;
  auto reply = current->call(shm::make_message(0, std::move(request)), {},
                             Deadline::after_ms(kPatienceMs), Connection::WhenLate::kKeep);
  if (!reply) return std::move(reply).error();
  if (reply->message.body.AsGpuWorkerReply() == nullptr || reply->fds.size() != 1) {
    return protocol_error("no GpuWorkerReply");
  }
  return shm::Channel(std::move(reply->fds[0]));
}

// For those who ask the daemon; nothing depends on it.
void Session::tell_lane() {
  std::string lane(gpus_.lane());
  const auto current = connection();
  if (lane == told_lane_ || !current) return;
  wire::LaneInUseT message;
  message.lane = lane;
  message.reason = gpus_.lane_reason();
  (void)current->send(shm::make_message(0, std::move(message)), {},
                      Deadline::after_ms(kSendTimeoutMs));
  told_lane_ = std::move(lane);
}

std::optional<Session::Offer> Session::take_offer() {
  const std::lock_guard lock(mutex_);
  std::optional<Offer> offer = std::exchange(offer_, std::nullopt);
  if (offer && (offer->layout_id != layout_id_ || offer->slot >= slots_.size())) offer.reset();
  return offer;
}

// The slot that the daemon has offered, else the one that it gives when asked.
Result<wire::BeginSaveReplyT> Session::take_slot(const SaveRequest& request, std::uint64_t wait_ms,
                                                 Deadline deadline) {
  const auto current = connection();
  if (!current) return gone_error();
  wire::BeginSaveT message;
  message.step = request.step;
  constexpr std::size_t kMetricBytesMax = 64;  // Besides its name.
  std::size_t metric_bytes = 0;
  for (const auto& [name, value] : request.metrics) {
    metric_bytes += name.size() + kMetricBytesMax;
    auto metric = std::make_unique<wire::MetricT>();
    metric->name = name;
    metric->value = value;
    message.metrics.push_back(std::move(metric));
  }
  message.state_bytes = request.state_json.size();
  message.has_pickle = request.has_pickle;
  message.busy_timeout_ms = static_cast<std::uint32_t>(wait_ms);
  UniqueFd state;
  std::vector<int> fds;
  if (request.state_json.size() + metric_bytes <= shm::kInlineStateBytesMax) {
    message.state.assign(request.state_json.begin(), request.state_json.end());
  } else {
    auto sealed = shm::make_sealed_memfd("stillframe-state", request.state_json);
    if (!sealed) return std::move(sealed).error();
    state = *std::move(sealed);
    fds.push_back(state.get());
  }
  if (const auto offer = take_offer()) {
    message.offered_ticket = offer->ticket;
    auto sent = current->send(shm::make_message(0, std::move(message)), fds, deadline);
    if (!sent) return std::move(sent).error();
    wire::BeginSaveReplyT accepted;
    accepted.ticket = offer->ticket;
    accepted.slot = offer->slot;
    accepted.sequence = offer->sequence;
    return accepted;
  }
  auto reply = current->call(shm::make_message(0, std::move(message)), fds, deadline);
  // One that was on its way ended with the request.
  (void)take_offer();
  // A reply that comes too late would be a save that nobody captures: the connection goes with it.
  if (!reply) return std::move(reply).error();
  const wire::BeginSaveReplyT* const answer = reply->message.body.AsBeginSaveReply();
  if (answer == nullptr || answer->slot >= slots_.size()) {
    const Error error = protocol_error("no BeginSaveReply, or one with a slot that does not exist");
    current->drop(error);
    return error;
  }
  return *answer;
}

// --- Tickets -------------------------------------------------------------------------------------

Result<SaveInfo> Session::find_ticket(std::uint64_t ticket) {
  if (const auto current = connection()) current->take_in();
  auto known = tickets_.find(ticket);
  if (!known) {
    return Error(Code::kInvalidArgument, concat("ticket ", ticket, " is not known; the newest ",
                                                TicketTable::kTicketCountMax, " are"));
  }
  return *std::move(known);
}

Result<Waited> Session::wait_ticket(std::uint64_t ticket, SaveState state, Deadline deadline) {
  STEP("client wait durable");
  if (!tickets_.find(ticket)) {
    return Error(Code::kInvalidArgument, concat("ticket ", ticket, " is not known"));
  }
  std::optional<SaveInfo> known;
  const auto is_reached = [&] {
    known = tickets_.find(ticket);
    // Pushed out by 64 newer ones: nothing more can be learnt of it.
    return !known || known->is_ended() ||
           (state == SaveState::kCaptured && known->state == SaveState::kCaptured);
  };
  const auto current = connection();
  auto waited = current->wait(is_reached, deadline);
  if (!waited) return std::move(waited).error();
  if (!*waited) return Waited::kTimedOut;
  if (!known) {
    return Error(Code::kInvalidArgument, concat("ticket ", ticket, " is not known any more"));
  }
  if (known->failure) return *known->failure;
  return Waited::kReached;
}

Result<Waited> Session::settle(std::uint32_t timeout_ms) {
  auto connected = ensure_connected(Deadline::after_ms(kConnectTimeoutMs));
  if (!connected) return std::move(connected).error();
  const auto current = connection();
  const Deadline deadline = Deadline::after_ms(timeout_ms);
  wire::SettleT request;
  request.timeout_ms = timeout_ms;
  auto reply = current->call(shm::make_message(0, std::move(request)), {},
                             Deadline::after_ms(std::uint64_t{timeout_ms} + kSendTimeoutMs),
                             Connection::WhenLate::kKeep);
  if (reply) return Waited::kReached;
  if (reply.error().code() == Code::kUnavailable && current->is_open() && deadline.has_passed()) {
    return Waited::kTimedOut;
  }
  return std::move(reply).error();
}

Result<Waited> Session::remove(std::uint64_t sequence, std::uint32_t timeout_ms) {
  auto allowed = may_remove(options_.attach.run_path, sequence);
  if (!allowed) return std::move(allowed).error();
  auto connected = ensure_connected(Deadline::after_ms(kConnectTimeoutMs));
  if (!connected) return std::move(connected).error();
  const auto current = connection();
  const Deadline deadline = Deadline::after_ms(timeout_ms);
  for (;;) {
    wire::RetireT request;
    request.run_path = options_.attach.run_path;
    request.sequence = sequence;
    auto reply = current->call(shm::make_message(0, std::move(request)), {}, deadline,
                               Connection::WhenLate::kKeep);
    if (reply) return Waited::kReached;
    const Code code = reply.error().code();
    if (code == Code::kUnavailable && current->is_open() && deadline.has_passed()) {
      return Waited::kTimedOut;
    }
    // It has as many wishes of this session as it takes at once. Near the end it is not asked
    // again: no answer would hide this one.
    if (code != Code::kResourceExhausted || deadline.rest_ms() <= 2 * kRemovePauseMs) {
      return std::move(reply).error();
    }
    (void)::poll(nullptr, 0, kRemovePauseMs);
  }
}

// --- The end -------------------------------------------------------------------------------------

Status Session::close(std::uint32_t timeout_ms) {
  const Deadline deadline = Deadline::after_ms(timeout_ms);
  Status result = ok();
  if (capturing_) {
    const std::uint64_t ticket = capturing_->ticket;
    const auto rest_ms = static_cast<std::uint32_t>(deadline.rest_ms());
    auto waited = wait_capture(ticket, rest_ms, true);
    if (waited && *waited == Waited::kReached) {
      result = publish(ticket);
    } else {
      result = waited ? Error(Code::kCancelled, "the session was closed during the capture")
                      : std::move(waited).error();
      (void)void_capture(ticket, result.error());
    }
  }
  const auto current = connection();
  if (current && current->is_open()) {
    // Its answer is worth a moment even to a caller with no time: it says that the slots are free.
    constexpr int kDetachMsMin = 200;
    const auto wait_ms = static_cast<std::uint64_t>(std::max(deadline.rest_ms(), kDetachMsMin));
    (void)current->call(shm::make_message(0, wire::DetachT()), {}, Deadline::after_ms(wait_ms));
  }
  if (current) current->drop(closed_error());
  return result;
}

// --- The resident snapshot
// -------------------------------------------------------------------------

std::optional<Session::Lent> Session::lend(std::uint64_t sequence, Deadline deadline) {
  const auto current = connection();
  if (!current || !layout_ || capturing_) return std::nullopt;
  wire::LendSlotT request;
  request.sequence = sequence;
  auto reply = current->call(shm::make_message(0, std::move(request)), {}, deadline);
  if (!reply) return std::nullopt;
  const wire::LendSlotReplyT* const answer = reply->message.body.AsLendSlotReply();
  if (answer == nullptr || !answer->found || answer->slot >= slots_.size()) return std::nullopt;
  Lent lent{.slot = answer->slot, .bytes = slot_bytes_of(answer->slot)};
  if (!populate(lent.slot)) {
    give_back(lent, deadline);
    return std::nullopt;
  }
  return lent;
}

void Session::give_back(const Lent& lent, Deadline deadline) {
  const auto current = connection();
  if (!current) return;
  wire::ReturnSlotT request;
  request.slot = lent.slot;
  (void)current->call(shm::make_message(0, std::move(request)), {}, deadline);
}

std::string Session::describe() {
  const auto current = connection();
  if (current) current->take_in();
  std::string page_kind = "untouched";
  std::uint64_t ready_count = 0;
  {
    const std::lock_guard lock(mutex_);
    for (const ReadySlot& ready : ready_slots_) {
      if (ready.layout_id != layout_id_) continue;
      page_kind = ready.page_kind;
      ++ready_count;
    }
  }
  const SaveCounts counts = tickets_.counts();
  const auto quoted = [](std::string_view text) {
    std::string json;
    format::append_json_string(json, text);
    return json;
  };
  return concat(
      "{\"lane\": ", quoted(gpus_.lane()), ", \"lane_reason\": ", quoted(gpus_.lane_reason()),
      ", \"copy_kernel\": ", quoted(kernels::name(kernel_)), ", \"page_kind\": ", quoted(page_kind),
      ", \"slot_count\": ", slots_.size(), ", \"slots_ready\": ", ready_count,
      ", \"slot_bytes\": ", slot_bytes_, ", \"socket\": ", quoted(socket_path_),
      ", \"daemon_version\": ", quoted(daemon_version_),
      ", \"connected\": ", current && current->is_open() ? "true" : "false",
      ", \"saves\": {\"accepted\": ", counts.accepted, ", \"durable\": ", counts.durable,
      ", \"failed\": ", counts.failed, "}}");
}

}  // namespace stillframe::client
