#include "client/ticket_table.h"

#include <algorithm>
#include <utility>

namespace stillframe::client {

std::uint64_t TicketTable::add(SaveInfo save) {
  const std::lock_guard lock(mutex_);
  save.ticket = next_ticket_;
  saves_.push_back(std::move(save));
  ++next_ticket_;
  ++counts_.accepted;
  if (saves_.size() > kTicketCountMax) saves_.pop_front();
  SaveInfo& added = saves_.back();
  const auto early = std::ranges::find(early_ends_, added.daemon_ticket, &EarlyEnd::daemon_ticket);
  if (early != early_ends_.end()) end_locked(added, early->failure, early->durable_ns);
  // One capture runs at a time: what came early came for this one.
  early_ends_.clear();
  return added.ticket;
}

SaveInfo* TicketTable::find_locked(std::uint64_t ticket) {
  const auto found = std::ranges::find(saves_, ticket, &SaveInfo::ticket);
  return found == saves_.end() ? nullptr : &*found;
}

void TicketTable::set_begin_call_ns(std::uint64_t ticket, std::int64_t duration_ns) {
  const std::lock_guard lock(mutex_);
  if (SaveInfo* const save = find_locked(ticket)) save->begin_call_ns = duration_ns;
}

void TicketTable::add_fence_wait_ns(std::uint64_t ticket, std::int64_t duration_ns) {
  const std::lock_guard lock(mutex_);
  if (SaveInfo* const save = find_locked(ticket)) save->fence_wait_ns += duration_ns;
}

void TicketTable::set_captured(std::uint64_t ticket, std::int64_t now_ns) {
  const std::lock_guard lock(mutex_);
  SaveInfo* const save = find_locked(ticket);
  if (save == nullptr) return;
  if (save->captured_ns == 0) save->captured_ns = now_ns;
  if (save->state == SaveState::kAccepted) save->state = SaveState::kCaptured;
}

void TicketTable::set_failed(std::uint64_t ticket, const Error& failure) {
  const std::lock_guard lock(mutex_);
  SaveInfo* const save = find_locked(ticket);
  if (save != nullptr && !save->is_ended()) end_locked(*save, failure, 0);
}

std::uint64_t TicketTable::set_ended(std::uint64_t daemon_ticket, std::optional<Error> failure,
                                     std::int64_t durable_ns) {
  const std::lock_guard lock(mutex_);
  const auto save = std::ranges::find_if(saves_, [daemon_ticket](const SaveInfo& candidate) {
    return candidate.daemon_ticket == daemon_ticket && !candidate.is_ended();
  });
  if (save == saves_.end()) {
    // Bounded by the slots of a daemon that keeps to the protocol.
    if (early_ends_.size() < kTicketCountMax) {
      early_ends_.push_back({.daemon_ticket = daemon_ticket,
                             .failure = std::move(failure),
                             .durable_ns = durable_ns});
    }
    return 0;
  }
  end_locked(*save, failure, durable_ns);
  return save->ticket;
}

void TicketTable::end_locked(SaveInfo& save, const std::optional<Error>& failure,
                             std::int64_t durable_ns) {
  if (failure) {
    save.state = SaveState::kFailed;
    save.failure = failure;
    ++counts_.failed;
    return;
  }
  save.state = SaveState::kDurable;
  save.durable_ns = durable_ns;
  ++counts_.durable;
}

void TicketTable::set_all_failed(const Error& failure) {
  const std::lock_guard lock(mutex_);
  early_ends_.clear();
  for (SaveInfo& save : saves_) {
    if (!save.is_ended()) end_locked(save, failure, 0);
  }
}

std::optional<SaveInfo> TicketTable::find(std::uint64_t ticket) const {
  const std::lock_guard lock(mutex_);
  const auto found = std::ranges::find(saves_, ticket, &SaveInfo::ticket);
  if (found == saves_.end()) return std::nullopt;
  return *found;
}

SaveCounts TicketTable::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

}  // namespace stillframe::client
