// The C ABI over client/session.h and client/restore.h: checks what a foreign language may get
// wrong, turns Results into codes and lets no exception out.

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/hash.h"
#include "base/os_error.h"
#include "base/out_of_memory.h"
#include "base/text.h"
#include "client/dial.h"
#include "client/libstillframe.h"
#include "client/restore.h"
#include "client/run_json.h"
#include "client/session.h"
#include "client/write_model.h"
#include "format/utf8.h"

struct sf_session {
  // Shared with checkpoints, which use it while it lives.
  std::shared_ptr<stillframe::client::Session> session;
};

struct sf_checkpoint {
  std::unique_ptr<stillframe::client::CheckpointReader> reader;
};

namespace stillframe::client {
namespace {

constexpr std::uint32_t kTimeoutMs = 10'000;

int code_of(Code code) noexcept {
  switch (code) {
    case Code::kInvalidArgument: return SF_INVALID_ARGUMENT;
    case Code::kNotFound: return SF_NOT_FOUND;
    case Code::kResourceExhausted: return SF_RESOURCE_EXHAUSTED;
    case Code::kUnavailable: return SF_UNAVAILABLE;
    case Code::kDataLoss: return SF_DATA_LOSS;
    case Code::kCancelled: return SF_CANCELLED;
    case Code::kInternal: return SF_INTERNAL;
  }
  return SF_INTERNAL;
}

int fill(sf_error* error, int code, int native, std::string_view message) noexcept {
  if (error == nullptr) return code;
  error->code = code;
  error->native = native;
  std::size_t bytes = std::min(message.size(), sizeof error->message - 1);
  // Not inside a UTF-8 sequence: other languages decode this text.
  if (bytes < message.size()) {
    while (bytes > 0 && (static_cast<unsigned char>(message[bytes]) & 0xC0U) == 0x80U) --bytes;
  }
  std::memcpy(error->message, message.data(), bytes);
  error->message[bytes] = '\0';
  return code;
}

int fill(sf_error* error, const Error& reason) noexcept {
  return fill(error, code_of(reason.code()), reason.native(), reason.message());
}

int invalid(sf_error* error, std::string_view message) noexcept {
  return fill(error, SF_INVALID_ARGUMENT, 0, message);
}

int succeed(sf_error* error) noexcept { return fill(error, SF_OK, 0, ""); }

int conclude(sf_error* error, const Status& status) noexcept {
  return status ? succeed(error) : fill(error, status.error());
}

int conclude(sf_error* error, const Result<Waited>& waited, const char* what) noexcept {
  if (!waited) return fill(error, waited.error());
  if (*waited == Waited::kReached) return succeed(error);
  return fill(error, SF_TIMEOUT, 0, what);
}

// Runs `body`, which returns a code. Only a lack of memory or a bug of ours throws.
template <class Body>
int guarded(sf_error* error, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fill(error, SF_RESOURCE_EXHAUSTED, 0, "out of memory");
  } catch (const std::exception& exception) {
    return fill(error, SF_INTERNAL, 0, exception.what());
  } catch (...) {
    return fill(error, SF_INTERNAL, 0, "an exception of an unknown kind");
  }
}

// As guarded(), for calls on a session of this very process.
template <class Body>
int with_session(sf_session* session, sf_error* error, Body&& body) noexcept {
  if (session == nullptr) return invalid(error, "the session is NULL");
  if (session->session->owner_pid() != ::getpid()) {
    return invalid(error, "this is a forked child: it must not use its parent's session");
  }
  return guarded(error, [&] {
    try {
      return body(*session->session);
    } catch (const std::bad_alloc&) {
      session->session->abandon(out_of_memory());
      throw;
    }
  });
}

// What the caller knows of a struct, the rest zero.
template <class Struct>
bool take(const Struct* given, Struct& taken) noexcept {
  taken = {};
  if (given == nullptr || given->struct_bytes < sizeof given->struct_bytes) return false;
  std::memcpy(&taken, given, std::min<std::size_t>(given->struct_bytes, sizeof taken));
  return true;
}

template <class Struct>
bool give(const Struct& made, Struct* target) noexcept {
  const std::uint32_t bytes = target->struct_bytes;
  if (bytes < sizeof bytes) return false;
  std::memcpy(target, &made, std::min<std::size_t>(bytes, sizeof made));
  target->struct_bytes = bytes;
  return true;
}

std::string text_of(const char* text) { return text == nullptr ? "" : text; }

char* copy_of(std::string_view text) {
  char* const copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy == nullptr) throw std::bad_alloc();
  std::memcpy(copy, text.data(), text.size());
  copy[text.size()] = '\0';
  return copy;
}

