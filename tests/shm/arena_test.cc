#include "shm/arena.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <iostream>

#include "base/text.h"
#include "shm/sealed_memory.h"
#include "tests/shm/temporary_directory.h"

namespace stillframe::shm {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr std::uint64_t kBytes = 8 * kMiB;

Arena Made(std::uint64_t bytes = kBytes) {
  auto arena = Arena::create(bytes);
  check(arena.has_value(), "a small arena can be made");
  return std::move(*arena);
}

UniqueFd Duplicate(int fd) { return UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

// Not what a hole or a page of the kernel would hold.
std::byte Pattern(std::uint64_t offset) {
  return static_cast<std::byte>(1 + (offset * 2654435761U >> 13U) % 255);
}
void Fill(Bytes bytes) {
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = Pattern(i);
}
bool IsFilled(Bytes bytes) {
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] != Pattern(i)) return false;
  }
  return true;
}

std::uint64_t AllocatedBytes(const Arena& arena) {
  struct stat status = {};
  EXPECT_EQ(::fstat(arena.fd(), &status), 0);
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

// A row of /proc/self/smaps for the mapping that begins where the arena does, in bytes.
std::uint64_t SmapsRow(const Arena& arena, std::string_view key) {
  std::ifstream smaps("/proc/self/smaps");
  bool is_ours = false;
  for (std::string line; std::getline(smaps, line);) {
    std::uint64_t start = 0;
    const auto end = std::from_chars(line.data(), line.data() + line.size(), start, 16);
    if (end.ec == std::errc() && *end.ptr == '-') {
      is_ours = start == reinterpret_cast<std::uintptr_t>(arena.bytes().data());
    } else if (is_ours && line.starts_with(key)) {
      return std::stoull(line.substr(key.size() + 1)) * 1024;
    }
  }
  ADD_FAILURE() << "no row " << key;
  return 0;
}

const std::atomic<bool> kGoOn = false;

TEST(SlotPlan, begins_parts_on_extents_and_ends_on_2_MiB) {
  const std::uint64_t images[] = {1, kMiB, 0, 2 * kMiB + 1, 5};
  const auto plan = plan_slot(images);
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->part_offsets,
            (std::vector<std::uint64_t>{0, kMiB, 2 * kMiB, 2 * kMiB, 5 * kMiB}));
  EXPECT_EQ(plan->slot_bytes, 6 * kMiB);
}

TEST(SlotPlan, of_nothing_is_one_large_page) {
  const auto plan = plan_slot({});
  ASSERT_TRUE(plan);
  EXPECT_TRUE(plan->part_offsets.empty());
  EXPECT_EQ(plan->slot_bytes, 2 * kMiB);
}

TEST(SlotPlan, of_more_than_an_address_space_is_refused) {
  constexpr std::uint64_t kHalf = std::uint64_t{1} << 61;
  EXPECT_TRUE(plan_slot(std::vector<std::uint64_t>{kHalf, kHalf}));
  for (const auto& images : {std::vector<std::uint64_t>{kHalf, kHalf, 1},
                             {~std::uint64_t{0}},
                             {~std::uint64_t{0}, ~std::uint64_t{0}},
                             {1, ~std::uint64_t{0}}}) {
    const auto plan = plan_slot(images);
    ASSERT_FALSE(plan);
    EXPECT_EQ(plan.error().code(), Code::kInvalidArgument);
  }
}

TEST(Arena, is_zeros_at_an_aligned_address_and_takes_no_page_at_first) {
  const Arena arena = Made();
  ASSERT_EQ(arena.bytes().size(), kBytes);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(arena.bytes().data()) % kHugePageBytes, 0U);
  EXPECT_EQ(AllocatedBytes(arena), 0U);
  EXPECT_TRUE(std::all_of(arena.bytes().begin(), arena.bytes().end(),
                          [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST(Arena, is_a_multiple_of_2_MiB) {
  for (const std::uint64_t bytes : {std::uint64_t{0}, kMiB, 2 * kMiB + 1, ~std::uint64_t{0}}) {
    const auto arena = Arena::create(bytes);
    ASSERT_FALSE(arena);
    EXPECT_EQ(arena.error().code(), Code::kInvalidArgument);
  }
}

TEST(Arena, that_no_address_space_holds_is_too_much) {
  const auto arena = Arena::create(std::uint64_t{1} << 62);
  ASSERT_FALSE(arena);
  EXPECT_EQ(arena.error().code(), Code::kResourceExhausted) << arena.error().message();
  EXPECT_NE(arena.error().message().find("4611686018427387904"), std::string_view::npos);
}

TEST(Arena, cannot_shrink_grow_or_get_other_seals) {
  const Arena arena = Made();
  for (const off_t length : {off_t{0}, off_t{4096}, off_t{64 * kMiB}}) {
    EXPECT_EQ(::ftruncate(arena.fd(), length), -1);
    EXPECT_EQ(errno, EPERM);
  }
  EXPECT_EQ(::fcntl(arena.fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), -1);
}

// The seals do not forbid it (SHM-4): the hash taken at capture is what notices.
TEST(Arena, can_get_holes_from_any_side_without_a_signal) {
  const Arena arena = Made();
  Fill(arena.bytes());
  ASSERT_EQ(::fallocate(arena.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 2 * kMiB), 0);
  EXPECT_EQ(arena.bytes()[0], std::byte{0});
  EXPECT_EQ(arena.bytes()[2 * kMiB - 1], std::byte{0});
  EXPECT_EQ(arena.bytes()[2 * kMiB], Pattern(2 * kMiB));
}

TEST(Arena, adopted_is_the_same_memory) {
  const Arena made = Made();
  const auto adopted = Arena::adopt(Duplicate(made.fd()), kBytes);
  ASSERT_TRUE(adopted) << adopted.error().message();
  EXPECT_NE(adopted->bytes().data(), made.bytes().data());
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(adopted->bytes().data()) % kHugePageBytes, 0U);
  Fill(made.bytes());
  EXPECT_TRUE(IsFilled(adopted->bytes()));
}

Code RefusalOfAdoption(UniqueFd fd, std::uint64_t bytes = kBytes) {
  const auto arena = Arena::adopt(std::move(fd), bytes);
  EXPECT_FALSE(arena);
  return arena ? Code::kInternal : arena.error().code();
}

UniqueFd MemfdWith(int seals) {
  UniqueFd fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(kBytes)), 0);
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, seals), 0);
  return fd;
}

