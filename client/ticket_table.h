#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "base/error.h"

namespace stillframe::client {

enum class SaveState : std::uint8_t { kAccepted, kCaptured, kDurable, kFailed };

// What is known of one save. Times as in libstillframe.h.
struct SaveInfo {
  std::uint64_t ticket = 0;
  std::uint64_t daemon_ticket = 0;  // Unique within one connection only.
  SaveState state = SaveState::kAccepted;
  std::uint64_t sequence = 0;
  std::int64_t step = 0;
  std::uint64_t bytes = 0;
  std::int64_t begin_ns = 0;
  std::int64_t accepted_ns = 0;
  std::int64_t captured_ns = 0;
  std::int64_t durable_ns = 0;
  std::int64_t begin_call_ns = 0;
  std::int64_t busy_wait_ns = 0;
  std::int64_t first_save_wait_ns = 0;
  std::int64_t fence_wait_ns = 0;
  std::optional<Error> failure;  // With kFailed.

  bool is_ended() const noexcept {
    return state == SaveState::kDurable || state == SaveState::kFailed;
  }
};

struct SaveCounts {
  std::uint64_t accepted = 0;
  std::uint64_t durable = 0;
  std::uint64_t failed = 0;
};

// The newest saves of a session and how they stand. States only go forward: accepted, captured,
// durable; or failed from any but durable. Thread-safe; its lock is the innermost one.
class TicketTable {
 public:
  static constexpr std::size_t kTicketCountMax = 64;

  // Takes a save that the daemon accepted and gives it its ticket, 1 or more.
  std::uint64_t add(SaveInfo save);
  void set_begin_call_ns(std::uint64_t ticket, std::int64_t duration_ns);
  void add_fence_wait_ns(std::uint64_t ticket, std::int64_t duration_ns);
  void set_captured(std::uint64_t ticket, std::int64_t now_ns);
  void set_failed(std::uint64_t ticket, const Error& failure);

  // What the daemon says. Its word may come before add(), from another thread's reading: it is kept
  // until then. Returns our ticket, or 0 when it is not known (yet).
  std::uint64_t set_ended(std::uint64_t daemon_ticket, std::optional<Error> failure,
                          std::int64_t durable_ns);
  // The daemon is gone, and with it what was not durable. Its ticket numbers mean nothing any more.
  void set_all_failed(const Error& failure);

  // nullopt: never given out, or one of the older ones.
  std::optional<SaveInfo> find(std::uint64_t ticket) const;
  SaveCounts counts() const;

 private:
  struct EarlyEnd {
    std::uint64_t daemon_ticket = 0;
    std::optional<Error> failure;
    std::int64_t durable_ns = 0;
  };
  SaveInfo* find_locked(std::uint64_t ticket);
  void end_locked(SaveInfo& save, const std::optional<Error>& failure, std::int64_t durable_ns);

  mutable std::mutex mutex_;
  std::deque<SaveInfo> saves_;  // By ticket.
  std::vector<EarlyEnd> early_ends_;
  std::uint64_t next_ticket_ = 1;
  SaveCounts counts_;
};

}  // namespace stillframe::client
