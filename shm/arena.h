#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/mapping.h"
#include "base/result.h"
#include "base/unique_fd.h"

namespace stillframe::shm {

// Where each part's image begins in a slot, and how long a slot is. Images begin on an extent
// boundary; a slot's length is a multiple of 2 MiB, at least one. Client and daemon both compute it
// and must agree.
struct SlotPlan {
  std::vector<std::uint64_t> part_offsets;
  std::uint64_t slot_bytes = 0;
};
// kInvalidArgument: the sum exceeds 2^62.
Result<SlotPlan> plan_slot(std::span<const std::uint64_t> image_bytes);

enum class PageKind : std::uint8_t { kUntouched, kSmall, kHuge, kHugetlb };
std::string_view name(PageKind kind) noexcept;  // "4 KiB", "2 MiB", "hugetlb"

// The daemon-owned memory of one (run, rank): a memfd that can neither shrink nor grow, mapped at
// an address that is a multiple of 2 MiB, not inherited by forked children (MADV_DONTFORK).
class Arena {
 public:
  // Daemon: makes and seals one (SHRINK | GROW | SEAL) of `bytes`, a multiple of 2 MiB. Takes
  // MFD_HUGETLB pages when a pool has them all. No page is touched yet.
  // kResourceExhausted: no memory, with the amount.
  static Result<Arena> create(std::uint64_t bytes);

  // Either side: maps a received memfd. kInvalidArgument unless it is a memfd with exactly those
  // seals (F_SEAL_WRITE kinds not among them) and exactly `bytes` long.
  static Result<Arena> adopt(UniqueFd fd, std::uint64_t bytes);

  Bytes bytes() const noexcept { return mapping_.bytes(); }
  int fd() const noexcept { return fd_.get(); }

  // Puts pages behind [offset, offset + bytes): touches one page of each 2 MiB and collapses them
  // (MADV_COLLAPSE), falling back to MADV_POPULATE_WRITE with 4 KiB pages. Existing contents are
  // kept. Takes 0.1 to 3 s/GiB once; checks `stop` between 2 MiB pieces. Any one thread.
  // kResourceExhausted: no memory (checked against the cgroup by the kernel: the pages that exist
  // stay); kCancelled: `stop` was set.
  Result<PageKind> prefault(std::uint64_t offset, std::uint64_t bytes,
                            const std::atomic<bool>& stop);

  // Client: fills this process's page table for pages that exist already (MADV_POPULATE_WRITE).
  Status populate(std::uint64_t offset, std::uint64_t bytes);

 private:
  Arena(UniqueFd fd, Mapping mapping) : fd_(std::move(fd)), mapping_(std::move(mapping)) {}

  UniqueFd fd_;
  Mapping mapping_;
};

// What an arena of `slot_bytes` x `slot_count` may take: min of `configured_max` (0: no setting)
// and half of what MemAvailable and the cgroup (v1 or v2) leave.
std::uint64_t arena_bytes_limit(std::uint64_t configured_max);

}  // namespace stillframe::shm
