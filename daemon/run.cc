#include "daemon/run.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <boost/asio/steady_timer.hpp>
#include <utility>

#include "base/text.h"
#include "daemon/save.h"

namespace stillframe::daemon {

namespace {

// Recycled files in hand: one for each part of a checkpoint that retires and of one that is
// written.
constexpr std::size_t kSpoolFileCountMax = 8;

std::string new_run_id(Rng& rng) { return to_hex(Hash128{.low = rng.next(), .high = rng.next()}); }

double milliseconds(std::int64_t ns) { return static_cast<double>(ns) / 1e6; }

}  // namespace

Run::Run(Environment& environment, std::string path)
    : environment_(environment),
      path_(std::move(path)),
      next_ticket_(environment.instance_nonce >> 1),
      changed_(environment.context),
      tasks_(environment.context) {
  tasks_.set_on_end([this] {
    if (on_idle_) on_idle_();
  });
}

Run::~Run() = default;

Task<std::shared_ptr<Run>> Run::open(Environment& environment, std::string path,
                                     bool force_filesystem) {
  auto run = std::make_shared<Run>(environment, std::move(path));
  auto io = IoThread::start(environment.context, environment.backend_factory);
  if (!io) co_return std::move(io).error();
  run->io_ = *std::move(io);
  auto loaded = co_await run->load(force_filesystem);
  if (!loaded) co_return std::move(loaded).error();
  co_return run;
}

Task<Unit> Run::load(bool force_filesystem) {
  auto verdict = catalog::judge_filesystem(path_);
  if (!verdict) co_return std::move(verdict).error();
  switch (verdict->kind) {
    case catalog::FilesystemVerdict::Kind::kDurable: break;
    case catalog::FilesystemVerdict::Kind::kWarned:
      warnings_.push_back(concat(path_, " is on ", verdict->name,
                                 ": a power cut may lose checkpoints that were durable"));
      break;
    case catalog::FilesystemVerdict::Kind::kRefused:
      if (!force_filesystem) {
        co_return Error(
            Code::kInvalidArgument,
            concat(path_, " is on ", verdict->name,
                   ", a network file system; use a local disk, or force_filesystem=True"));
      }
      warnings_.push_back(concat(path_, " is on ", verdict->name, ", forced"));
      break;
  }

  // Opening makes the directory, so that there is something to lock; recovery and the scan come
  // after the lock, since they belong to its holder.
  std::function<Result<std::string>(uring::IoBackend&)> create =
      [path = path_, id = new_run_id(environment_.rng)](uring::IoBackend& io) {
        return catalog::create_run(io, path, id);
      };
  auto created = co_await io_->run(std::move(create));
  if (!created) co_return std::move(created).error();

  auto lock = catalog::RunLock::acquire(path_, environment_.instance_nonce);
  if (!lock) co_return std::move(lock).error();
  lock_.emplace(*std::move(lock));

  std::function<Result<catalog::Recovered>(uring::IoBackend&)> recover =
      [path = path_, nonce = environment_.instance_nonce](uring::IoBackend& io) {
        return catalog::recover(io, path, nonce);
      };
  auto recovered = co_await io_->run(std::move(recover));
  if (!recovered) co_return std::move(recovered).error();
  for (const std::string& name : recovered->removed_temporaries) {
    environment_.log.info("run={} recovery removed unfinished {}", path_, name);
  }
  for (const std::string& name : recovered->finished_victims) {
    environment_.log.info("run={} recovery finished the removal of {}", path_, name);
  }
  co_return co_await reload();
}

Task<Unit> Run::reload() {
  std::function<Result<catalog::RunContents>(uring::IoBackend&)> read =
      [this](uring::IoBackend& io) {
        auto found = catalog::read_run(io, path_);
        if (found) {
          const catalog::Checkpoint* newest = found->newest();
          newest_durable_.reset();
          if (newest != nullptr) newest_durable_ = newest->manifest.sequence;
        }
        return found;
      };
  auto contents = co_await io_->run(std::move(read));
  if (!contents) co_return std::move(contents).error();
  // A sequence once given to a save stays used, whatever became of it.
  contents->next_sequence = std::max(contents->next_sequence, contents_.next_sequence);
  contents_ = *std::move(contents);
  for (const catalog::DamagedCheckpoint& damaged : contents_.damaged) {
    environment_.log.warn("run={} damaged checkpoint {}: {}", path_, damaged.path,
                          damaged.reason.message());
  }
  co_return Unit();
}

Status Run::enter(TrainerOptions options, std::int64_t pid) {
  if (trainer_pid_) {
    return Error(Code::kUnavailable,
                 concat("run ", path_, " is being written by process ", *trainer_pid_,
                        "; one trainer at a time, of several ranks one"));
  }
  trainer_pid_ = pid;
  is_arena_as_found_ = arena_ != nullptr;
  ++trainer_generation_;
  options_ = std::move(options);
  return ok();
}

void Run::leave(bool clean) {
  trainer_pid_.reset();
  on_slot_ready_ = nullptr;
  on_slot_free_ = nullptr;
  withdraw_offer();
  ++trainer_generation_;
  if (arena_) arena_->give_back_all();
  // Who only looks, or resumes in several steps, leaves the snapshot of a dead trainer to the next.
  if (clean && !is_arena_as_found_) {
    drop_arena();
  } else if (arena_) {
    tasks_.spawn(drop_arena_later());
  }
  changed_.notify();
  if (on_idle_) on_idle_();
}

asio::awaitable<void> Run::drop_arena_later() {
  const auto deadline = std::chrono::steady_clock::now() + environment_.keep_slots;
  const std::uint64_t generation = trainer_generation_;
  while (generation == trainer_generation_ && !is_closing_ &&
         std::chrono::steady_clock::now() < deadline) {
    co_await changed_.wait(deadline);
  }
  if (generation == trainer_generation_ && !is_closing_) drop_arena();
}

void Run::drop_arena() {
  if (!arena_) return;
  is_arena_as_found_ = false;
  arena_->stop_preparing();
  tasks_.spawn(release(std::exchange(arena_, nullptr)));
}

asio::awaitable<void> Run::release(std::shared_ptr<RankArena> arena) {
  const auto is_used = [&arena](const std::shared_ptr<ActiveSave>& save) {
    return save->arena == arena;
  };
  while (std::any_of(active_saves_.begin(), active_saves_.end(), is_used)) {
    co_await changed_.wait();
  }
  // The ring's registration would keep the pages alive after the last mapping went.
  std::function<Status(uring::IoBackend&)> unregister = [arena](uring::IoBackend& io) {
    for (std::size_t i = 0; i < arena->slots().size(); ++i) io.unregister_memory(arena->slot(i));
    return ok();
  };
  (void)co_await io_->run(std::move(unregister));
}

Task<Run::Registered> Run::register_layout(std::shared_ptr<const SnapshotPlan> plan, UniqueFd kept,
                                           std::function<void(std::size_t slot)> on_ready,
                                           std::function<void()> on_free) {
  on_slot_ready_ = std::move(on_ready);
  on_slot_free_ = std::move(on_free);
  withdraw_offer();
  if (arena_ && arena_->slot_bytes() >= plan->slot_bytes && !arena_->prepare_error()) {
    Registered same{.arena = arena_, .is_kept = true};
    co_return same;
  }
  if (arena_) {
    // The old one's memory is given back before the new one is taken; saves still write from it.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!active_saves_.empty() && std::chrono::steady_clock::now() < deadline) {
      co_await changed_.wait(deadline);
    }
    drop_arena();
  }

