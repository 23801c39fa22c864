#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <string>

#include "base/unique_fd.h"
#include "tests/uring/backends.h"

// What every backend promises of files and names.
namespace stillframe::uring {
namespace {

class Files : public BackendTest {
 protected:
  void write_small(std::string_view name, std::string_view text) {
    auto file = io().open(path(name), OpenMode::kCreateBuffered);
    ASSERT_TRUE(file) << file.error().message();
    EXPECT_TRUE(io().write_all(*file, text));
    EXPECT_TRUE(io().sync(*file));
    io().close(*file);
  }
  std::string read_small(std::string_view name) {
    auto file = io().open(path(name), OpenMode::kReadBuffered);
    if (!file) return "missing";
    auto text = io().read_all(*file, 1'000);
    io().close(*file);
    return text ? *text : std::string(text.error().message());
  }
};

INSTANTIATE_TEST_SUITE_P(, Files, testing::Values(Kind::kUring, Kind::kThreads, Kind::kSimulated),
                         [](const auto& suite) { return kind_name(suite.param); });

// What only a kernel has: mappings, second names, signals, FIFOs, permissions, blocks.
class RealFiles : public Files {};

INSTANTIATE_TEST_SUITE_P(, RealFiles, testing::Values(Kind::kUring, Kind::kThreads),
                         [](const auto& suite) { return kind_name(suite.param); });

TEST_P(Files, a_small_file_holds_what_was_written) {
  write_small("manifest", "{}");
  EXPECT_EQ(read_small("manifest"), "{}");
  write_small("empty", "");
  EXPECT_EQ(read_small("empty"), "");
}

TEST_P(Files, a_file_larger_than_expected_is_not_read) {
  write_small("manifest", "0123456789");
  auto file = io().open(path("manifest"), OpenMode::kReadBuffered);
  ASSERT_TRUE(file);
  EXPECT_EQ(*io().read_all(*file, 10), "0123456789");
  const auto refused = io().read_all(*file, 9);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kDataLoss);
  io().close(*file);
}

TEST_P(Files, what_exists_is_not_created_again) {
  write_small("manifest", "{}");
  for (const OpenMode mode : {OpenMode::kCreateBuffered, OpenMode::kCreateDirect}) {
    const auto refused = io().open(path("manifest"), mode);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), Code::kInvalidArgument);
    EXPECT_EQ(refused.error().native(), EEXIST);
  }
  EXPECT_EQ(read_small("manifest"), "{}");
}

TEST_P(Files, what_is_missing_is_not_found) {
  EXPECT_EQ(io().open(path("a"), OpenMode::kReadDirect).error().code(), Code::kNotFound);
  EXPECT_EQ(io().open(path("a/b"), OpenMode::kCreateDirect).error().code(), Code::kNotFound);
  EXPECT_EQ(io().status(path("a")).error().code(), Code::kNotFound);
  EXPECT_EQ(io().unlink(path("a")).error().code(), Code::kNotFound);
  EXPECT_EQ(io().sync_directory(path("a")).error().code(), Code::kNotFound);
  EXPECT_EQ(io().list_directory(path("a")).error().code(), Code::kNotFound);
  EXPECT_EQ(io().rename(path("a"), path("b"), RenameMode::kReplace).error().code(),
            Code::kNotFound);
}

TEST_P(Files, one_file_has_one_mode) {
  const FileId direct = create("part", kBlockBytes);
  EXPECT_EQ(io().write_all(direct, "x").error().code(), Code::kInvalidArgument);
  EXPECT_EQ(io().read_all(direct, 1).error().code(), Code::kInvalidArgument);
  io().close(direct);
}

TEST_P(Files, a_closed_file_stays_closed) {
  const FileId first = create("first", kBlockBytes);
  io().close(first);
  const FileId second = create("second", 2 * kBlockBytes);
  EXPECT_EQ(io().file_status(first).error().code(), Code::kInvalidArgument);
  EXPECT_EQ(io().truncate(first, 0).error().code(), Code::kInvalidArgument);
  io().close(first);
  EXPECT_EQ(io().file_status(second)->bytes, 2 * kBlockBytes);
  io().close(second);
}

