#include <gtest/gtest.h>

#include <cerrno>
#include <functional>
#include <iostream>
#include <set>
#include <string>

#include "base/mapping.h"
#include "base/text.h"
#include "tests/simulated/simulated_backend.h"

// The drive's own promises: each thing that a power cut may do happens for some seed, and what it
// may not do for none.
namespace stillframe::simulated {
namespace {

using uring::FileId;
using uring::IoRequest;
using uring::OpenMode;
using uring::RenameMode;

constexpr std::uint64_t kSeedCount = 300;
constexpr std::size_t kPartBytes = 4 * kBlockBytes;
alignas(kBlockBytes) std::byte memory[kPartBytes];

// Runs `before` on a drive, cuts its power, and collects what `after` sees in many crashes of that
// one moment.
std::set<std::string> outcomes(const std::function<void(SimulatedBackend&)>& before,
                               const std::function<std::string(SimulatedBackend&)>& after) {
  auto drive = SimulatedDrive::create({.seed = 1});
  SimulatedBackend io(drive);
  before(io);
  drive->cut_power();
  std::set<std::string> seen;
  for (std::uint64_t seed = 0; seed < kSeedCount; ++seed) {
    SimulatedBackend left(drive->crashed_copy(seed));
    seen.insert(after(left));
  }
  return seen;
}

void make_small(SimulatedBackend& io, const std::string& path, std::string_view text) {
  auto file = io.open(path, OpenMode::kCreateBuffered);
  ASSERT_TRUE(file);
  ASSERT_TRUE(io.write_all(*file, text));
  ASSERT_TRUE(io.sync(*file));
  io.close(*file);
}

std::string read_small(SimulatedBackend& io, const std::string& path) {
  auto file = io.open(path, OpenMode::kReadBuffered);
  if (!file) return "-";
  auto text = io.read_all(*file, 1'000'000);
  io.close(*file);
  return text ? *text : "unreadable";
}

// Every block's first byte as a letter.
std::string letters(SimulatedBackend& io, const std::string& path) {
  const std::string text = read_small(io, path);
  std::string found;
  for (std::size_t i = 0; i < text.size(); i += kBlockBytes) {
    found += text[i] == '\0' ? '0' : text[i];
  }
  return found;
}

void write_part(SimulatedBackend& io, FileId file, char letter) {
  std::fill(std::begin(memory), std::end(memory), static_cast<std::byte>(letter));
  IoRequest request;
  request.kind = IoRequest::Kind::kWrite;
  request.file = file;
  request.data = memory;
  request.bytes = kPartBytes;
  ASSERT_TRUE(io.submit(request));
  ASSERT_EQ(io.wait(-1).size(), 1U);
  ASSERT_FALSE(request.error);
}

FileId make_part(SimulatedBackend& io, const std::string& path) {
  auto file = io.open(path, OpenMode::kCreateDirect);
  EXPECT_TRUE(file);
  EXPECT_TRUE(io.allocate(*file, kPartBytes));
  return *file;
}

using Seen = std::set<std::string>;

TEST(SimulatedDrive, a_file_that_was_synced_with_its_directory_stays) {
  EXPECT_EQ(outcomes(
                [](SimulatedBackend& io) {
                  make_small(io, "a", "text");
                  ASSERT_TRUE(io.sync_directory("/"));
                },
                [](SimulatedBackend& io) { return read_small(io, "a"); }),
            (Seen{"text"}));
}

TEST(SimulatedDrive, a_synced_file_in_an_unsynced_directory_may_vanish) {
  EXPECT_EQ(outcomes([](SimulatedBackend& io) { make_small(io, "a", "text"); },
                     [](SimulatedBackend& io) { return read_small(io, "a"); }),
            (Seen{"-", "text"}));
}

TEST(SimulatedDrive, an_unsynced_write_survives_in_any_subset_of_blocks) {
  const Seen seen = outcomes(
      [](SimulatedBackend& io) {
        const FileId file = make_part(io, "a");
        write_part(io, file, 'o');
        ASSERT_TRUE(io.sync(file));
        ASSERT_TRUE(io.sync_directory("/"));
        write_part(io, file, 'n');
      },
      [](SimulatedBackend& io) { return letters(io, "a"); });
  EXPECT_EQ(seen.size(), 16U);  // 2^4 subsets.
  for (const std::string& blocks : seen) {
    EXPECT_EQ(blocks.find_first_not_of("on"), std::string::npos) << blocks;
  }
}

TEST(SimulatedDrive, a_block_may_be_torn_at_a_sector) {
  const Seen seen = outcomes(
      [](SimulatedBackend& io) {
        const FileId file = make_part(io, "a");
        write_part(io, file, 'o');
        ASSERT_TRUE(io.sync(file));
        ASSERT_TRUE(io.sync_directory("/"));
        write_part(io, file, 'n');
      },
      [](SimulatedBackend& io) {
        const std::string text = read_small(io, "a");
        for (std::size_t block = 0; block < text.size(); block += kBlockBytes) {
          const std::string_view bytes(text.data() + block, kBlockBytes);
          if (bytes.find('o') != bytes.npos && bytes.find('n') != bytes.npos) return "torn";
        }
        return "whole";
      });
  EXPECT_EQ(seen, (Seen{"torn", "whole"}));
}

TEST(SimulatedDrive, a_synced_write_survives_whole) {
  EXPECT_EQ(outcomes(
                [](SimulatedBackend& io) {
                  const FileId file = make_part(io, "a");
                  write_part(io, file, 'x');
                  ASSERT_TRUE(io.sync(file));
                  ASSERT_TRUE(io.sync_directory("/"));
                },
                [](SimulatedBackend& io) { return letters(io, "a"); }),
            (Seen{"xxxx"}));
}

TEST(SimulatedDrive, an_unsynced_length_is_the_old_or_the_new_one) {
  EXPECT_EQ(outcomes(
                [](SimulatedBackend& io) {
                  const FileId file = make_part(io, "a");
                  write_part(io, file, 'x');
                  ASSERT_TRUE(io.sync(file));
                  ASSERT_TRUE(io.sync_directory("/"));
                  ASSERT_TRUE(io.truncate(file, 2 * kBlockBytes));
                },
                [](SimulatedBackend& io) { return letters(io, "a"); }),
            (Seen{"xx", "xxxx"}));
}

TEST(SimulatedDrive, a_failed_fsync_loses_what_the_next_one_claims_to_store) {
  const Seen seen = outcomes(
      [](SimulatedBackend& io) {
        const FileId file = make_part(io, "a");
        write_part(io, file, 'o');
        ASSERT_TRUE(io.sync(file));
        ASSERT_TRUE(io.sync_directory("/"));
        write_part(io, file, 'n');
      },
      [](SimulatedBackend& io) { return letters(io, "a"); });
  EXPECT_TRUE(seen.contains("oooo"));

  std::set<std::string> after_retry;
  for (std::uint64_t seed = 0; seed < kSeedCount; ++seed) {
    auto drive = SimulatedDrive::create({.seed = seed});
    SimulatedBackend io(drive);
    const FileId file = make_part(io, "a");
    ASSERT_TRUE(io.sync(file));
    ASSERT_TRUE(io.sync_directory("/"));
    write_part(io, file, 'n');
    drive->fail({.kind = OperationKind::kSync, .error = EIO});
    const auto failed = io.sync(file);
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().code(), Code::kUnavailable);
    EXPECT_EQ(drive->syncs_after_failed_sync(), 0U);
    EXPECT_TRUE(io.sync(file));
    EXPECT_EQ(drive->syncs_after_failed_sync(), 1U);
    drive->power_cycle();
    SimulatedBackend left(drive);
    after_retry.insert(letters(left, "a"));
  }
  EXPECT_GT(after_retry.size(), 8U);
  EXPECT_TRUE(after_retry.contains("0000"));
}

TEST(SimulatedDrive, a_rename_inside_one_directory_leaves_one_name) {
  const auto before = [](SimulatedBackend& io) {
    make_small(io, "old", "text");
    ASSERT_TRUE(io.sync_directory("/"));
    ASSERT_TRUE(io.rename("old", "new", RenameMode::kNoReplace));
  };
  const auto after = [](SimulatedBackend& io) {
    return read_small(io, "old") + " " + read_small(io, "new");
  };
  EXPECT_EQ(outcomes(before, after), (Seen{"text -", "- text"}));
  EXPECT_EQ(outcomes(
                [&](SimulatedBackend& io) {
                  before(io);
                  ASSERT_TRUE(io.sync_directory("/"));
                },
                after),
            (Seen{"- text"}));
}

TEST(SimulatedDrive, a_rename_that_replaces_leaves_the_old_or_the_new_contents) {
  EXPECT_EQ(
      outcomes(
          [](SimulatedBackend& io) {
            make_small(io, "tag", "1");
            make_small(io, "tag.new", "2");
            ASSERT_TRUE(io.sync_directory("/"));
            ASSERT_TRUE(io.rename("tag.new", "tag", RenameMode::kReplace));
          },
          [](SimulatedBackend& io) { return read_small(io, "tag") + read_small(io, "tag.new"); }),
      (Seen{"12", "2-"}));
}

TEST(SimulatedDrive, a_rename_across_directories_may_be_half_there_and_is_never_gone) {
  const auto before = [](SimulatedBackend& io) {
    ASSERT_TRUE(io.make_directory("a"));
    ASSERT_TRUE(io.make_directory("b"));
    ASSERT_TRUE(io.sync_directory("/"));
    make_small(io, "a/x", "text");
    ASSERT_TRUE(io.sync_directory("a"));
    ASSERT_TRUE(io.rename("a/x", "b/y", RenameMode::kNoReplace));
  };
  const auto after = [](SimulatedBackend& io) {
    auto status = io.status("b/y");
    return read_small(io, "a/x") + " " + read_small(io, "b/y") +
           (status ? concat(" ", status->link_count) : "");
  };
  EXPECT_EQ(outcomes(before, after), (Seen{"text -", "- text 1", "text text 2"}));
  // The target's side alone makes the new name durable; the old one may stay too.
  EXPECT_EQ(outcomes(
                [&](SimulatedBackend& io) {
                  before(io);
                  ASSERT_TRUE(io.sync_directory("b"));
                },
                after),
            (Seen{"- text 1", "text text 2"}));
  // The wrong order: only the removal is durable.
  EXPECT_EQ(outcomes(
                [&](SimulatedBackend& io) {
                  before(io);
                  ASSERT_TRUE(io.sync_directory("a"));
                },
                after),
            (Seen{"- -", "- text 1"}));
}

TEST(SimulatedDrive, a_renamed_directory_has_one_name_and_its_own_entries) {
  EXPECT_EQ(outcomes(
                [](SimulatedBackend& io) {
                  ASSERT_TRUE(io.make_directory("private"));
                  ASSERT_TRUE(io.make_directory("private/tmp"));
                  ASSERT_TRUE(io.sync_directory("/"));
                  ASSERT_TRUE(io.sync_directory("private"));
                  make_small(io, "private/tmp/m", "text");
                  ASSERT_TRUE(io.rename("private/tmp", "final", RenameMode::kNoReplace));
                },
                [](SimulatedBackend& io) {
                  return concat(io.status("private/tmp").has_value() ? "tmp" : "-", " ",
                                io.status("final").has_value() ? "final" : "-", " ",
                                read_small(io, "final/m"));
                }),
            (Seen{"tmp - -", "- final -", "- final text"}));
}

TEST(SimulatedDrive, an_exchange_of_directories_never_leaves_the_durable_name_empty) {
  EXPECT_EQ(outcomes(
                [](SimulatedBackend& io) {
                  for (const char* name : {"old", "new"}) {
                    ASSERT_TRUE(io.make_directory(name));
                    make_small(io, concat(name, "/text"), name);
                    ASSERT_TRUE(io.sync_directory(name));
                    if (std::string_view(name) != "old") continue;
                    ASSERT_TRUE(io.sync_directory("/"));
                  }
                  ASSERT_TRUE(io.rename("new", "old", RenameMode::kExchange));
                },
                [](SimulatedBackend& io) { return read_small(io, "old/text"); }),
            (Seen{"old", "new"}));
}

TEST(SimulatedDrive, an_unsynced_unlink_may_be_undone) {
  EXPECT_EQ(outcomes(
                [](SimulatedBackend& io) {
                  make_small(io, "a", "text");
                  ASSERT_TRUE(io.sync_directory("/"));
                  ASSERT_TRUE(io.unlink("a"));
                },
                [](SimulatedBackend& io) { return read_small(io, "a"); }),
            (Seen{"-", "text"}));
}

TEST(SimulatedDrive, power_goes_after_the_chosen_operation_and_stays_away) {
  auto drive = SimulatedDrive::create({.seed = 1});
  SimulatedBackend io(drive);
  drive->cut_power_at(2);
  EXPECT_TRUE(io.make_directory("a"));
  EXPECT_TRUE(io.make_directory("b"));
  EXPECT_EQ(drive->operation_count(), 2U);
  const auto refused = io.make_directory("c");
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kUnavailable);
  EXPECT_TRUE(drive->is_power_off());
  EXPECT_EQ(io.status("a").error().code(), Code::kUnavailable);
  EXPECT_EQ(drive->operation_count(), 2U);