TEST(Arena, is_adopted_with_exactly_its_seals) {
  EXPECT_TRUE(Arena::adopt(MemfdWith(kLengthSeals), kBytes));
  for (const int seals : {0, F_SEAL_SHRINK, F_SEAL_SHRINK | F_SEAL_GROW, F_SEAL_SEAL,
                          F_SEAL_SHRINK | F_SEAL_SEAL, F_SEAL_GROW | F_SEAL_SEAL,
                          kLengthSeals | F_SEAL_WRITE, kLengthSeals | F_SEAL_FUTURE_WRITE}) {
    EXPECT_EQ(RefusalOfAdoption(MemfdWith(seals)), Code::kInvalidArgument) << seals;
  }
}

TEST(Arena, is_adopted_with_exactly_its_length) {
  const Arena arena = Made();
  for (const std::uint64_t bytes :
       {std::uint64_t{0}, kBytes - kHugePageBytes, kBytes + kHugePageBytes, kBytes - 1}) {
    EXPECT_EQ(RefusalOfAdoption(Duplicate(arena.fd()), bytes), Code::kInvalidArgument) << bytes;
  }
}

TEST(Arena, is_not_adopted_from_anything_but_a_memfd) {
  const TemporaryDirectory directory;
  const std::string path = directory / "file";
  UniqueFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(file.get(), static_cast<off_t>(kBytes)), 0);
  EXPECT_EQ(RefusalOfAdoption(std::move(file)), Code::kInvalidArgument);

  const std::string name = concat("/stillframe-arena-", ::getpid());
  UniqueFd posix(::shm_open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  (void)::shm_unlink(name.c_str());
  ASSERT_EQ(::ftruncate(posix.get(), static_cast<off_t>(kBytes)), 0);
  EXPECT_EQ(RefusalOfAdoption(std::move(posix)), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOfAdoption(UniqueFd()), Code::kInvalidArgument);
}

TEST(Arena, is_not_adopted_from_a_descriptor_that_cannot_write) {
  const Arena arena = Made();
  const std::string link = concat("/proc/self/fd/", arena.fd());
  UniqueFd read_only(::open(link.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(read_only);
  EXPECT_EQ(RefusalOfAdoption(std::move(read_only)), Code::kInvalidArgument);
}

TEST(Arena, has_all_pages_of_a_range_after_prefault_and_says_of_which_kind) {
  Arena arena = Made();
  const auto kind = arena.prefault(2 * kMiB, 4 * kMiB, kGoOn);
  ASSERT_TRUE(kind) << kind.error().message();
  std::cout << "pages of " << name(*kind) << '\n';
  if (*kind == PageKind::kHugetlb) return;  // Neither blocks nor smaps count those.
  EXPECT_EQ(AllocatedBytes(arena), 4 * kMiB) << "this range, nothing else";
  EXPECT_EQ(SmapsRow(arena, "Rss:"), 4 * kMiB) << "the page table is filled";
  const std::uint64_t large_bytes = SmapsRow(arena, "ShmemPmdMapped:");
  if (*kind == PageKind::kHuge) {
    EXPECT_EQ(large_bytes, 4 * kMiB);
  } else {
    EXPECT_EQ(*kind, PageKind::kSmall);
    EXPECT_LT(large_bytes, 4 * kMiB);
  }
}

TEST(Arena, has_small_pages_where_large_ones_are_forbidden_and_says_so) {
  // Containers and job managers set it; collapsing answers EINVAL then.
  ASSERT_EQ(::prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0), 0);
  Arena arena = Made();
  Fill(arena.bytes().first(kBytes / 2));
  const auto first = arena.prefault(0, kHugePageBytes, kGoOn);
  const auto kind = arena.prefault(0, kBytes, kGoOn);
  ASSERT_EQ(::prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0), 0);
  ASSERT_TRUE(first) << first.error().message();
  ASSERT_TRUE(kind) << kind.error().message();
  if (*kind == PageKind::kHugetlb) GTEST_SKIP() << "this machine has a pool of hugetlb pages";
  EXPECT_EQ(*first, PageKind::kSmall);
  EXPECT_EQ(*kind, PageKind::kSmall);
  EXPECT_EQ(AllocatedBytes(arena), kBytes);
  EXPECT_EQ(SmapsRow(arena, "Rss:"), kBytes);
  EXPECT_EQ(SmapsRow(arena, "ShmemPmdMapped:"), 0U);
  EXPECT_TRUE(IsFilled(arena.bytes().first(kBytes / 2)));
}

