#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "catalog/change.h"
#include "catalog/run.h"
#include "catalog/run_lock.h"
#include "daemon/environment.h"
#include "daemon/handoff.h"
#include "daemon/rank_arena.h"
#include "daemon/snapshot_stream.h"
#include "daemon/task.h"

namespace stillframe::daemon {

// What a trainer says about its run when it attaches.
struct TrainerOptions {
  std::uint32_t rank = 0;
  std::uint32_t world_size = 1;
  catalog::RetentionPolicy retention;
  std::string framework;
  std::string python_version;
  std::uint64_t arena_bytes_max = 0;  // 0: the daemon's cap.
  std::uint32_t slot_count = 2;
};

// One save between ACCEPTED and its end. Shared by the session that captures and the coroutine that
// writes; either may go first.
struct ActiveSave {
  ActiveSave(asio::io_context& context, std::shared_ptr<const SnapshotPlan> its_plan,
             std::function<void()> wake)
      : plan(std::move(its_plan)), stream(*plan, std::move(wake)), changed(context) {}

  std::shared_ptr<const SnapshotPlan> plan;
  std::shared_ptr<RankArena> arena;
  std::size_t slot = 0;
  std::uint64_t ticket = 0;
  SaveRequest request;
  SnapshotStream stream;
  bool is_captured = false;       // Every extent came.
  bool is_capture_ended = false;  // Nobody writes to the slot any more.
  Signal changed;
  std::int64_t accepted_ns = 0;
  std::int64_t captured_ns = 0;
};

// One open run directory: its lock, its I/O thread, what is in it, its trainer's arena, its saves.
// Lives on the Asio thread.
class Run : public std::enable_shared_from_this<Run> {
 public:
  // Takes the lock, makes the directory when it is absent, recovers what a crash left, scans.
  // kUnavailable: another process writes this run. kInvalidArgument: not a place for a run.
  static Task<std::shared_ptr<Run>> open(Environment& environment, std::string path,
                                         bool force_filesystem);
  Run(Environment& environment, std::string path);
  ~Run();

  // --- The trainer
  // ---------------------------------------------------------------------------------

  // kUnavailable: another live trainer has it. `pid` is for the message.
  Status enter(TrainerOptions options, std::int64_t pid);
  // `clean`: detached; the arena goes. Otherwise, or if the trainer found it and saved nothing, it
  // waits for a restart for keep_slots.
  void leave(bool clean);
  bool has_trainer() const noexcept { return trainer_pid_.has_value(); }
  // False: its directory was removed, or another one is in its place.
  bool is_in_place() const { return !lock_ || lock_->is_in_place(); }

  // The arena for this layout: the one that is there if it is large enough, else the client's own
  // (`kept`), else a new one. `on_ready` hears of each slot that becomes ready later, `on_free` of
  // each that a save gives back.
  struct Registered {
    std::shared_ptr<RankArena> arena;
    bool is_kept = false;
  };
  Task<Registered> register_layout(std::shared_ptr<const SnapshotPlan> plan, UniqueFd kept,
                                   std::function<void(std::size_t slot)> on_ready,
                                   std::function<void()> on_free);

  // What the next save gets, promised ahead so that it need not ask: only a slot that holds
  // nothing. nullopt: there is none, or the one before still stands.
  struct Offer {
    std::uint64_t ticket = 0;
    std::size_t slot = 0;
    std::uint64_t sequence = 0;
  };
  std::optional<Offer> offer_slot();
  const std::optional<Offer>& offer() const noexcept { return offer_; }

  // A slot, a sequence and a ticket; the writing begins at once and follows the capture. `on_ended`
  // hears its end: durable with the time, or failed with the reason.
  struct Begin {
    std::int64_t step = 0;
    std::map<std::string, double> metrics;
    std::string state_json;
    bool has_pickle = false;
    std::uint64_t offered_ticket = 0;  // 0: waits for a slot; an offer then ends.
    std::chrono::steady_clock::time_point deadline;
  };
  using OnEnded = std::function<void(const ActiveSave& save, const std::optional<Error>& failure,
                                     std::int64_t ended_ns)>;
  Task<std::shared_ptr<ActiveSave>> begin_save(Begin begin,
                                               std::shared_ptr<const SnapshotPlan> plan,
                                               OnEnded on_ended);
  // The capture is over: complete, or voided for a reason.
  Status end_capture(ActiveSave& save, std::optional<Error> void_reason);

