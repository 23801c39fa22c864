#include "uring/uring_backend.h"

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/os_error.h"
#include "base/text.h"

// Newer than some liburing and kernel headers that we build with; the kernel has the last word.
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)  // Linux 6.0.
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)  // Linux 6.1.
#endif

namespace stillframe::uring {

namespace {

// 64 requests, the wake and withdrawn entries. The completion queue has twice as many, so that it
// cannot overflow.
constexpr unsigned kEntryCount = 128;
constexpr std::size_t kPieceBytesMax = std::size_t{1} << 30;  // The kernel's limit for one buffer.
constexpr int kPieceCountMax = 1024;                          // x 1 GiB = 1 TiB of slots.

// Tags of completions that are no request's; those carry their slot's index.
constexpr std::uint64_t kWakeTag = 1'000;
constexpr std::uint64_t kWithdrawnTag = 1'001;

// Without SQPOLL: it costs a core, and reads get slower (URING-9).
// DEFER_TASKRUN runs completions only inside our own io_uring_enter(), so a burst of them cannot
// preempt this thread elsewhere. Needs SINGLE_ISSUER; see io_uring_setup(2).
int make_ring(io_uring& ring, unsigned& flags) noexcept {
  flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
  const int result = ::io_uring_queue_init(kEntryCount, &ring, flags);
  if (result != -EINVAL) return result;
  flags = 0;
  return ::io_uring_queue_init(kEntryCount, &ring, flags);
}

Status check_features(io_uring& ring) {
  // NODROP: Linux 5.5. EXT_ARG, a wait with a timeout in one call: Linux 5.11.
  constexpr unsigned kNeeded = IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
  if ((ring.features & kNeeded) != kNeeded) {
    return Error(Code::kUnavailable, "io_uring: this kernel is older than 5.11");
  }
  struct Needed {
    int operation;
    std::string_view name;
  };
  constexpr std::array kOperations = {
      Needed{IORING_OP_READ, "READ"},              // Linux 5.6.
      Needed{IORING_OP_WRITE, "WRITE"},            // Linux 5.6.
      Needed{IORING_OP_READ_FIXED, "READ_FIXED"},  // Linux 5.1, as are those below.
      Needed{IORING_OP_WRITE_FIXED, "WRITE_FIXED"},
      Needed{IORING_OP_FSYNC, "FSYNC"},
      Needed{IORING_OP_POLL_ADD, "POLL_ADD"},
      Needed{IORING_OP_NOP, "NOP"},
  };
  const std::unique_ptr<io_uring_probe, decltype(&::io_uring_free_probe)> probe(
      ::io_uring_get_probe_ring(&ring), &::io_uring_free_probe);
  if (!probe) return Error(Code::kUnavailable, "io_uring: cannot be asked for its operations");
  for (const Needed& needed : kOperations) {
    if (::io_uring_opcode_supported(probe.get(), needed.operation) == 0) {
      return Error(Code::kUnavailable, concat("io_uring: this kernel lacks ", needed.name));
    }
  }
  return ok();
}

unsigned call_length(const Operation& operation) noexcept {
  return static_cast<unsigned>(operation.call_bytes());
}

void prepare(io_uring_sqe& entry, const Operation& operation, int buffer_index) noexcept {
  switch (operation.request->kind) {
    case IoRequest::Kind::kRead:
      if (buffer_index >= 0) {
        ::io_uring_prep_read_fixed(&entry, operation.fd, operation.data(), call_length(operation),
                                   operation.offset(), buffer_index);
      } else {
        ::io_uring_prep_read(&entry, operation.fd, operation.data(), call_length(operation),
                             operation.offset());
      }
      return;
    case IoRequest::Kind::kWrite:
      if (buffer_index >= 0) {
        ::io_uring_prep_write_fixed(&entry, operation.fd, operation.data(), call_length(operation),
                                    operation.offset(), buffer_index);
      } else {
        ::io_uring_prep_write(&entry, operation.fd, operation.data(), call_length(operation),
                              operation.offset());
      }
      return;
    // Not ordered behind writes before it: the caller submits it after their completions
    // (URING-11).
    case IoRequest::Kind::kSync: ::io_uring_prep_fsync(&entry, operation.fd, 0); return;
  }
}

// -1 stays without end.
std::int64_t deadline_ns(int timeout_ms) noexcept {
  if (timeout_ms < 0) return -1;
  return SystemClock().monotonic_ns() + std::int64_t{timeout_ms} * 1'000'000;
}

// Waits for one completion, the wake's included, and returns without one at the deadline.
void wait_for_completion(io_uring& ring, std::int64_t deadline) {
  std::uint64_t retry_count = 0;
  for (;;) {
    io_uring_cqe* entry = nullptr;
    int result = 0;
    if (deadline < 0) {
      result = ::io_uring_wait_cqe(&ring, &entry);
    } else {
      const std::int64_t rest_ns =
          std::max<std::int64_t>(0, deadline - SystemClock().monotonic_ns());
      __kernel_timespec rest{.tv_sec = rest_ns / 1'000'000'000, .tv_nsec = rest_ns % 1'000'000'000};
      result = ::io_uring_wait_cqes(&ring, &entry, 1, &rest, nullptr);
    }
    if (result >= 0 || result == -ETIME) return;
    // Any other number means a closed ring or a foreign thread.
    check(is_transient(-result), "io_uring_enter refused to wait");
    if (result == -EINTR) continue;
    if (retry_count < kRetryCountMax) ++retry_count;
    pause_before_retry(retry_count);
  }
}

}  // namespace

void UringBackend::RingDeleter::operator()(io_uring* ring) const noexcept {
  ::io_uring_queue_exit(ring);
  delete ring;
}

Result<std::unique_ptr<UringBackend>> UringBackend::create() {
  auto fresh = std::make_unique<io_uring>();
  unsigned setup_flags = 0;
  const int result = make_ring(*fresh, setup_flags);
  if (result < 0) return os_error("io_uring_queue_init", -result);
  std::unique_ptr<io_uring, RingDeleter> ring(fresh.release());
  auto checked = check_features(*ring);
  if (!checked) return std::move(checked).error();

  UniqueFd wake_fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake_fd) return os_error("eventfd", errno);
  std::unique_ptr<UringBackend> backend(
      new UringBackend(std::move(ring), setup_flags, std::move(wake_fd)));
  if (!backend->arm_wake()) return Error(Code::kUnavailable, "io_uring_enter: refused a poll");
  return backend;
}

