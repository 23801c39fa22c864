#include "daemon/rank_arena.h"

#include <pthread.h>
#include <sys/stat.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <utility>

#include "base/os_error.h"
#include "base/text.h"

namespace stillframe::daemon {

RankArena::RankArena(Environment& environment, IoThread& io, shm::Arena arena,
                     std::uint64_t slot_bytes, std::uint32_t slot_count)
    : environment_(environment),
      io_(io),
      arena_(std::move(arena)),
      slot_bytes_(slot_bytes),
      slots_(slot_count),
      changed_(environment.context) {}

RankArena::~RankArena() {
  stop_ = true;
  if (prefault_thread_.joinable()) prefault_thread_.join();
}

Result<std::shared_ptr<RankArena>> RankArena::create(Environment& environment, IoThread& io,
                                                     std::uint64_t slot_bytes,
                                                     std::uint32_t slot_count,
                                                     std::uint64_t arena_bytes_max) {
  const std::uint64_t limit_bytes = shm::arena_bytes_limit(arena_bytes_max);
  const std::uint64_t fitting_count =
      std::min<std::uint64_t>(slot_count, limit_bytes / std::max<std::uint64_t>(slot_bytes, 1));
  if (fitting_count == 0) {
    return Error(Code::kResourceExhausted,
                 concat("arena: one slot needs ", slot_bytes, " bytes, the limit is ", limit_bytes,
                        arena_bytes_max != 0 ? " (configured)" : " (half of the memory left)",
                        "; free memory, raise the cap or save less"));
  }
  auto arena = shm::Arena::create(slot_bytes * fitting_count);
  if (!arena) return std::move(arena).error();
  return std::shared_ptr<RankArena>(new RankArena(environment, io, *std::move(arena), slot_bytes,
                                                  static_cast<std::uint32_t>(fitting_count)));
}

Result<std::shared_ptr<RankArena>> RankArena::adopt(Environment& environment, IoThread& io,
                                                    UniqueFd memory, std::uint64_t slot_bytes,
                                                    std::uint32_t slot_count_max) {
  struct stat status {};
  if (::fstat(memory.get(), &status) != 0) return os_error("look at the client's arena", errno);
  // As many slots as its first daemon found memory for.
  const std::uint64_t bytes = static_cast<std::uint64_t>(status.st_size);
  const std::uint64_t slot_count = bytes / slot_bytes;
  if (slot_count == 0 || slot_count > slot_count_max || bytes % slot_bytes != 0) {
    return Error(Code::kInvalidArgument,
                 concat("arena: the client's has ", bytes, " bytes, not up to ", slot_count_max,
                        " slots of ", slot_bytes));
  }
  auto arena = shm::Arena::adopt(std::move(memory), bytes);
  if (!arena) return std::move(arena).error();
  return std::shared_ptr<RankArena>(new RankArena(environment, io, *std::move(arena), slot_bytes,
                                                  static_cast<std::uint32_t>(slot_count)));
}

asio::awaitable<void> RankArena::prepare(std::shared_ptr<RankArena> self,
                                         std::function<void(std::size_t slot)> on_ready) {
  for (std::size_t i = 0; i < self->slots_.size(); ++i) {
    std::optional<Result<shm::PageKind>> faulted;
    Signal done(self->environment_.context);
    self->prefault_thread_ = std::thread([arena = self.get(), i, &faulted, &done] {
      (void)::pthread_setname_np(::pthread_self(), "sf-prefault");
      auto result =
          arena->arena_.prefault(i * arena->slot_bytes_, arena->slot_bytes_, arena->stop_);
      asio::post(arena->environment_.context,
                 [&faulted, &done, result = std::move(result)]() mutable {
                   faulted.emplace(std::move(result));
                   done.notify();
                 });
    });
    while (!faulted) co_await done.wait();
    self->prefault_thread_.join();
    if (self->stop_) co_return;
    if (!*faulted) {
      self->prepare_error_ = std::move(*faulted).error();
      self->changed_.notify();
      co_return;
    }
    // Pins the pages, so it comes after they were collapsed into large ones. Without it a write
    // costs more CPU, no more.
    std::function<Status(uring::IoBackend&)> register_slot =
        [arena = self, i](uring::IoBackend& io) { return io.register_memory(arena->slot(i)); };
    (void)co_await self->io_.run(std::move(register_slot));
    self->slots_[i].page_kind = **faulted;
    self->slots_[i].state = SlotState::kFree;
    self->changed_.notify();
    on_ready(i);
  }
}

std::optional<std::size_t> RankArena::find_free() const {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].state == SlotState::kFree && !slots_[i].is_lent) return i;
  }
  return std::nullopt;
}

std::optional<std::size_t> RankArena::find_takeable() const {
  if (const auto free = find_free()) return free;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].state == SlotState::kResident && !slots_[i].is_lent) return i;
  }
  return std::nullopt;
}

void RankArena::take(std::size_t slot) {
  slots_[slot] = Slot{.state = SlotState::kBusy, .page_kind = slots_[slot].page_kind};
}

Task<std::size_t> RankArena::acquire(std::chrono::steady_clock::time_point deadline) {
  for (;;) {
    if (const auto slot = find_takeable()) {
      take(*slot);
      co_return *slot;
    }
    if (prepare_error_) co_return *prepare_error_;
    if (std::chrono::steady_clock::now() >= deadline) {
      co_return Error(Code::kResourceExhausted,
                      concat("arena: no free slot of ", slots_.size(),
                             "; earlier snapshots are still being written"));
    }
    co_await changed_.wait(deadline);
  }
}

void RankArena::release_free(std::size_t slot) {
  slots_[slot].state = SlotState::kFree;
  changed_.notify();
}

void RankArena::release_resident(std::size_t slot, std::uint64_t sequence,
                                 std::uint64_t layout_id) {
  for (Slot& other : slots_) {
    if (other.state == SlotState::kResident && !other.is_lent) other.state = SlotState::kFree;
  }
  slots_[slot].state = SlotState::kResident;
  slots_[slot].sequence = sequence;
  slots_[slot].layout_id = layout_id;
  changed_.notify();
}

std::optional<std::size_t> RankArena::lend(std::uint64_t sequence, std::uint64_t layout_id) {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (slot.state == SlotState::kResident && slot.sequence == sequence &&
        slot.layout_id == layout_id) {
      slot.is_lent = true;
      return i;
    }
  }
  return std::nullopt;
}

void RankArena::give_back(std::size_t slot) {
  slots_[slot].is_lent = false;
  changed_.notify();
}

void RankArena::give_back_all() {
  for (Slot& slot : slots_) slot.is_lent = false;
  changed_.notify();
}

}  // namespace stillframe::daemon