  // Waits for every save that is captured and not yet at its end. kUnavailable at the deadline.
  Task<Unit> settle(std::chrono::steady_clock::time_point deadline);

  std::optional<std::size_t> lend_slot(std::uint64_t sequence, std::uint64_t layout_id);
  void return_slot(std::size_t slot);

  // --- Tools
  // ---------------------------------------------------------------------------------------

  Task<Unit> retire(std::uint64_t sequence);
  Task<Unit> set_tag(std::string tag, std::uint64_t sequence);  // 0 removes it.

  // --- State
  // ---------------------------------------------------------------------------------------

  const std::string& path() const noexcept { return path_; }
  const catalog::RunContents& contents() const noexcept { return contents_; }
  const std::vector<std::string>& warnings() const noexcept { return warnings_; }
  const IoThread& io() const noexcept { return *io_; }
  const RankArena* arena() const noexcept { return arena_.get(); }
  const std::shared_ptr<RankArena>& shared_arena() const noexcept { return arena_; }
  // As the trainer says, for status displays.
  void set_lane(std::string lane, std::string reason) {
    lane_ = std::move(lane);
    lane_reason_ = std::move(reason);
  }
  const std::string& lane() const noexcept { return lane_; }
  const std::string& lane_reason() const noexcept { return lane_reason_; }
  std::size_t active_save_count() const noexcept { return active_saves_.size(); }
  const std::optional<std::string>& last_error() const noexcept { return last_error_; }
  std::uint64_t durable_count() const noexcept { return durable_count_; }
  std::uint64_t failed_count() const noexcept { return failed_count_; }
  // Nothing keeps it open: no trainer, no save, no slots that wait for a restart.
  bool is_idle() const noexcept;
  // Told whenever is_idle() may have become true.
  void set_on_idle(std::function<void()> on_idle) { on_idle_ = std::move(on_idle); }

  // Voids captures and waits for the writing of what was captured. Call before the last reference
  // goes.
  asio::awaitable<void> close();

 private:
  Task<Unit> load(bool force_filesystem);
  void withdraw_offer();
  Task<Offer> slot_for(const Begin& begin);
  asio::awaitable<void> write_and_retain(std::shared_ptr<ActiveSave> save, OnEnded on_ended);
  asio::awaitable<void> drop_arena_later();
  void drop_arena();
  asio::awaitable<void> release(std::shared_ptr<RankArena> arena);
  Task<Unit> retain();
  Task<Unit> reload();

  Environment& environment_;
  std::string path_;
  std::optional<catalog::RunLock> lock_;
  std::unique_ptr<IoThread> io_;
  catalog::RunContents contents_;
  std::vector<std::string> warnings_;
  std::optional<std::uint64_t> newest_durable_;  // I/O thread only: a save's previous sequence.

  std::optional<std::int64_t> trainer_pid_;
  std::uint64_t trainer_generation_ = 0;  // Another value after each enter() and leave().
  TrainerOptions options_;
  std::shared_ptr<RankArena> arena_;
  bool is_arena_as_found_ = false;  // By the trainer, which has saved nothing.
  std::string lane_ = "host";
  std::string lane_reason_;
  std::function<void(std::size_t)> on_slot_ready_;
  std::function<void()> on_slot_free_;
  std::optional<Offer> offer_;

  std::vector<std::shared_ptr<ActiveSave>> active_saves_;
  std::uint64_t next_ticket_ = 1;
  std::optional<std::string> last_error_;
  std::uint64_t durable_count_ = 0;
  std::uint64_t failed_count_ = 0;
  // The first failed commit suspends retention until one succeeds (DUR-17).
  bool is_retention_suspended_ = false;
  bool is_closing_ = false;
  Signal changed_;
  TaskScope tasks_;
  std::function<void()> on_idle_;
};

}  // namespace stillframe::daemon