TEST_P(Files, allocate_makes_the_exact_length_from_both_sides) {
  const FileId file = create("part", 8 * kBlockBytes);
  for (const std::uint64_t bytes :
       {12 * kBlockBytes, 3 * kBlockBytes, std::size_t{0}, kBlockBytes}) {
    ASSERT_TRUE(io().allocate(file, bytes));
    EXPECT_EQ(io().file_status(file)->bytes, bytes);
  }
  io().close(file);
}

TEST_P(Files, an_allocated_file_reads_as_zeros) {
  const FileId file = create("part", 2 * kBlockBytes);
  const Mapping memory = aligned_memory(2 * kBlockBytes);
  fill_pattern(memory.bytes(), 4);
  IoRequest read;
  read.file = file;
  read.data = memory.bytes().data();
  read.bytes = memory.bytes().size();
  EXPECT_EQ(run_one(read).moved_bytes, 2 * kBlockBytes);
  EXPECT_TRUE(std::ranges::all_of(memory.bytes(), [](std::byte b) { return b == std::byte{0}; }));
  io().close(file);
}

TEST_P(Files, space_is_what_we_may_still_take) {
  const auto space = io().space(path("."));
  ASSERT_TRUE(space);
  EXPECT_GT(space->free_bytes, 0U);
  EXPECT_GE(space->total_bytes, space->free_bytes);
}

// Stands in for a full disk, which the simulated drive has (tests/simulated/drive_test.cc): filling
// the machine's own would hurt others.
TEST_P(RealFiles, what_does_not_fit_shows_at_allocate) {
  const FileId file = create("part", kBlockBytes);
  const FileSizeLimit limit(16 * kBlockBytes);
  EXPECT_TRUE(io().allocate(file, 16 * kBlockBytes));
  const auto refused = io().allocate(file, 17 * kBlockBytes);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kResourceExhausted);
  io().close(file);
}

TEST_P(Files, a_link_is_not_followed) {
  write_small("manifest", "{}");
  ASSERT_TRUE(io().make_symlink("manifest", path("latest")));
  EXPECT_EQ(io().status(path("latest"))->kind, FileKind::kSymlink);
  for (const OpenMode mode : {OpenMode::kReadBuffered, OpenMode::kReadDirect,
                              OpenMode::kWriteDirect, OpenMode::kCreateBuffered}) {
    const auto refused = io().open(path("latest"), mode);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), Code::kInvalidArgument);
  }
  EXPECT_FALSE(io().make_symlink("elsewhere", path("latest")));
}

TEST_P(Files, a_directory_is_no_file) {
  ASSERT_TRUE(io().make_directory(path("run")));
  for (const OpenMode mode : {OpenMode::kReadBuffered, OpenMode::kWriteDirect}) {
    const auto refused = io().open(path("run"), mode);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), Code::kInvalidArgument);
  }
}

TEST_P(Files, a_rename_replaces_only_when_told_to) {
  write_small("a", "first");
  write_small("b", "second");
  const auto refused = io().rename(path("a"), path("b"), RenameMode::kNoReplace);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kInvalidArgument);
  EXPECT_EQ(refused.error().native(), EEXIST);
  EXPECT_EQ(read_small("b"), "second");
  ASSERT_TRUE(io().rename(path("a"), path("b"), RenameMode::kReplace));
  EXPECT_EQ(read_small("b"), "first");
  EXPECT_EQ(read_small("a"), "missing");
  ASSERT_TRUE(io().rename(path("b"), path("c"), RenameMode::kNoReplace));
  EXPECT_EQ(read_small("c"), "first");
}

TEST_P(Files, an_exchange_gives_each_the_name_of_the_other) {
  ASSERT_TRUE(io().make_directory(path("a")));
  write_small("a/text", "first");
  EXPECT_EQ(io().rename(path("a"), path("b"), RenameMode::kExchange).error().code(),
            Code::kNotFound);
  ASSERT_TRUE(io().make_directory(path("b")));
  write_small("b/text", "second");
  ASSERT_TRUE(io().rename(path("a"), path("b"), RenameMode::kExchange));
  EXPECT_EQ(read_small("a/text"), "second");
  EXPECT_EQ(read_small("b/text"), "first");
}

