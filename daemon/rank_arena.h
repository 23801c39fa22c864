#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "base/result.h"
#include "daemon/environment.h"
#include "daemon/task.h"
#include "shm/arena.h"

namespace stillframe::daemon {

// The arena of one (run, rank) and the state of its slots. Asio thread only, but for the thread
// that pre-faults. Shared by the run and by saves that still write from it: the last of them ends
// it.
class RankArena {
 public:
  enum class SlotState : std::uint8_t {
    kPreparing,  // Its pages are being put in place.
    kFree,
    kBusy,      // Captured into, or written from.
    kResident,  // Holds a durable checkpoint, for restart; the next save may take it.
  };
  struct Slot {
    SlotState state = SlotState::kPreparing;
    shm::PageKind page_kind = shm::PageKind::kUntouched;
    bool is_lent = false;
    std::uint64_t sequence = 0;   // kResident
    std::uint64_t layout_id = 0;  // kResident
  };

  // As many slots as wanted and allowed, but one at least. kResourceExhausted: not even one, with
  // the numbers. `io` and the environment outlive it.
  static Result<std::shared_ptr<RankArena>> create(Environment& environment, IoThread& io,
                                                   std::uint64_t slot_bytes,
                                                   std::uint32_t slot_count,
                                                   std::uint64_t arena_bytes_max);
  // The memory that a client kept over a daemon's death.
  static Result<std::shared_ptr<RankArena>> adopt(Environment& environment, IoThread& io,
                                                  UniqueFd memory, std::uint64_t slot_bytes,
                                                  std::uint32_t slot_count_max);
  ~RankArena();
  RankArena(const RankArena&) = delete;
  RankArena& operator=(const RankArena&) = delete;

  // Puts pages behind each slot in turn and registers it with the ring; then it is free and
  // `on_ready` is told. Spawn once, in a scope that is joined before this object goes.
  static asio::awaitable<void> prepare(std::shared_ptr<RankArena> self,
                                       std::function<void(std::size_t slot)> on_ready);
  // Ends prepare() early.
  void stop_preparing() noexcept { stop_ = true; }

  // One that holds nothing, if there is one.
  std::optional<std::size_t> find_free() const;
  // Takes a slot that find_free() named.
  void take(std::size_t slot);
  // A free slot, else the resident one, else the first to become free before `deadline`.
  // kResourceExhausted: none did. The arena outlives the coroutine.
  Task<std::size_t> acquire(std::chrono::steady_clock::time_point deadline);
  void release_free(std::size_t slot);
  // Its checkpoint is durable: it becomes the resident one, the resident before it free.
  void release_resident(std::size_t slot, std::uint64_t sequence, std::uint64_t layout_id);

  // Lends the slot that holds that checkpoint; no save takes it until give_back().
  std::optional<std::size_t> lend(std::uint64_t sequence, std::uint64_t layout_id);
  void give_back(std::size_t slot);
  void give_back_all();

  Bytes slot(std::size_t index) const {
    return arena_.bytes().subspan(index * slot_bytes_, slot_bytes_);
  }
  const std::vector<Slot>& slots() const noexcept { return slots_; }
  std::uint64_t slot_bytes() const noexcept { return slot_bytes_; }
  int memory_fd() const noexcept { return arena_.fd(); }
  const std::optional<Error>& prepare_error() const noexcept { return prepare_error_; }

 private:
  RankArena(Environment& environment, IoThread& io, shm::Arena arena, std::uint64_t slot_bytes,
            std::uint32_t slot_count);
  std::optional<std::size_t> find_takeable() const;

  Environment& environment_;
  IoThread& io_;
  shm::Arena arena_;
  std::uint64_t slot_bytes_;
  std::vector<Slot> slots_;
  Signal changed_;
  std::optional<Error> prepare_error_;
  std::atomic<bool> stop_ = false;
  std::thread prefault_thread_;
};

}  // namespace stillframe::daemon