  drive->power_cycle();
  EXPECT_EQ(io.status("/").error().code(), Code::kUnavailable);
  SimulatedBackend fresh(drive);
  EXPECT_TRUE(fresh.status("/"));
}

TEST(SimulatedDrive, a_write_in_flight_at_the_cut_is_refused_and_may_be_there) {
  Seen seen;
  for (std::uint64_t seed = 0; seed < kSeedCount; ++seed) {
    auto drive = SimulatedDrive::create({.seed = seed, .short_transfers = false});
    SimulatedBackend io(drive);
    const FileId file = make_part(io, "a");
    ASSERT_TRUE(io.sync(file));
    ASSERT_TRUE(io.sync_directory("/"));
    std::fill(std::begin(memory), std::end(memory), std::byte{'n'});
    IoRequest request;
    request.kind = IoRequest::Kind::kWrite;
    request.file = file;
    request.data = memory;
    request.bytes = kPartBytes;
    ASSERT_TRUE(io.submit(request));
    drive->cut_power();
    ASSERT_EQ(io.wait(-1).size(), 1U);
    ASSERT_TRUE(request.error);
    EXPECT_EQ(request.error->code(), Code::kUnavailable);
    EXPECT_FALSE(io.submit(request));
    drive->power_cycle();
    SimulatedBackend left(drive);
    seen.insert(letters(left, "a"));
  }
  EXPECT_EQ(seen.size(), 16U);
}