TEST_P(Files, an_open_file_follows_its_rename) {
  const FileId file = create("spool", kBlockBytes);
  ASSERT_TRUE(io().make_directory(path("run")));
  ASSERT_TRUE(io().rename(path("spool"), path("run/part"), RenameMode::kNoReplace));
  ASSERT_TRUE(io().allocate(file, 2 * kBlockBytes));
  EXPECT_EQ(io().status(path("run/part"))->bytes, 2 * kBlockBytes);
  io().close(file);
}

TEST_P(Files, a_directory_is_made_listed_renamed_and_removed) {
  ASSERT_TRUE(io().make_directory(path("tmp")));
  EXPECT_EQ(io().make_directory(path("tmp")).error().native(), EEXIST);
  write_small("tmp/manifest", "{}");
  ASSERT_TRUE(io().make_directory(path("tmp/inner")));
  ASSERT_TRUE(io().make_symlink("manifest", path("tmp/link")));
  ASSERT_TRUE(io().rename(path("tmp"), path("final"), RenameMode::kNoReplace));
  ASSERT_TRUE(io().sync_directory(path("final")));

  auto entries = io().list_directory(path("final"));
  ASSERT_TRUE(entries);
  std::ranges::sort(*entries, {}, &DirectoryEntry::name);
  ASSERT_EQ(entries->size(), 3U);
  EXPECT_EQ((*entries)[0].name, "inner");
  EXPECT_EQ((*entries)[0].kind, FileKind::kDirectory);
  EXPECT_EQ((*entries)[1].name, "link");
  EXPECT_EQ((*entries)[1].kind, FileKind::kSymlink);
  EXPECT_EQ((*entries)[2].name, "manifest");
  EXPECT_EQ((*entries)[2].kind, FileKind::kRegular);

  EXPECT_FALSE(io().remove_directory(path("final")));
  EXPECT_FALSE(io().unlink(path("final")));
  for (const char* name : {"final/manifest", "final/link"}) EXPECT_TRUE(io().unlink(path(name)));
  EXPECT_TRUE(io().remove_directory(path("final/inner")));
  EXPECT_TRUE(io().remove_directory(path("final")));
  EXPECT_EQ(io().status(path("final")).error().code(), Code::kNotFound);
}

TEST_P(Files, a_spool_file_keeps_its_contents_when_it_is_opened_for_writing) {
  const FileId file = create("spool", kBlockBytes);
  io().close(file);
  auto again = io().open(path("spool"), OpenMode::kWriteDirect);
  ASSERT_TRUE(again);
  EXPECT_EQ(io().file_status(*again)->bytes, kBlockBytes);
  EXPECT_EQ(io().file_status(*again)->link_count, 1U);
  io().close(*again);
}

TEST_P(Files, nobody_opens_a_file_that_is_taken_until_it_is_closed) {
  io().close(create("spool", kBlockBytes));
  auto file = io().open(path("spool"), OpenMode::kWriteDirect);
  ASSERT_TRUE(file);
  auto taken = io().take_for_writing(*file);
  ASSERT_TRUE(taken) << taken.error().message();
  EXPECT_TRUE(*taken);
  const auto refused = io().open(path("spool"), OpenMode::kReadDirect);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kUnavailable);
  io().close(*file);
  auto reader = io().open(path("spool"), OpenMode::kReadDirect);
  ASSERT_TRUE(reader);
  io().close(*reader);
}

TEST_P(Files, a_file_that_is_open_twice_is_not_taken) {
  io().close(create("spool", kBlockBytes));
  auto reader = io().open(path("spool"), OpenMode::kReadDirect);
  auto writer = io().open(path("spool"), OpenMode::kWriteDirect);
  ASSERT_TRUE(reader && writer);
  EXPECT_FALSE(*io().take_for_writing(*writer));
  io().close(*reader);
  EXPECT_TRUE(*io().take_for_writing(*writer));
  io().close(*writer);
}

