#include "shm/memory_left.h"

#include <gtest/gtest.h>

#include <fstream>

#include "shm/arena.h"
#include "tests/shm/temporary_directory.h"

namespace stillframe::shm {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// A made-up machine with 1000 MiB available.
class MemoryLeft : public testing::Test {
 protected:
  MemoryLeft() { Write("proc/meminfo", "MemTotal: 4096000 kB\nMemAvailable:  1024000 kB\n"); }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = directory_ / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  void WriteBytes(const std::string& path, std::uint64_t bytes) {
    Write(path, std::to_string(bytes) + "\n");
  }
  std::uint64_t LeftMib() const { return memory_left(files_) / kMiB; }

  const TemporaryDirectory directory_;
  const MemoryFiles files_ = {.proc = directory_ / "proc", .cgroup = directory_ / "cgroup"};
};

TEST_F(MemoryLeft, is_what_the_machine_has_without_groups) { EXPECT_EQ(LeftMib(), 1000U); }

TEST_F(MemoryLeft, is_what_a_v2_group_leaves) {
  Write("proc/self/cgroup", "0::/job/step\n");
  Write("cgroup/job/step/memory.max", "max\n");
  WriteBytes("cgroup/job/step/memory.current", 10 * kMiB);
  EXPECT_EQ(LeftMib(), 1000U) << "no limit";
  WriteBytes("cgroup/job/step/memory.max", 100 * kMiB);
  EXPECT_EQ(LeftMib(), 90U);
}

TEST_F(MemoryLeft, counts_a_groups_page_cache_as_free) {
  Write("proc/self/cgroup", "0::/job\n");
  WriteBytes("cgroup/job/memory.max", 100 * kMiB);
  WriteBytes("cgroup/job/memory.current", 95 * kMiB);
  Write("cgroup/job/memory.stat", "anon 1\ninactive_file 31457280\nactive_file 10485760\n");
  EXPECT_EQ(LeftMib(), 45U);
}

TEST_F(MemoryLeft, is_the_least_of_all_groups_above) {
  Write("proc/self/cgroup", "0::/a/b/c\n");
  for (const auto& [folder, limit_mib] :
       {std::pair("cgroup/a/b/c", 500U), {"cgroup/a/b", 60U}, {"cgroup/a", 400U}}) {
    WriteBytes(std::string(folder) + "/memory.max", limit_mib * kMiB);
    WriteBytes(std::string(folder) + "/memory.current", 10 * kMiB);
  }
  EXPECT_EQ(LeftMib(), 50U);
  WriteBytes("cgroup/memory.max", 30 * kMiB);
  WriteBytes("cgroup/memory.current", 10 * kMiB);
  EXPECT_EQ(LeftMib(), 20U) << "a container's own root has a limit";
}

TEST_F(MemoryLeft, is_what_a_v1_group_leaves) {
  Write("proc/self/cgroup", "9:cpu,cpuacct:/x\n7:memory:/job\n0::/\n");
  WriteBytes("cgroup/memory/job/memory.limit_in_bytes", 100 * kMiB);
  WriteBytes("cgroup/memory/job/memory.usage_in_bytes", 70 * kMiB);
  Write("cgroup/memory/job/memory.stat", "inactive_file 5\ntotal_inactive_file 10485760\n");
  EXPECT_EQ(LeftMib(), 40U);
  // How v1 writes "no limit".
  Write("cgroup/memory/job/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(LeftMib(), 1000U);
}

TEST_F(MemoryLeft, finds_the_containers_own_limit_when_the_path_is_the_hosts) {
  Write("proc/self/cgroup", "3:memory:/docker/0123456789\n");
  WriteBytes("cgroup/memory/memory.limit_in_bytes", 64 * kMiB);
  WriteBytes("cgroup/memory/memory.usage_in_bytes", 14 * kMiB);
  EXPECT_EQ(LeftMib(), 50U);
}

TEST_F(MemoryLeft, is_zero_in_a_group_that_is_over_its_limit) {
  Write("proc/self/cgroup", "0::/job\n");
  WriteBytes("cgroup/job/memory.max", 10 * kMiB);
  WriteBytes("cgroup/job/memory.current", 11 * kMiB);
  EXPECT_EQ(LeftMib(), 0U);
}

TEST_F(MemoryLeft, is_unlimited_where_nothing_can_be_read) {
  const MemoryFiles nowhere = {.proc = directory_ / "no", .cgroup = directory_ / "no"};
  EXPECT_EQ(memory_left(nowhere), ~std::uint64_t{0});
  EXPECT_EQ(hugetlb_pages_free(nowhere), 0U);
}

TEST_F(MemoryLeft, passes_over_lines_that_it_does_not_understand) {
  Write("proc/self/cgroup", "\n::\nnonsense\n7:memory\n0::\n:memory:\n");
  EXPECT_EQ(LeftMib(), 1000U);
}

TEST_F(MemoryLeft, counts_hugetlb_pages_that_nobody_was_promised) {
  Write("proc/meminfo", "HugePages_Free: 10\nHugePages_Rsvd: 3\nHugepagesize: 2048 kB\n");
  EXPECT_EQ(hugetlb_pages_free(files_), 7U);
  Write("proc/meminfo", "HugePages_Free: 10\nHugePages_Rsvd: 3\nHugepagesize: 1048576 kB\n");
  EXPECT_EQ(hugetlb_pages_free(files_), 0U) << "a pool of other pages";
}

TEST(ArenaBytesLimit, is_at_most_what_is_configured_and_half_of_what_is_left) {
  const std::uint64_t half = arena_bytes_limit(0);
  EXPECT_GT(half, 0U);
  EXPECT_EQ(half % kHugePageBytes, 0U);
  EXPECT_EQ(arena_bytes_limit(kHugePageBytes), kHugePageBytes);
  EXPECT_EQ(arena_bytes_limit(kHugePageBytes + 1), kHugePageBytes);
  EXPECT_LE(arena_bytes_limit(~std::uint64_t{0}), memory_left());
}

}  // namespace
}  // namespace stillframe::shm