TEST(SimulatedDrive, a_fault_hits_the_chosen_operation_once_or_for_ever) {
  auto drive = SimulatedDrive::create({.seed = 1});
  SimulatedBackend io(drive);
  drive->fail({.kind = OperationKind::kMakeDirectory, .nth = 2, .error = ENOSPC});
  EXPECT_TRUE(io.make_directory("a"));
  EXPECT_EQ(io.make_directory("b").error().native(), ENOSPC);
  EXPECT_TRUE(io.make_directory("b"));
  drive->fail({.nth = 1, .error = EROFS, .for_ever = true, .path_contains = "c"});
  EXPECT_TRUE(io.make_directory("d"));
  EXPECT_EQ(io.make_directory("c").error().native(), EROFS);
  EXPECT_EQ(io.make_symlink("a", "c").error().native(), EROFS);
  drive->clear_faults();
  EXPECT_TRUE(io.make_directory("c"));
}

TEST(SimulatedDrive, a_full_drive_refuses_and_removed_files_give_their_room_back) {
  auto drive = SimulatedDrive::create({.seed = 1, .capacity_bytes = 2 * kPartBytes});
  SimulatedBackend io(drive);
  io.close(make_part(io, "a"));
  const FileId open = make_part(io, "b");
  auto file = io.open("c", OpenMode::kCreateDirect);
  ASSERT_TRUE(file);
  EXPECT_EQ(io.space("/")->free_bytes, 0U);
  EXPECT_EQ(io.allocate(*file, kPartBytes).error().code(), Code::kResourceExhausted);
  ASSERT_TRUE(io.unlink("b"));
  EXPECT_EQ(io.space("/")->free_bytes, 0U);
  io.close(open);
  EXPECT_EQ(io.space("/")->free_bytes, kPartBytes);
  EXPECT_TRUE(io.allocate(*file, kPartBytes));
}