  Registered made;
  if (kept) {
    auto adopted = RankArena::adopt(environment_, *io_, std::move(kept), plan->slot_bytes,
                                    options_.slot_count);
    // Of another size or kind: not an error, a new one is made.
    if (adopted) {
      made.arena = *std::move(adopted);
      made.is_kept = true;
    }
  }
  if (!made.arena) {
    const std::uint64_t cap_bytes =
        options_.arena_bytes_max != 0 && environment_.arena_bytes_max != 0
            ? std::min(options_.arena_bytes_max, environment_.arena_bytes_max)
            : std::max(options_.arena_bytes_max, environment_.arena_bytes_max);
    auto created =
        RankArena::create(environment_, *io_, plan->slot_bytes, options_.slot_count, cap_bytes);
    if (!created) co_return std::move(created).error();
    made.arena = *std::move(created);
  }
  arena_ = made.arena;
  std::function<void(std::size_t)> tell = [this](std::size_t slot) {
    if (on_slot_ready_) on_slot_ready_(slot);
  };
  tasks_.spawn(RankArena::prepare(arena_, std::move(tell)));
  co_return made;
}

std::optional<Run::Offer> Run::offer_slot() {
  if (!arena_ || offer_) return std::nullopt;
  const auto slot = arena_->find_free();
  if (!slot) return std::nullopt;
  offer_ = Offer{.ticket = next_ticket_++, .slot = *slot, .sequence = contents_.next_sequence++};
  return offer_;
}