UringBackend::UringBackend(std::unique_ptr<io_uring, RingDeleter> ring, unsigned setup_flags,
                           UniqueFd wake_fd)
    : ring_(std::move(ring)), setup_flags_(setup_flags), wake_fd_(std::move(wake_fd)) {
  for (std::size_t slot = kInFlightMax; slot > 0; --slot) free_slots_.push_back(slot - 1);
  // What the kernel answers is taken in without asking for memory.
  finished_.reserve(kInFlightMax);
  handed_out_.reserve(kInFlightMax);
  again_slots_.reserve(kInFlightMax);
  // Linux 5.19. Without it register_memory() says so.
  has_buffer_table_ = ::io_uring_register_buffers_sparse(ring_.get(), kPieceCountMax) == 0;
}

UringBackend::~UringBackend() {
  while (in_flight_ > 0) (void)wait(-1);
}

Status UringBackend::submit(IoRequest& request) {
  if (in_flight_ >= kInFlightMax) {
    return Error(Code::kResourceExhausted, concat("io: ", in_flight_, " requests in flight of ",
                                                  kInFlightMax, "; wait for some"));
  }
  auto found = find(request.file);
  if (!found) return std::move(found).error();
  const OpenFile& file = **found;
  auto checked = check_request(request, file.facts);
  if (!checked) return checked;

  const std::size_t slot = free_slots_.back();
  Operation& operation = operations_[slot];
  operation = begin(request, file.facts, file.fd.get());
  if (file.cached && request.kind != IoRequest::Kind::kSync) {
    // Through the page cache, where the ring's workers would fight for one lock (URING-3). wait()
    // hands it out.
    run_to_end(operation);
    finished_.push_back(&request);
    ++in_flight_;
    return ok();
  }
  if (const int number = start(slot); number != 0) {
    fail(operation, number);
    Error error = *std::move(request.error);
    request.error.reset();
    return error;
  }
  free_slots_.pop_back();
  ++in_flight_;
  return ok();
}

