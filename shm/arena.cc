#include "shm/arena.h"

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <optional>

#include "base/os_error.h"
#include "base/text.h"
#include "shm/memory_left.h"
#include "shm/sealed_memory.h"

// Debian 12's headers are older than the kernels that we run on.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14.
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1.
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26U)
#endif

namespace stillframe::shm {

namespace {

constexpr std::uint64_t kBytesMax = std::uint64_t{1} << 62;

Error no_memory(std::uint64_t bytes, int number) {
  return Error(Code::kResourceExhausted, concat("arena: no memory for ", bytes, " bytes"), number);
}

// Sealed and mapped, or the reason why not.
Result<std::pair<UniqueFd, Mapping>> make_pages(std::uint64_t bytes, unsigned extra_flags) {
  auto fd = make_memfd("stillframe-arena", extra_flags);
  if (!fd) return std::move(fd).error();
  if (auto sealed = set_length_and_seal(fd->get(), bytes, kLengthSeals); !sealed) {
    return std::move(sealed).error();
  }
  auto mapping = map_shared(fd->get(), bytes, kHugePageBytes);
  if (!mapping) return std::move(mapping).error();
  return std::pair(std::move(*fd), std::move(*mapping));
}

bool is_hugetlb(int fd) {
  struct statfs status = {};
  return ::fstatfs(fd, &status) == 0 && status.f_type == HUGETLBFS_MAGIC;
}

// Allocates and maps what is missing in `range`; what is there stays as it is. Unlike a store, it
// answers where there is no memory instead of raising SIGBUS. An errno, or 0.
int populate_write(Bytes range) {
  while (::madvise(range.data(), range.size(), MADV_POPULATE_WRITE) != 0) {
    // A signal came, or the kernel lost a race with reclaim: what is done stays done.
    if (errno != EINTR && errno != EAGAIN) return errno;
  }
  return 0;
}

// Makes one 2 MiB piece, of which a page exists, a huge page. An errno, or 0.
int collapse(Bytes piece) {
  // EAGAIN: a page was busy, on its way between the kernel's lists; EBUSY: locked by somebody. Both
  // are mostly gone at once, and small pages do as well when they are not.
  for (int attempt = 0;; ++attempt) {
    if (::madvise(piece.data(), piece.size(), MADV_COLLAPSE) == 0) return 0;
    if ((errno != EAGAIN && errno != EBUSY) || attempt == 2) return errno;
  }
}

}  // namespace

std::string_view name(PageKind kind) noexcept {
  switch (kind) {
    case PageKind::kUntouched: return "untouched";
    case PageKind::kSmall: return "4 KiB";
    case PageKind::kHuge: return "2 MiB";
    case PageKind::kHugetlb: return "hugetlb";
  }
  return "unknown";
}

Result<SlotPlan> plan_slot(std::span<const std::uint64_t> image_bytes) {
  SlotPlan plan;
  plan.part_offsets.reserve(image_bytes.size());
  std::uint64_t end = 0;
  for (const std::uint64_t bytes : image_bytes) {
    plan.part_offsets.push_back(end);
    const auto sum = checked_add(end, bytes);
    if (!sum || *sum > kBytesMax) {
      return Error(Code::kInvalidArgument, concat("slot: more than ", kBytesMax, " bytes"));
    }
    end = round_up(*sum, kExtentBytes);
  }
  // A layout without tensors has a slot too, so that everything behind it has something to map.
  plan.slot_bytes = std::max<std::uint64_t>(round_up(end, kHugePageBytes), kHugePageBytes);
  return plan;
}

Result<Arena> Arena::create(std::uint64_t bytes) {
  if (bytes == 0 || bytes % kHugePageBytes != 0 || bytes > kBytesMax) {
    return Error(Code::kInvalidArgument, concat("arena: ", bytes, " bytes, not pieces of 2 MiB"));
  }
  // The mapping reserves its pages from the pool. When another process was faster, or a cgroup's
  // hugetlb limit says no, this is an error here and never a SIGBUS later.
  if (hugetlb_pages_free() >= bytes / kHugePageBytes) {
    auto pages = make_pages(bytes, MFD_HUGETLB | MFD_HUGE_2MB);
    if (pages) return Arena(std::move(pages->first), std::move(pages->second));
  }
  auto pages = make_pages(bytes, 0);
  if (!pages) {
    const int number = pages.error().native();
    // EFBIG: longer than a file of this kernel; EINVAL of ftruncate() beyond 2^63 cannot happen.
    if (number == ENOMEM || number == ENOSPC || number == EFBIG) return no_memory(bytes, number);
    return std::move(pages).error();
  }
  // Counts where shmem_enabled is "advise": then the first touch is a huge page at once.
  (void)::madvise(pages->second.bytes().data(), bytes, MADV_HUGEPAGE);
  return Arena(std::move(pages->first), std::move(pages->second));
}

Result<Arena> Arena::adopt(UniqueFd fd, std::uint64_t bytes) {
  if (bytes == 0 || bytes % kHugePageBytes != 0 || bytes > kBytesMax) {
    return Error(Code::kInvalidArgument, concat("arena: ", bytes, " bytes, not pieces of 2 MiB"));
  }
  if (auto fits = check_length_sealed("arena", fd.get(), bytes); !fits) {
    return std::move(fits).error();
  }
  auto mapping = map_shared(fd.get(), bytes, kHugePageBytes);
  if (!mapping) return std::move(mapping).error();
  return Arena(std::move(fd), std::move(*mapping));
}

Result<PageKind> Arena::prefault(std::uint64_t offset, std::uint64_t bytes,
                                 const std::atomic<bool>& stop) {
  const Bytes all = mapping_.bytes();
  if (offset > all.size() || bytes > all.size() - offset || offset % kHugePageBytes != 0 ||
      bytes % kHugePageBytes != 0) {
    return Error(Code::kInvalidArgument,
                 concat("arena: prefault ", bytes, " bytes at ", offset, " of ", all.size()));
  }
  const bool has_hugetlb = is_hugetlb(fd_.get());
  // EINVAL of the first collapse: this kernel has none for shared memory, so do not ask 8000 times.
  bool may_collapse = !has_hugetlb;
  bool all_huge = true;
  for (std::uint64_t done = 0; done < bytes; done += kHugePageBytes) {
    if (stop.load(std::memory_order_relaxed)) {
      return Error(Code::kCancelled,
                   concat("arena: stopped after ", done, " of ", bytes, " bytes"));
    }
    const Bytes piece = all.subspan(offset + done, kHugePageBytes);
    if (may_collapse) {
      // One page has to exist: a hole does not collapse.
      if (const int number = populate_write(piece.first(kBlockBytes)); number != 0) {
        return no_memory(bytes - done, number);
      }
      const int number = collapse(piece);
      if (number != 0) all_huge = false;
      if (number == EINVAL) may_collapse = false;
    } else if (!has_hugetlb) {
      all_huge = false;
    }
    // Fills the page table; where nothing collapsed it also takes the pages.
    if (const int number = populate_write(piece); number != 0) {
      return no_memory(bytes - done, number);
    }
  }
  if (bytes == 0) return PageKind::kUntouched;
  if (has_hugetlb) return PageKind::kHugetlb;
  return all_huge ? PageKind::kHuge : PageKind::kSmall;
}

Status Arena::populate(std::uint64_t offset, std::uint64_t bytes) {
  const Bytes all = mapping_.bytes();
  if (offset > all.size() || bytes > all.size() - offset || offset % kBlockBytes != 0) {
    return Error(Code::kInvalidArgument,
                 concat("arena: populate ", bytes, " bytes at ", offset, " of ", all.size()));
  }
  if (bytes == 0) return ok();
  if (const int number = populate_write(all.subspan(offset, bytes)); number != 0) {
    return no_memory(bytes, number);
  }
  return ok();
}

std::uint64_t arena_bytes_limit(std::uint64_t configured_max) {
  const std::uint64_t half = memory_left() / 2;
  const std::uint64_t limit = configured_max == 0 ? half : std::min(configured_max, half);
  return round_down(limit, kHugePageBytes);
}

}  // namespace stillframe::shm