void Run::withdraw_offer() {
  if (!offer_) return;
  // No later one was given out: a save has none but that of an offer, or asks and ends the offer.
  contents_.next_sequence = offer_->sequence;
  offer_.reset();
}

// The offer that the trainer takes, or what is free first.
Task<Run::Offer> Run::slot_for(const Begin& begin) {
  if (begin.offered_ticket != 0) {
    if (!offer_ || offer_->ticket != begin.offered_ticket) {
      co_return Error(Code::kInvalidArgument,
                      concat("save: ticket ", begin.offered_ticket, " is not on offer"));
    }
    arena_->take(offer_->slot);
    Offer taken = *std::exchange(offer_, std::nullopt);
    co_return taken;
  }
  withdraw_offer();
  const std::shared_ptr<RankArena> arena = arena_;
  auto slot = co_await arena->acquire(begin.deadline);
  if (!slot) co_return std::move(slot).error();
  Offer taken{.ticket = next_ticket_++, .slot = *slot, .sequence = contents_.next_sequence++};
  co_return taken;
}

Task<std::shared_ptr<ActiveSave>> Run::begin_save(Begin begin,
                                                  std::shared_ptr<const SnapshotPlan> plan,
                                                  OnEnded on_ended) {
  if (begin.step < 0) {
    co_return Error(Code::kInvalidArgument,
                    concat("step ", begin.step, " is negative; steps count from 0"));
  }
  const std::shared_ptr<RankArena> arena = arena_;
  if (!arena) co_return Error(Code::kInvalidArgument, "no layout is registered");
  auto taken = co_await slot_for(begin);
  if (!taken) co_return std::move(taken).error();

  is_arena_as_found_ = false;
  auto save = std::make_shared<ActiveSave>(environment_.context, std::move(plan),
                                           [io = io_.get()] { io->wake(); });
  save->arena = arena;
  save->slot = taken->slot;
  save->ticket = taken->ticket;
  save->accepted_ns = environment_.clock.monotonic_ns();
  SaveRequest& request = save->request;
  request.run_path = path_;
  request.run_id = contents_.run_id;
  request.instance_nonce = environment_.instance_nonce;
  request.sequence = taken->sequence;
  request.step = begin.step;
  request.rank = options_.rank;
  request.world_size = options_.world_size;
  request.wall_ns = environment_.clock.wall_ns();
  request.metrics = std::move(begin.metrics);
  for (const auto& best : options_.retention.best) request.best_rules.push_back(best.rule);
  request.framework = options_.framework;
  request.python_version = options_.python_version;
  request.has_pickle = begin.has_pickle;
  request.state_json = std::move(begin.state_json);
  active_saves_.push_back(save);
  tasks_.spawn(write_and_retain(save, std::move(on_ended)));
  co_return save;
}