// Hands a slot's request to the kernel: 0 or an errno, after which the kernel does not have it.
int UringBackend::start(std::size_t slot) noexcept {
  io_uring_sqe* const entry = ::io_uring_get_sqe(ring_.get());
  if (entry == nullptr) return EBUSY;
  const Operation& operation = operations_[slot];
  const Piece* const piece = operation.request->kind == IoRequest::Kind::kSync
                                 ? nullptr
                                 : piece_around(operation.data(), operation.call_bytes());
  prepare(*entry, operation, piece == nullptr ? -1 : piece->index);
  ::io_uring_sqe_set_data64(entry, slot);
  const int number = push();
  if (number != 0) {
    // The kernel reads entries only inside io_uring_enter(), and it has not read this one. It stays
    // in the queue, so it must not name the caller's memory any more.
    ::io_uring_prep_nop(entry);
    ::io_uring_sqe_set_data64(entry, kWithdrawnTag);
  }
  return number;
}

// Until the kernel has read every entry: 0 or the last errno.
int UringBackend::push() noexcept {
  for (std::uint64_t retry_count = 0;;) {
    const int result = ::io_uring_submit(ring_.get());
    if (::io_uring_sq_ready(ring_.get()) == 0) return 0;
    const int number = result < 0 ? -result : EAGAIN;
    if (!is_transient(number) || retry_count >= kRetryCountMax) return number;
    pause_before_retry(++retry_count);
  }
}

std::span<IoRequest* const> UringBackend::wait(int timeout_ms) {
  const std::int64_t deadline = deadline_ns(timeout_ms);
  // A wake that cannot be heard counts as one that came: the caller looks and waits again.
  if (!wake_armed_ && !arm_wake()) woken_ = true;
  reap();
  while (finished_.empty() && !woken_) {
    wait_for_completion(*ring_, deadline);
    reap();
    if (deadline >= 0 && SystemClock().monotonic_ns() >= deadline) break;
  }
  woken_ = false;
  handed_out_.clear();
  handed_out_.swap(finished_);
  in_flight_ -= handed_out_.size();
  return handed_out_;
}

// Consumes every completion that is there, then acts: an error in one cannot leave another to be
// seen twice.
void UringBackend::reap() {
  again_slots_.clear();
  io_uring_cqe* entry = nullptr;
  while (::io_uring_peek_cqe(ring_.get(), &entry) == 0 && entry != nullptr) {
    const std::uint64_t tag = ::io_uring_cqe_get_data64(entry);
    const int result = entry->res;
    ::io_uring_cqe_seen(ring_.get(), entry);
    if (tag == kWithdrawnTag) continue;
    if (tag == kWakeTag) {
      take_wake();
    } else {
      go_on(tag, result);
    }
  }
  for (const std::size_t slot : again_slots_) {
    if (const int number = start(slot); number != 0) {
      fail(operations_[slot], number);
      finish(slot);
    }
  }
  if (!wake_armed_ && !arm_wake()) woken_ = true;
}

void UringBackend::go_on(std::size_t slot, int result) {
  check(slot < kInFlightMax, "a completion names a slot");
  switch (complete(operations_[slot], result)) {
    case Next::kFinished: finish(slot); return;
    case Next::kQueueAfterPause:
      pause_before_retry(operations_[slot].retry_count);
      again_slots_.push_back(slot);
      return;
    case Next::kQueueAgain: again_slots_.push_back(slot); return;
  }
}