int hand_out(const Result<std::string>& text, char** target, sf_error* error) {
  if (!text) return fill(error, text.error());
  *target = copy_of(*text);
  return succeed(error);
}

Result<std::string> absolute_path(const char* path) {
  std::error_code failed;
  const auto absolute = std::filesystem::absolute(path, failed);
  if (failed) return os_error(concat("make absolute ", path), failed.value());
  return absolute.lexically_normal().string();
}

Result<GpuLane> lane_wish(const char* lane) {
  const std::string_view name = lane == nullptr ? "auto" : lane;
  if (name == "auto" || name == "pinned") return GpuLane::kPinned;
  if (name == "hbm") return GpuLane::kHbm;
  if (name == "ipc") return GpuLane::kIpc;
  return Error(Code::kInvalidArgument, concat("attach: lane \"", format::printable(name),
                                              "\"; known are auto, pinned, hbm, ipc"));
}

Result<SessionOptions> session_options(const sf_attach_options& given) {
  if (given.run_path == nullptr || given.run_path[0] == '\0') {
    return Error(Code::kInvalidArgument, "attach: run_path is missing");
  }
  if (given.best_count > SF_BEST_COUNT_MAX || (given.best_count != 0 && given.best == nullptr)) {
    return Error(Code::kInvalidArgument, concat("attach: ", given.best_count,
                                                " criteria in best, at most ", SF_BEST_COUNT_MAX));
  }
  auto run_path = absolute_path(given.run_path);
  if (!run_path) return std::move(run_path).error();
  SessionOptions options;
  options.dial.socket_path = text_of(given.socket_path);
  options.dial.daemon_path = text_of(given.daemon_path);
  options.dial.may_start = given.no_autostart == 0;
  auto lane = lane_wish(given.lane);
  if (!lane) return std::move(lane).error();
  options.gpus = {
      .window_bytes = given.gpu_window_bytes, .ring_bytes = given.gpu_ring_bytes, .lane = *lane};
  options.copier_count = std::min<std::uint32_t>(given.copier_threads, 64);
  shm::wire::AttachT& attach = options.attach;
  attach.run_path = *std::move(run_path);
  attach.rank = given.rank;
  attach.world_size = given.world_size == 0 ? 1 : given.world_size;
  attach.keep_last = given.keep_last;
  attach.keep_every = given.keep_every;
  for (const sf_best& best : std::span(given.best, given.best_count)) {
    auto one = std::make_unique<shm::wire::BestKeepT>();
    one->metric = text_of(best.metric);
    one->is_max = best.is_max != 0;
    one->count = best.count;
    attach.best.push_back(std::move(one));
  }
  attach.force_filesystem = given.force_filesystem != 0;
  attach.framework = text_of(given.framework);
  attach.python_version = text_of(given.python_version);
  attach.arena_bytes_max = given.arena_bytes_max;
  attach.slot_count = given.slot_count;
  return options;
}