Status Run::end_capture(ActiveSave& save, std::optional<Error> void_reason) {
  Status status = ok();
  if (!void_reason) {
    status = save.stream.complete();
    if (status) {
      save.is_captured = true;
      save.captured_ns = environment_.clock.monotonic_ns();
    } else {
      void_reason.emplace(status.error());
    }
  }
  if (void_reason) save.stream.void_capture(*std::move(void_reason));
  save.is_capture_ended = true;
  save.changed.notify();
  return status;
}

asio::awaitable<void> Run::write_and_retain(std::shared_ptr<ActiveSave> save, OnEnded on_ended) {
  std::function<Result<CommittedCheckpoint>(uring::IoBackend&)> job = [this,
                                                                       save](uring::IoBackend& io) {
    // Decided here, where saves stand one behind the other: the newest that is durable by now.
    save->request.previous_sequence = newest_durable_;
    const Snapshot snapshot{
        .plan = *save->plan, .slot = save->arena->slot(save->slot), .stream = save->stream};
    auto result = stillframe::daemon::save(io, snapshot, save->request, environment_.hash_pool);
    if (result) newest_durable_ = save->request.sequence;
    return result;
  };
  auto committed = co_await io_->run(std::move(job));
  const std::int64_t ended_ns = environment_.clock.monotonic_ns();

  std::optional<Error> failure;
  if (committed) {
    ++durable_count_;
    // A scan for a tool may have seen it already.
    const catalog::Checkpoint* newest = contents_.newest();
    if (newest == nullptr || newest->manifest.sequence < save->request.sequence) {
      contents_.checkpoints.push_back(committed->checkpoint());
    }
    is_retention_suspended_ = false;
    environment_.log.info("run={} step={} sequence={} captured={:.1f}ms durable={:.1f}ms bytes={}",
                          path_, save->request.step, save->request.sequence,
                          milliseconds(save->captured_ns - save->accepted_ns),
                          milliseconds(ended_ns - save->accepted_ns), save->plan->bytes);
  } else {
    ++failed_count_;
    failure = std::move(committed).error();
    last_error_ = concat("step ", save->request.step, ": ", failure->message());
    if (failure->code() != Code::kCancelled) is_retention_suspended_ = true;
    environment_.log.error("run={} step={} sequence={} failed: {}", path_, save->request.step,
                           save->request.sequence, failure->message());
  }
  on_ended(*save, failure, ended_ns);

  // A save may fail before its capture ends; until then the client's copiers still write to the
  // slot.
  while (!save->is_capture_ended) co_await save->changed.wait();
  if (failure) {
    save->arena->release_free(save->slot);
  } else {
    save->arena->release_resident(save->slot, save->request.sequence, save->plan->layout_id);
  }
  std::erase(active_saves_, save);
  changed_.notify();
  if (on_slot_free_) on_slot_free_();

  if (!failure && !is_retention_suspended_) {
    auto retained = co_await retain();
    if (!retained) {
      last_error_ = concat("retention: ", retained.error().message());
      environment_.log.error("run={} retention failed: {}", path_, retained.error().message());
    }
  }
}