TEST(Arena, keeps_its_contents_when_pages_are_collapsed) {
  Arena arena = Made();
  Fill(arena.bytes());
  ASSERT_TRUE(arena.prefault(0, kBytes, kGoOn));
  EXPECT_TRUE(IsFilled(arena.bytes()));
  ASSERT_TRUE(arena.prefault(0, kBytes, kGoOn)) << "again";
  EXPECT_TRUE(IsFilled(arena.bytes()));
}

TEST(Arena, keeps_its_contents_when_the_one_who_adopts_it_collapses_pages) {
  const Arena made = Made();
  auto adopted = Arena::adopt(Duplicate(made.fd()), kBytes);
  ASSERT_TRUE(adopted);
  Fill(made.bytes());
  ASSERT_TRUE(adopted->prefault(0, kBytes, kGoOn));
  EXPECT_TRUE(IsFilled(adopted->bytes()));
  EXPECT_TRUE(IsFilled(made.bytes()));
}

TEST(Arena, stops_when_it_is_told) {
  Arena arena = Made();
  const std::atomic<bool> stop = true;
  const auto kind = arena.prefault(0, kBytes, stop);
  ASSERT_FALSE(kind);
  EXPECT_EQ(kind.error().code(), Code::kCancelled);
  EXPECT_EQ(AllocatedBytes(arena), 0U);
}

TEST(Arena, prefaults_only_what_it_has) {
  Arena arena = Made();
  EXPECT_EQ(*arena.prefault(kBytes, 0, kGoOn), PageKind::kUntouched);
  for (const auto& [offset, bytes] : {std::pair(kBytes, kHugePageBytes),
                                      {std::uint64_t{0}, kBytes + kHugePageBytes},
                                      {kHugePageBytes, ~std::uint64_t{0} - kHugePageBytes + 1},
                                      {kMiB, kHugePageBytes},
                                      {std::uint64_t{0}, kMiB},
                                      {std::uint64_t{0} - kHugePageBytes, kHugePageBytes}}) {
    const auto kind = arena.prefault(offset, bytes, kGoOn);
    ASSERT_FALSE(kind) << offset << " " << bytes;
    EXPECT_EQ(kind.error().code(), Code::kInvalidArgument);
  }
  EXPECT_FALSE(arena.populate(kBytes, 1));
  EXPECT_FALSE(arena.populate(1, ~std::uint64_t{0}));
  EXPECT_TRUE(arena.populate(kBytes, 0));
}

TEST(Arena, is_populated_by_a_client_without_a_fault_left_for_later) {
  Arena made = Made();
  const auto kind = made.prefault(0, kBytes, kGoOn);
  ASSERT_TRUE(kind);
  if (*kind == PageKind::kHugetlb) GTEST_SKIP() << "smaps does not count hugetlb pages as Rss";
  Fill(made.bytes());
  auto client = Arena::adopt(Duplicate(made.fd()), kBytes);
  ASSERT_TRUE(client);
  EXPECT_EQ(SmapsRow(*client, "Rss:"), 0U);
  ASSERT_TRUE(client->populate(2 * kMiB, 4 * kMiB));
  EXPECT_EQ(SmapsRow(*client, "Rss:"), 4 * kMiB);
  EXPECT_TRUE(IsFilled(client->bytes()));
}

TEST(Arena, is_not_mapped_in_a_forked_child) {
  const Arena arena = Made();
  Fill(arena.bytes());
  const pid_t child = ::fork();
  if (child == 0) {
    // mincore() asks about a range without touching it.
    unsigned char resident[1] = {};
    const bool is_mapped = ::mincore(arena.bytes().data(), kBlockBytes, resident) == 0;
    ::_exit(is_mapped ? 1 : (errno == ENOMEM ? 0 : 2));
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(IsFilled(arena.bytes()));
}

TEST(Arena, gives_its_address_space_back) {
  const auto mapping_count = [] {
    std::ifstream maps("/proc/self/maps");
    return std::count(std::istreambuf_iterator<char>(maps), {}, '\n');
  };
  { const Arena warm_up = Made(); }
  const auto before = mapping_count();
  for (int i = 0; i < 50; ++i) {
    const Arena arena = Made();
    const Arena moved = Made();
  }
  EXPECT_LE(mapping_count(), before + 2);
}

}  // namespace
}  // namespace stillframe::shm