Result<Session::SaveRequest> save_request(const sf_save_options& given) {
  const auto refuse = [](const char* why) {
    return Error(Code::kInvalidArgument, concat("save: ", why));
  };
  if (given.capture != SF_CAPTURE_EAGER && given.capture != SF_CAPTURE_LAZY) {
    return refuse("capture is no sf_capture");
  }
  if (given.check != SF_CHECK_SAMPLE && given.check != SF_CHECK_FULL) {
    return refuse("check is no sf_check");
  }
  if (given.step < 0) return refuse("the step is negative; steps count from 0");
  if (given.state_json == nullptr && given.state_bytes != 0) return refuse("state_json is NULL");
  if (given.metric_count != 0 &&
      (given.metric_names == nullptr || given.metric_values == nullptr)) {
    return refuse("metrics are counted but not given");
  }
  Session::SaveRequest request;
  request.step = given.step;
  for (std::uint32_t i = 0; i < given.metric_count; ++i) {
    if (given.metric_names[i] == nullptr) return refuse("a metric has no name");
    request.metrics.emplace_back(given.metric_names[i], given.metric_values[i]);
  }
  if (given.state_bytes != 0) request.state_json = {given.state_json, given.state_bytes};
  request.has_pickle = given.has_pickle != 0;
  request.capture = given.capture == SF_CAPTURE_LAZY ? SF_CAPTURE_LAZY : SF_CAPTURE_EAGER;
  request.check =
      given.check == SF_CHECK_FULL ? TornCheck::Extent::kFull : TornCheck::Extent::kSample;
  request.busy_timeout_ms = given.busy_timeout_ms;
  if (given.stream_count != 0) {
    if (given.streams == nullptr) return refuse("streams are counted but not given");
    request.streams = {given.streams, given.stream_count};
  }
  return request;
}

Result<WriteRequest> write_request(const sf_write_options& given) {
  if (given.path == nullptr || given.path[0] == '\0') {
    return Error(Code::kInvalidArgument, "write: the path is missing");
  }
  if (given.state_json == nullptr && given.state_bytes != 0) {
    return Error(Code::kInvalidArgument, "write: state_json is NULL");
  }
  auto path = absolute_path(given.path);
  if (!path) return std::move(path).error();
  SystemRng rng;
  WriteRequest request;
  request.path = *std::move(path);
  request.nonce = rng.next();
  request.run_id = to_hex(Hash128{.low = rng.next(), .high = rng.next()});
  request.wall_ns = SystemClock().wall_ns();
  if (given.state_bytes != 0) request.state_json = {given.state_json, given.state_bytes};
  request.has_pickle = given.has_pickle != 0;
  request.framework = text_of(given.framework);
  request.python_version = text_of(given.python_version);
  return request;
}

// Runs `body` with a backend of this thread, which ends with it.
template <class Body>
int with_writer(const sf_write_options* options, sf_error* error, Body&& body) noexcept {
  return guarded(error, [&] {
    sf_write_options given;
    if (!take(options, given)) {
      return invalid(error, "write: options are NULL, or struct_bytes is not set");
    }
    auto request = write_request(given);
    if (!request) return fill(error, request.error());
    auto created = uring::create_backend({});
    if (!created) return fill(error, created.error());
    return conclude(error, body(*created->backend, *request));
  });
}

int32_t state_of(SaveState state) noexcept {
  switch (state) {
    case SaveState::kAccepted: return SF_ACCEPTED;
    case SaveState::kCaptured: return SF_CAPTURED;
    case SaveState::kDurable: return SF_DURABLE;
    case SaveState::kFailed: return SF_FAILED;
  }
  return SF_FAILED;
}

sf_ticket ticket_of(const SaveInfo& save) {
  sf_ticket ticket = {};
  ticket.state = state_of(save.state);
  ticket.sequence = save.sequence;
  ticket.step = save.step;
  ticket.bytes = save.bytes;
  ticket.begin_ns = save.begin_ns;
  ticket.accepted_ns = save.accepted_ns;
  ticket.captured_ns = save.captured_ns;
  ticket.durable_ns = save.durable_ns;
  ticket.begin_call_ns = save.begin_call_ns;
  ticket.busy_wait_ns = save.busy_wait_ns;
  ticket.first_save_wait_ns = save.first_save_wait_ns;
  ticket.fence_wait_ns = save.fence_wait_ns;
  if (save.failure) (void)fill(&ticket.failure, *save.failure);
  return ticket;
}

Result<std::string> daemon_status(const std::string& socket_path) {
  const Deadline deadline = Deadline::after_ms(kTimeoutMs);
  SystemRng rng;
  const DialOptions options{
      .socket_path = socket_path, .daemon_path = {}, .may_start = false, .role = "tool"};
  auto dialled = dial(options, rng, deadline);
  if (!dialled) return std::move(dialled).error();
  auto reply = dialled->connection->call(shm::make_message(0, shm::wire::StatusT()), {}, deadline);
  if (!reply) return std::move(reply).error();
  const shm::wire::StatusReplyT* const answer = reply->message.body.AsStatusReply();
  if (answer == nullptr) return Error(Code::kUnavailable, "the daemon sent no StatusReply");
  return answer->json;
}

}  // namespace
}  // namespace stillframe::client

