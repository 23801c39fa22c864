#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/result.h"
#include "base/rng.h"
#include "client/capture.h"
#include "client/capture_sources.h"
#include "client/connection.h"
#include "client/deadline.h"
#include "client/dial.h"
#include "client/gpu_capture.h"
#include "client/layout.h"
#include "client/libstillframe.h"
#include "client/ticket_table.h"
#include "client/torn_check.h"
#include "shm/arena.h"

namespace stillframe::client {

struct SessionOptions {
  DialOptions dial;
  shm::wire::AttachT attach;
  std::uint32_t copier_count = 0;  // 0: default_copier_count().
  GpuOptions gpus;
};

// What a wait came to.
enum class Waited : std::uint8_t { kReached, kTimedOut };

// One (run, rank) attached to a daemon. Outlives daemons: when one dies, its saves fail, and the
// next save begins with one attempt to attach again, offering the arena that this side still maps.
//
// One thread at a time, except wait_capture(), find_ticket() and wait_ticket(), which any threads
// may call beside it.
class Session {
 public:
  static Result<std::shared_ptr<Session>> attach(SessionOptions options, Deadline deadline);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  Status register_layout(std::span<const sf_part> parts, Deadline deadline);

  struct SaveRequest {
    std::int64_t step = 0;
    std::vector<std::pair<std::string, double>> metrics;
    std::string_view state_json;
    bool has_pickle = false;
    sf_capture capture = SF_CAPTURE_EAGER;
    TornCheck::Extent check = TornCheck::Extent::kSample;
    std::uint32_t busy_timeout_ms = 0;
    std::span<const sf_stream> streams;
  };
  // Returns the ticket. Nothing is held after an error. The contract is sf_save_begin()'s.
  Result<std::uint64_t> begin_save(const SaveRequest& request, std::span<const sf_source> tensors);

  Result<Waited> wait_capture(std::uint64_t ticket, std::uint32_t timeout_ms, bool helps);
  // Contract: sf_capture_fence().
  Result<Waited> open_fence(std::uint64_t ticket, std::uint32_t timeout_ms);
  Status publish(std::uint64_t ticket);
  Status void_capture(std::uint64_t ticket, const Error& reason);

  Result<SaveInfo> find_ticket(std::uint64_t ticket);
  // `state`: kCaptured or kDurable. A failed save's failure is the error.
  Result<Waited> wait_ticket(std::uint64_t ticket, SaveState state, Deadline deadline);
  Result<Waited> settle(std::uint32_t timeout_ms);
  // Contract: sf_checkpoint_remove().
  Result<Waited> remove(std::uint64_t sequence, std::uint32_t timeout_ms);

  // Ends a capture in progress, detaches, joins the copiers. The object is then only to be
  // destroyed.
  Status close(std::uint32_t timeout_ms);

  // Any thread, after a call that a lack of memory cut short anywhere: ends the connection and
  // every save that is not durable, so that nothing is waited for that was lost on the way. The
  // next call connects again. `reason` is as short as out_of_memory().
  void abandon(const Error& reason) noexcept;

  // A snapshot that is still in a slot, lent until give_back(). nullopt: it is not, or its layout
  // is not the registered one.
  struct Lent {
    std::uint32_t slot = 0;
    ConstBytes bytes;
  };
  std::optional<Lent> lend(std::uint64_t sequence, Deadline deadline);
  void give_back(const Lent& lent, Deadline deadline);

  std::string describe();
  const std::string& warnings() const noexcept { return warnings_; }
  const Layout* layout() const noexcept { return layout_.get(); }
  kernels::CopyKernel kernel() const noexcept { return kernel_; }
  pid_t owner_pid() const noexcept { return owner_pid_; }

 private:
  explicit Session(SessionOptions options);

  struct Slot {
    bool is_populated = false;  // Our page table knows its pages.
    bool is_registration_tried = false;
    cuda::HostRegistration registration;  // Page-locked for GPUs, if it could be.
  };
  struct Offer {
    std::uint64_t layout_id = 0;
    std::uint64_t ticket = 0;
    std::uint32_t slot = 0;
    std::uint64_t sequence = 0;
  };
  struct ReadySlot {
    std::uint64_t layout_id = 0;
    std::uint32_t slot = 0;
    std::string page_kind;
  };

  // What a healthy daemon takes at most to take a message.
  static constexpr std::uint64_t kSendTimeoutMs = 2'000;

  Status connect(Deadline deadline);
  Status attach_run(Connection& connection, Deadline deadline);
  Status send_layout(const std::shared_ptr<const Layout>& layout, Deadline deadline);
  Status map_arena(UniqueFd memory, const shm::wire::LayoutReplyT& reply);
  Status ensure_connected(Deadline deadline);

  // May be repeated where it found the connection gone: nothing is held then.
  Result<std::uint64_t> begin_attempt(const SaveRequest& request,
                                      std::span<const sf_source> tensors, std::int64_t begin_ns);
  Result<shm::wire::BeginSaveReplyT> take_slot(const SaveRequest& request, std::uint64_t wait_ms,
                                               Deadline deadline);
  Result<std::uint64_t> start_capture(const SaveRequest& request,
                                      std::span<const sf_source> tensors, std::int64_t begin_ns);
  std::optional<Offer> take_offer();
  Result<shm::Channel> open_gpu_worker(const std::string& gpu_uuid);
  void tell_lane();
  Status populate(std::uint32_t slot);
  void register_slot(std::uint32_t slot);
  Status begin_engines(const SaveRequest& request, std::span<const sf_source> tensors,
                       std::uint64_t ticket);
  void stop_engines(const Error& reason) noexcept;
  Status copy_all(std::uint64_t ticket);
  Status compare(std::int64_t step);
  Status end_capture(std::optional<Error> failure);

  void on_message(shm::wire::MessageT message);
  void on_gone(const Error& reason);
  bool has_ready_slot() const;
  std::shared_ptr<Connection> connection() const;
  Bytes slot_bytes_of(std::uint32_t slot) const;

  const SessionOptions options_;
  const pid_t owner_pid_;
  SystemClock clock_;
  SystemRng rng_;
  TicketTable tickets_;
  CaptureEngine engine_;
  GpuCapture gpus_;
  kernels::CopyKernel kernel_;

  // Session thread only.
  std::string socket_path_;
  std::string daemon_version_;
  std::string warnings_;
  bool is_attached_ = false;  // Once, if not now.
  std::shared_ptr<const Layout> layout_;
  std::unique_ptr<CaptureSources> sources_;
  TornCheck torn_check_;
  std::optional<shm::Arena> arena_;
  std::uint64_t slot_bytes_ = 0;
  std::vector<Slot> slots_;
  std::string told_lane_;  // What the daemon knows.
  // The capture that is neither published nor voided.
  struct Capturing {
    std::uint64_t ticket = 0;
    std::uint64_t daemon_ticket = 0;
    std::uint32_t slot = 0;
    TornCheck::Extent check = TornCheck::Extent::kSample;
    bool is_compared = false;  // At the fence; the host's memory may have changed since.
  };
  std::optional<Capturing> capturing_;
  // A dial that took long and failed is not repeated at every save.
  std::optional<Error> dial_error_;
  std::int64_t dial_again_ns_ = 0;

  // Any thread, under the mutex.
  mutable std::mutex mutex_;
  std::shared_ptr<Connection> connection_;
  std::uint64_t layout_id_ = 0;  // The daemon's name for layout_.
  std::vector<ReadySlot> ready_slots_;
  std::optional<Offer> offer_;  // The newest.
};

}  // namespace stillframe::client