void UringBackend::finish(std::size_t slot) {
  finished_.push_back(operations_[slot].request);
  operations_[slot] = Operation();
  free_slots_.push_back(slot);
}

void UringBackend::wake() noexcept {
  const std::uint64_t one = 1;
  // EAGAIN would mean 2^64 - 2 unread wakes, which end a wait() just as well.
  (void)!::write(wake_fd_.get(), &one, sizeof one);
}

// A poll that is armed while the eventfd is readable completes at once, so a wake between
// take_wake() and here is not lost.
bool UringBackend::arm_wake() noexcept {
  io_uring_sqe* const entry = ::io_uring_get_sqe(ring_.get());
  if (entry == nullptr) return false;
  ::io_uring_prep_poll_add(entry, wake_fd_.get(), POLLIN);
  ::io_uring_sqe_set_data64(entry, kWakeTag);
  wake_armed_ = push() == 0;
  if (!wake_armed_) {
    ::io_uring_prep_nop(entry);
    ::io_uring_sqe_set_data64(entry, kWithdrawnTag);
  }
  return wake_armed_;
}

void UringBackend::take_wake() noexcept {
  std::uint64_t count = 0;
  (void)!::read(wake_fd_.get(), &count, sizeof count);
  woken_ = true;
  wake_armed_ = false;
}

Status UringBackend::register_memory(Bytes memory) {
  if (!has_buffer_table_) {
    return Error(Code::kUnavailable, "register memory: needs Linux 5.19 and memlock to spare");
  }
  std::size_t done_bytes = 0;
  while (done_bytes < memory.size()) {
    const Bytes piece =
        memory.subspan(done_bytes, std::min(kPieceBytesMax, memory.size() - done_bytes));
    const int index = free_index();
    const int number = index < 0 ? ENOBUFS : update_buffer(index, piece);
    if (number != 0) {
      unregister_memory(memory);
      return os_error(concat("register ", memory.size(), " bytes of memory"), number);
    }
    pieces_.push_back({.index = index, .memory = piece});
    done_bytes += piece.size();
  }
  ++registration_count_;
  return ok();
}

void UringBackend::unregister_memory(Bytes memory) noexcept {
  std::erase_if(pieces_, [&](const Piece& piece) {
    const bool inside = piece.memory.data() >= memory.data() &&
                        piece.memory.data() + piece.memory.size() <= memory.data() + memory.size();
    // The index is ours again even when the kernel refuses: an update replaces what is there.
    if (inside) (void)update_buffer(piece.index, {});
    return inside;
  });
}

int UringBackend::free_index() const noexcept {
  for (int index = 0; index < kPieceCountMax; ++index) {
    if (std::none_of(pieces_.begin(), pieces_.end(),
                     [&](const Piece& piece) { return piece.index == index; })) {
      return index;
    }
  }
  return -1;
}

// 0 or an errno. Empty memory empties the entry.
int UringBackend::update_buffer(int index, Bytes memory) noexcept {
  const iovec vector{.iov_base = memory.data(), .iov_len = memory.size()};
  const __u64 tag = 0;
  const int result = ::io_uring_register_buffers_update_tag(
      ring_.get(), static_cast<unsigned>(index), &vector, &tag, 1);
  return result < 0 ? -result : 0;
}

const UringBackend::Piece* UringBackend::piece_around(const std::byte* data,
                                                      std::size_t bytes) const noexcept {
  for (const Piece& piece : pieces_) {
    const std::byte* const end = piece.memory.data() + piece.memory.size();
    if (data >= piece.memory.data() && data < end &&
        bytes <= static_cast<std::size_t>(end - data)) {
      return &piece;
    }
  }
  // Also what lies across two pieces: it goes unregistered, which costs CPU only.
  return nullptr;
}

}  // namespace stillframe::uring