namespace sf = stillframe::client;
using stillframe::Code;
using stillframe::Error;
using stillframe::Status;

// --- Attach --------------------------------------------------------------------------------------

const char* sf_version(void) { return STILLFRAME_VERSION; }

int sf_attach(const sf_attach_options* options, sf_session** session, sf_error* error) {
  return sf::guarded(error, [&] {
    sf_attach_options given;
    if (session == nullptr || !sf::take(options, given)) {
      return sf::invalid(error, "attach: options or session is NULL, or struct_bytes is not set");
    }
    *session = nullptr;
    auto wanted = sf::session_options(given);
    if (!wanted) return sf::fill(error, wanted.error());
    auto holder = std::make_unique<sf_session>();
    auto attached = sf::Session::attach(
        *std::move(wanted),
        sf::Deadline::after_ms(given.timeout_ms == 0 ? sf::kTimeoutMs : given.timeout_ms));
    if (!attached) return sf::fill(error, attached.error());
    holder->session = *std::move(attached);
    *session = holder.release();
    return sf::succeed(error);
  });
}

const char* sf_session_warnings(sf_session* session) {
  return session == nullptr ? "" : session->session->warnings().c_str();
}

int sf_session_describe(sf_session* session, char** json, sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    if (json == nullptr) return sf::invalid(error, "describe: json is NULL");
    return sf::hand_out(open.describe(), json, error);
  });
}

int sf_session_close(sf_session* session, uint32_t timeout_ms, sf_error* error) {
  if (session == nullptr) return sf::succeed(error);
  // A forked child has neither the threads nor the mappings that the destructors would end.
  if (session->session->owner_pid() != ::getpid()) return sf::succeed(error);
  const int code =
      sf::guarded(error, [&] { return sf::conclude(error, session->session->close(timeout_ms)); });
  delete session;
  return code;
}

// --- Layout --------------------------------------------------------------------------------------

int sf_layout_register(sf_session* session, const sf_part* parts, uint64_t part_count,
                       uint32_t timeout_ms, sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    if (parts == nullptr && part_count != 0) return sf::invalid(error, "layout: parts is NULL");
    const auto deadline = sf::Deadline::after_ms(timeout_ms == 0 ? sf::kTimeoutMs : timeout_ms);
    return sf::conclude(error, open.register_layout({parts, part_count}, deadline));
  });
}

// --- Save ----------------------------------------------------------------------------------------

int sf_save_begin(sf_session* session, const sf_save_options* options, const sf_source* sources,
                  uint64_t source_count, uint64_t* ticket, sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    sf_save_options given;
    if (ticket == nullptr || (sources == nullptr && source_count != 0) ||
        !sf::take(options, given)) {
      return sf::invalid(error, "save: an argument is NULL, or struct_bytes is not set");
    }
    const auto request = sf::save_request(given);
    if (!request) return sf::fill(error, request.error());
    const auto begun = open.begin_save(*request, {sources, source_count});
    if (!begun) return sf::fill(error, begun.error());
    *ticket = *begun;
    return sf::succeed(error);
  });
}

int sf_capture_wait(sf_session* session, uint64_t ticket, uint32_t timeout_ms, int help,
                    sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    return sf::conclude(error, open.wait_capture(ticket, timeout_ms, help != 0),
                        "the capture did not move for the time given");
  });
}

int sf_capture_fence(sf_session* session, uint64_t ticket, uint32_t timeout_ms, sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    return sf::conclude(error, open.open_fence(ticket, timeout_ms), "nothing was copied in time");
  });
}

int sf_capture_publish(sf_session* session, uint64_t ticket, sf_error* error) {
  return sf::with_session(
      session, error, [&](sf::Session& open) { return sf::conclude(error, open.publish(ticket)); });
}