TEST(SimulatedDrive, a_flipped_bit_stays_flipped) {
  auto drive = SimulatedDrive::create({.seed = 1});
  SimulatedBackend io(drive);
  make_small(io, "a", "a");
  ASSERT_TRUE(io.sync_directory("/"));
  drive->flip_bit("a", 1);
  EXPECT_EQ(read_small(io, "a"), "c");
  drive->power_cycle();
  SimulatedBackend left(drive);
  EXPECT_EQ(read_small(left, "a"), "c");
}

TEST(SimulatedDrive, a_file_open_elsewhere_is_not_taken) {
  auto drive = SimulatedDrive::create({.seed = 1});
  SimulatedBackend io(drive);
  const FileId file = make_part(io, "a");
  drive->set_open_elsewhere("a", true);
  EXPECT_FALSE(*io.take_for_writing(file));
  drive->set_open_elsewhere("a", false);
  EXPECT_TRUE(*io.take_for_writing(file));
}

TEST(SimulatedDrive, equal_seeds_give_equal_traces) {
  const auto run = [](std::uint64_t seed) {
    auto drive = SimulatedDrive::create({.seed = seed});
    SimulatedBackend io(drive);
    auto file = io.open("a", OpenMode::kCreateDirect);
    EXPECT_TRUE(io.allocate(*file, 16 * kPartBytes));
    std::vector<IoRequest> requests(16);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      requests[i].kind = IoRequest::Kind::kWrite;
      requests[i].file = *file;
      requests[i].data = memory;
      requests[i].bytes = kPartBytes;
      requests[i].offset = i * kPartBytes;
      EXPECT_TRUE(io.submit(requests[i]));
    }
    while (io.in_flight() > 0) (void)io.wait(-1);
    return drive->trace_text();
  };
  EXPECT_EQ(run(7), run(7));
  EXPECT_NE(run(7), run(8));
}

}  // namespace
}  // namespace stillframe::simulated