Task<Unit> Run::retain() {
  const auto victims = catalog::choose_victims(contents_, options_.retention);
  std::vector<std::pair<std::uint64_t, std::string>> chosen;
  for (const catalog::Checkpoint* victim : victims) {
    chosen.emplace_back(victim->manifest.sequence, victim->path);
  }

  const catalog::Checkpoint* newest = contents_.newest();
  const catalog::SpoolLimits limits{.file_count_max = kSpoolFileCountMax,
                                    .bytes_max = newest != nullptr ? 2 * newest->bytes() : 0};
  bool has_spared = false;
  for (const auto& [sequence, victim_path] : chosen) {
    // Out of the list first: whatever happens now, it is no longer promised.
    std::erase_if(contents_.checkpoints, [&victim_path](const catalog::Checkpoint& checkpoint) {
      return checkpoint.path == victim_path;
    });
    // A tag may have been set since the choice. Nothing comes between this look and the removal.
    std::function<Result<bool>(uring::IoBackend&)> job =
        [path = path_, sequence, victim_path, limits](uring::IoBackend& io) -> Result<bool> {
      auto tagged = catalog::is_tagged(io, path, sequence);
      if (!tagged || *tagged) return tagged;
      auto retired = catalog::retire(io, path, victim_path, limits);
      if (!retired) return std::move(retired).error();
      return false;
    };
    auto spared = co_await io_->run(std::move(job));
    if (!spared) co_return std::move(spared).error();
    has_spared = has_spared || *spared;
  }
  if (has_spared) {
    auto reloaded = co_await reload();
    if (!reloaded) co_return std::move(reloaded).error();
  }
  std::function<Status(uring::IoBackend&)> links = [contents = contents_](uring::IoBackend& io) {
    catalog::refresh_links(io, contents);
    return ok();
  };
  co_return co_await io_->run(std::move(links));
}

Task<Unit> Run::settle(std::chrono::steady_clock::time_point deadline) {
  const auto is_pending = [](const std::shared_ptr<ActiveSave>& save) { return save->is_captured; };
  while (std::any_of(active_saves_.begin(), active_saves_.end(), is_pending)) {
    if (std::chrono::steady_clock::now() >= deadline) {
      co_return Error(Code::kUnavailable,
                      concat("run ", path_, ": a captured save is not durable yet; wait longer"));
    }
    co_await changed_.wait(deadline);
  }
  co_return Unit();
}

std::optional<std::size_t> Run::lend_slot(std::uint64_t sequence, std::uint64_t layout_id) {
  // Only what is still on the disk too: a snapshot whose checkpoint was removed must not come back.
  const bool is_listed = std::any_of(
      contents_.checkpoints.begin(), contents_.checkpoints.end(),
      [sequence](const catalog::Checkpoint& one) { return one.manifest.sequence == sequence; });
  if (!arena_ || !is_listed) return std::nullopt;
  return arena_->lend(sequence, layout_id);
}

void Run::return_slot(std::size_t slot) {
  if (arena_ && slot < arena_->slots().size()) arena_->give_back(slot);
}

Task<Unit> Run::retire(std::uint64_t sequence) {
  std::function<Status(uring::IoBackend&)> job = [path = path_,
                                                  sequence](uring::IoBackend& io) -> Status {
    auto contents = catalog::read_run(io, path);
    if (!contents) return std::move(contents).error();
    const format::Selector selector{.kind = format::Selector::Kind::kSequence,
                                    .sequence = sequence};
    auto checkpoint = catalog::select(*contents, selector);
    if (!checkpoint) return std::move(checkpoint).error();
    return catalog::retire(io, path, (*checkpoint)->path, catalog::SpoolLimits());
  };
  auto retired = co_await io_->run(std::move(job));
  if (!retired) co_return retired;
  co_return co_await reload();
}

Task<Unit> Run::set_tag(std::string tag, std::uint64_t sequence) {
  std::function<Status(uring::IoBackend&)> job = [path = path_, tag = std::move(tag),
                                                  sequence](uring::IoBackend& io) {
    return sequence == 0 ? catalog::remove_tag(io, path, tag)
                         : catalog::set_tag(io, path, tag, sequence);
  };
  auto done = co_await io_->run(std::move(job));
  if (!done) co_return done;
  co_return co_await reload();
}

bool Run::is_idle() const noexcept {
  return !trainer_pid_ && active_saves_.empty() && !arena_ && tasks_.running_count() == 0;
}

asio::awaitable<void> Run::close() {
  is_closing_ = true;
  on_idle_ = nullptr;
  for (const auto& save : active_saves_) {
    if (!save->is_capture_ended) {
      (void)end_capture(*save, Error(Code::kCancelled, "the daemon stops"));
    }
  }
  drop_arena();
  changed_.notify();
  co_await tasks_.join();
}

}  // namespace stillframe::daemon