int sf_capture_void(sf_session* session, uint64_t ticket, int torn, const char* reason,
                    sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    const Error why(torn != 0 ? Code::kDataLoss : Code::kCancelled,
                    reason == nullptr ? "the capture was given up" : reason);
    return sf::conclude(error, open.void_capture(ticket, why));
  });
}

int sf_ticket_get(sf_session* session, uint64_t ticket, sf_ticket* info, sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    if (info == nullptr) return sf::invalid(error, "ticket: info is NULL");
    const auto save = open.find_ticket(ticket);
    if (!save) return sf::fill(error, save.error());
    if (!sf::give(sf::ticket_of(*save), info)) {
      return sf::invalid(error, "ticket: struct_bytes is not set");
    }
    return sf::succeed(error);
  });
}

int sf_ticket_wait(sf_session* session, uint64_t ticket, int state, uint32_t timeout_ms,
                   sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    if (state != SF_CAPTURED && state != SF_DURABLE) {
      return sf::invalid(error, "ticket: wait for SF_CAPTURED or SF_DURABLE");
    }
    const auto wanted = state == SF_CAPTURED ? sf::SaveState::kCaptured : sf::SaveState::kDurable;
    return sf::conclude(
        error, open.wait_ticket(ticket, wanted, sf::Deadline::after_ms(timeout_ms)),
        state == SF_CAPTURED ? "the save is not captured yet" : "the save is not durable yet");
  });
}

int sf_session_settle(sf_session* session, uint32_t timeout_ms, sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    return sf::conclude(error, open.settle(timeout_ms), "a save is captured and not durable yet");
  });
}

int sf_checkpoint_remove(sf_session* session, uint64_t sequence, uint32_t timeout_ms,
                         sf_error* error) {
  return sf::with_session(session, error, [&](sf::Session& open) {
    return sf::conclude(error, open.remove(sequence, timeout_ms),
                        "the daemon may go on removing it");
  });
}

// --- Read ----------------------------------------------------------------------------------------

int sf_run_list(const char* run_path, char** json, sf_error* error) {
  return sf::guarded(error, [&] {
    if (run_path == nullptr || json == nullptr) return sf::invalid(error, "list: NULL argument");
    return sf::hand_out(sf::list_run(run_path), json, error);
  });
}

int sf_checkpoint_open(const char* run_path, const char* selector, sf_session* session,
                       sf_checkpoint** checkpoint, sf_error* error) {
  return sf::guarded(error, [&] {
    if (run_path == nullptr || selector == nullptr || checkpoint == nullptr) {
      return sf::invalid(error, "open: NULL argument");
    }
    *checkpoint = nullptr;
    if (session != nullptr && session->session->owner_pid() != ::getpid()) {
      return sf::invalid(error, "this is a forked child: it must not use its parent's session");
    }
    auto holder = std::make_unique<sf_checkpoint>();
    auto reader = sf::CheckpointReader::open(run_path, selector,
                                             session == nullptr ? nullptr : session->session);
    if (!reader) return sf::fill(error, reader.error());
    holder->reader = *std::move(reader);
    *checkpoint = holder.release();
    return sf::succeed(error);
  });
}

void sf_checkpoint_close(sf_checkpoint* checkpoint) {
  // As for a session: a forked child has not the thread that the destructor would join.
  if (checkpoint == nullptr || checkpoint->reader->owner_pid() != ::getpid()) return;
  (void)sf::guarded(nullptr, [&] {
    delete checkpoint;
    return static_cast<int>(SF_OK);
  });
}

const char* sf_checkpoint_manifest(const sf_checkpoint* checkpoint) {
  return checkpoint->reader->manifest_text().c_str();
}

const char* sf_checkpoint_state(const sf_checkpoint* checkpoint, uint64_t* bytes) {
  const std::string& state = checkpoint->reader->state();
  if (bytes != nullptr) *bytes = state.size();
  return state.c_str();
}

const char* sf_checkpoint_header(const sf_checkpoint* checkpoint, uint64_t part_index) {
  const std::string* const header = checkpoint->reader->header(part_index);
  return header == nullptr ? nullptr : header->c_str();
}