TEST_P(RealFiles, a_file_that_is_mapped_or_linked_elsewhere_is_not_taken) {
  io().close(create("spool", kBlockBytes));
  UniqueFd reader(::open(path("spool").c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(reader);
  void* const address = ::mmap(nullptr, kBlockBytes, PROT_READ, MAP_SHARED, reader.get(), 0);
  ASSERT_NE(address, MAP_FAILED);
  Mapping mapped(address, kBlockBytes);
  reader = UniqueFd();
  auto writer = io().open(path("spool"), OpenMode::kWriteDirect);
  ASSERT_TRUE(writer);
  EXPECT_FALSE(*io().take_for_writing(*writer));
  mapped = Mapping();
  ASSERT_EQ(::link(path("spool").c_str(), path("other").c_str()), 0);
  EXPECT_FALSE(*io().take_for_writing(*writer));
  ASSERT_TRUE(io().unlink(path("other")));
  EXPECT_TRUE(*io().take_for_writing(*writer));
  io().close(*writer);
}

TEST_P(RealFiles, a_reader_that_wants_a_taken_file_does_not_signal_us) {
  // SIGIO's default action would end this test here.
  ASSERT_NE(::signal(SIGIO, SIG_DFL), SIG_ERR);
  io().close(create("spool", kBlockBytes));
  auto writer = io().open(path("spool"), OpenMode::kWriteDirect);
  ASSERT_TRUE(writer);
  ASSERT_TRUE(*io().take_for_writing(*writer));
  EXPECT_EQ(::open(path("spool").c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC), -1);
  EXPECT_EQ(errno, EWOULDBLOCK);
  io().close(*writer);
}

TEST_P(RealFiles, a_fifo_is_refused_without_waiting_for_it) {
  ASSERT_EQ(::mkfifo(path("fifo").c_str(), 0600), 0);
  for (const OpenMode mode :
       {OpenMode::kReadBuffered, OpenMode::kReadDirect, OpenMode::kWriteDirect}) {
    const auto refused = io().open(path("fifo"), mode);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), Code::kInvalidArgument);
  }
  EXPECT_EQ(io().status(path("fifo"))->kind, FileKind::kOther);
}

TEST_P(RealFiles, files_and_directories_are_private) {
  io().close(create("part", kBlockBytes));
  ASSERT_TRUE(io().make_directory(path("run")));
  struct stat stat {};
  ASSERT_EQ(::stat(path("part").c_str(), &stat), 0);
  EXPECT_EQ(stat.st_mode & 0777U, 0600U);
  ASSERT_EQ(::stat(path("run").c_str(), &stat), 0);
  EXPECT_EQ(stat.st_mode & 0777U, 0700U);
}

TEST_P(RealFiles, allocated_blocks_are_there) {
  const FileId file = create("part", 64 * kBlockBytes);
  struct stat stat {};
  ASSERT_EQ(::stat(path("part").c_str(), &stat), 0);
  EXPECT_GE(static_cast<std::size_t>(stat.st_blocks) * 512, 64 * kBlockBytes);
  io().close(file);
}

TEST(CreateBackend, the_threads_backend_is_there_when_it_is_asked_for) {
  auto created = create_backend({.choice = BackendOptions::Choice::kThreads});
  ASSERT_TRUE(created);
  EXPECT_EQ(created->backend->name(), "threads");
  EXPECT_TRUE(created->fallback_reason.empty());
}

TEST(CreateBackend, a_fallback_names_its_reason) {
  auto created = create_backend({});
  ASSERT_TRUE(created);
  EXPECT_EQ(created->backend->name() == "uring", created->fallback_reason.empty());
  auto demanded = create_backend({.choice = BackendOptions::Choice::kUring});
  EXPECT_EQ(demanded.has_value(), created->backend->name() == "uring");
  if (!demanded) {
    EXPECT_EQ(demanded.error().code(), Code::kUnavailable);
    EXPECT_EQ(demanded.error().message(), created->fallback_reason);
  }
}

}  // namespace
}  // namespace stillframe::uring