int sf_checkpoint_read(sf_checkpoint* checkpoint, const sf_target* targets, uint64_t target_count,
                       sf_read_stats* stats, sf_error* error) {
  return sf::guarded(error, [&] {
    if (checkpoint == nullptr || (targets == nullptr && target_count != 0)) {
      return sf::invalid(error, "read: NULL argument");
    }
    if (checkpoint->reader->owner_pid() != ::getpid()) {
      return sf::invalid(error, "this is a forked child: open the checkpoint again in it");
    }
    const stillframe::SystemClock clock;
    const std::int64_t begin_ns = clock.monotonic_ns();
    const auto read = checkpoint->reader->read({targets, target_count});
    if (!read) return sf::fill(error, read.error());
    sf_read_stats made = {};
    made.from_memory = read->is_from_memory ? 1 : 0;
    made.bytes = read->bytes;
    made.duration_ns = clock.monotonic_ns() - begin_ns;
    if (stats != nullptr && !sf::give(made, stats)) {
      return sf::invalid(error, "read: struct_bytes of stats is not set");
    }
    return sf::succeed(error);
  });
}

int sf_file_open(const char* path, sf_checkpoint** checkpoint, sf_error* error) {
  return sf::guarded(error, [&] {
    if (path == nullptr || checkpoint == nullptr) return sf::invalid(error, "open: NULL argument");
    *checkpoint = nullptr;
    auto holder = std::make_unique<sf_checkpoint>();
    auto reader = sf::CheckpointReader::open_file(path);
    if (!reader) return sf::fill(error, reader.error());
    holder->reader = *std::move(reader);
    *checkpoint = holder.release();
    return sf::succeed(error);
  });
}

int sf_checkpoint_check(const sf_checkpoint* checkpoint, uint64_t part_index, uint64_t offset,
                        const void* data, uint64_t bytes, sf_error* error) {
  return sf::guarded(error, [&] {
    if (checkpoint == nullptr || (data == nullptr && bytes != 0)) {
      return sf::invalid(error, "check: NULL argument");
    }
    const auto checked =
        checkpoint->reader->check(part_index, offset, {static_cast<const std::byte*>(data), bytes});
    if (!checked) return sf::fill(error, checked.error());
    return sf::succeed(error);
  });
}

int sf_checkpoint_verify(sf_checkpoint* checkpoint, sf_error* error) {
  return sf::guarded(error, [&] {
    if (checkpoint == nullptr) return sf::invalid(error, "verify: the checkpoint is NULL");
    if (checkpoint->reader->owner_pid() != ::getpid()) {
      return sf::invalid(error, "this is a forked child: open the checkpoint again in it");
    }
    return sf::conclude(error, checkpoint->reader->verify());
  });
}

// --- Write without a daemon ----------------------------------------------------------------------

int sf_model_write(const sf_write_options* options, const sf_part* parts, uint64_t part_count,
                   const sf_source* sources, uint64_t source_count, sf_error* error) {
  return sf::with_writer(options, error, [&](auto& io, const sf::WriteRequest& request) -> Status {
    if ((parts == nullptr && part_count != 0) || (sources == nullptr && source_count != 0)) {
      return Error(Code::kInvalidArgument, "write: a count without an array");
    }
    return sf::write_model(io, {parts, part_count}, {sources, source_count}, request);
  });
}

int sf_file_write(const sf_write_options* options, const sf_part* part, const sf_source* sources,
                  uint64_t source_count, sf_error* error) {
  return sf::with_writer(options, error, [&](auto& io, const sf::WriteRequest& request) -> Status {
    if (part == nullptr || (sources == nullptr && source_count != 0)) {
      return Error(Code::kInvalidArgument, "write: no part, or a count without an array");
    }
    return sf::write_file(io, *part, {sources, source_count}, request);
  });
}

// --- Daemon --------------------------------------------------------------------------------------

int sf_daemon_status(const char* socket_path, char** json, sf_error* error) {
  return sf::guarded(error, [&] {
    if (json == nullptr) return sf::invalid(error, "status: json is NULL");
    return sf::hand_out(sf::daemon_status(sf::text_of(socket_path)), json, error);
  });
}

void sf_free(char* text) { std::free(text); }
