// Power cuts at every operation of every change, on the simulated drive, whose rules are stricter
// than those of any file system (tests/simulated/drive_image.h).
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <set>

#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/change.h"
#include "catalog/run_files.h"
#include "format/names.h"
#include "tests/catalog/commit_for_test.h"
#include "tests/oracle/run_oracle.h"
#include "tests/simulated/simulated_backend.h"
#include "tests/simulated/simulated_drive.h"

namespace stillframe::catalog {
namespace {

using simulated::OperationKind;
using simulated::SimulatedBackend;
using simulated::SimulatedDrive;
using stillframe::testing::RunOracle;
using Sequences = std::set<std::uint64_t>;

constexpr char kRun[] = "/data/run";
constexpr std::uint64_t kOwnNonce = 0x2222;
constexpr std::uint64_t kCrashesPerMoment = 8;
constexpr SpoolLimits kRoomySpool{.file_count_max = 8, .bytes_max = std::uint64_t{1} << 30};
// Small enough to crash thousands of times, with blocks enough to tear.
const std::vector<std::uint64_t> kTensorBytes = {20'000, 9'000};

template <class T>
::testing::AssertionResult is_ok(const Result<T>& result) {
  if (result) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << result.error().message();
}
#define ASSERT_OK(result) ASSERT_TRUE(is_ok(result))
#define EXPECT_OK(result) EXPECT_TRUE(is_ok(result))

TestCommit test_commit(std::uint64_t sequence) {
  return {.sequence = sequence, .step = 100, .tensor_bytes = kTensorBytes};
}

std::shared_ptr<SimulatedDrive> new_drive(std::uint64_t seed) {
  auto drive = SimulatedDrive::create({.seed = seed});
  SimulatedBackend io(drive);
  check(io.make_directory("/data").has_value() && io.sync_directory("/").has_value(),
        "a fresh drive takes a directory");
  return drive;
}

// Recovers and checks what holds whatever was cut: no checkpoint is damaged, each verifies to the
// last byte, those are there that `oracle` (which knows them by their sequences, since all have one
// step) allows, recovery has nothing left for a second time. Returns the sequences that are there.
Sequences recover_and_judge(const std::shared_ptr<SimulatedDrive>& drive, const RunOracle& oracle,
                            Mapping& staging) {
  SimulatedBackend io(drive);
  Sequences sequences;
  std::vector<std::int64_t> restorable;
  EXPECT_OK(recover(io, kRun, kOwnNonce));
  auto contents = read_run(io, kRun);
  EXPECT_OK(contents);
  if (!contents) return sequences;
  for (const DamagedCheckpoint& damaged : contents->damaged) {
    ADD_FAILURE() << damaged.path << ": " << damaged.reason.message();
  }
  EXPECT_TRUE(contents->damaged_tags.empty());
  for (const Checkpoint& checkpoint : contents->checkpoints) {
    sequences.insert(checkpoint.manifest.sequence);
    auto damage = verify_checkpoint(io, checkpoint, staging.bytes());
    EXPECT_OK(damage);
    if (damage && !damage->empty()) {
      ADD_FAILURE() << checkpoint.path << ": " << damage->front();
    } else {
      restorable.push_back(static_cast<std::int64_t>(checkpoint.manifest.sequence));
    }
  }
  for (const std::string& complaint : oracle.judge(restorable, RunOracle::Retention::kMayLag)) {
    ADD_FAILURE() << complaint;
  }
  auto again = recover(io, kRun, kOwnNonce);
  EXPECT_OK(again);
  if (again) {
    EXPECT_TRUE(again->removed_temporaries.empty());
    EXPECT_TRUE(again->finished_victims.empty());
  }
  return sequences;
}

class PowerCut : public ::testing::TestWithParam<std::uint64_t> {
 protected:
  using Change = std::function<Status(SimulatedBackend& io, RunOracle& oracle)>;
  using Judge = std::function<void(const std::shared_ptr<SimulatedDrive>& drive,
                                   const RunOracle& oracle, bool is_done)>;

  void SetUp() override {
    std::printf("seed %llu\n", static_cast<unsigned long long>(GetParam()));
    auto staging = allocate_aligned(kReadBlockBytes);
    ASSERT_OK(staging);
    staging_ = *std::move(staging);
  }

  // Prepares a drive, cuts the power at each operation of `change`, and each time judges several
  // drives that this may leave, until the change meets no cut any more.
  void cut_everywhere(const Change& prepare, const Change& change, const Judge& judge) {
    for (std::uint64_t cut = 0;; ++cut) {
      auto drive = new_drive(GetParam() + 1000 * cut);
      RunOracle oracle(0);  // Nothing goes but what is removed.
      bool is_done = false;
      {
        SimulatedBackend io(drive);
        ASSERT_OK(prepare(io, oracle));
        drive->cut_power_at(drive->operation_count() + cut);
        is_done = change(io, oracle).has_value();
      }
      const bool was_cut = drive->is_power_off();
      for (std::uint64_t crash = 0; crash < kCrashesPerMoment; ++crash) {
        SCOPED_TRACE(
            concat("cut after operation ", cut, ", crash ", crash, is_done ? ", done" : ""));
        judge(drive->crashed_copy(GetParam() * 31 + crash), oracle, is_done);
        if (HasFailure()) {
          std::printf("%s", drive->trace_text().c_str());
          return;
        }
      }
      if (!was_cut) {
        ASSERT_TRUE(is_done);
        ASSERT_GT(cut, 3u);
        return;
      }
    }
  }

  Mapping staging_;
};
INSTANTIATE_TEST_SUITE_P(Seeds, PowerCut, ::testing::Values(1, 2, 3));

Status commit(SimulatedBackend& io, RunOracle& oracle, std::uint64_t sequence) {
  oracle.began(static_cast<std::int64_t>(sequence));
  auto committed = commit_for_test(io, kRun, test_commit(sequence));
  if (!committed) return std::move(committed).error();
  oracle.acknowledged(static_cast<std::int64_t>(sequence));
  return ok();
}

Status prepare_three(SimulatedBackend& io, RunOracle& oracle) {
  auto created = create_run(io, kRun, kTestRunId);
  if (!created) return std::move(created).error();
  for (std::uint64_t sequence = 1; sequence <= 3; ++sequence) {
    auto committed = commit(io, oracle, sequence);
    if (!committed) return committed;
  }
  return ok();
}

std::string path_of(std::uint64_t sequence) {
  return concat(kRun, '/', format::checkpoint_directory_name({.sequence = sequence, .step = 100}));
}

Status remove(SimulatedBackend& io, RunOracle& oracle, std::uint64_t sequence) {
  oracle.removing(static_cast<std::int64_t>(sequence));
  auto retired = retire(io, kRun, path_of(sequence), kRoomySpool);
  if (retired) oracle.removed(static_cast<std::int64_t>(sequence));
  return retired;
}

TEST_P(PowerCut, in_retire_leaves_the_victim_complete_or_invisible) {
  cut_everywhere(
      prepare_three, [](SimulatedBackend& io, RunOracle& oracle) { return remove(io, oracle, 1); },
      [this](const std::shared_ptr<SimulatedDrive>& drive, const RunOracle& oracle, bool) {
        (void)recover_and_judge(drive, oracle, staging_);
      });
}

TEST_P(PowerCut, in_retire_of_the_newest_never_gives_its_sequence_back) {
  cut_everywhere(
      prepare_three, [](SimulatedBackend& io, RunOracle& oracle) { return remove(io, oracle, 3); },
      [this](const std::shared_ptr<SimulatedDrive>& drive, const RunOracle& oracle, bool) {
        (void)recover_and_judge(drive, oracle, staging_);
        SimulatedBackend io(drive);
        auto contents = read_run(io, kRun);
        ASSERT_OK(contents);
        EXPECT_EQ(contents->next_sequence, 4u);
      });
}

// DUR-6, M11: the next checkpoint is written over the retired one's blocks. At no moment may a
// manifest stand over bytes that are not its own; recover_and_judge() reads them all.
TEST_P(PowerCut, in_a_commit_over_recycled_parts_never_harms_an_older_checkpoint) {
  cut_everywhere(
      prepare_three,
      [](SimulatedBackend& io, RunOracle& oracle) -> Status {
        auto retired = remove(io, oracle, 1);
        if (!retired) return retired;
        return commit(io, oracle, 4);
      },
      [this](const std::shared_ptr<SimulatedDrive>& drive, const RunOracle& oracle, bool) {
        const Sequences left = recover_and_judge(drive, oracle, staging_);
        EXPECT_FALSE(left.contains(1) && left.contains(4));
      });
}

TEST_P(PowerCut, in_recover_is_finished_by_the_next_recover) {
  const auto prepare = [](SimulatedBackend& io, RunOracle& oracle) -> Status {
    auto done = prepare_three(io, oracle);
    // Killed in the midst of C13, and in the midst of a save, and before a tag's rename.
    oracle.removing(1);
    if (done) {
      done = io.rename(path_of(1) + "/manifest.json", path_of(1) + "/manifest.json.dead",
                       uring::RenameMode::kReplace);
    }
    const std::string temporary = concat(kRun, "/.stillframe/tmp-00000004-0000000000001111");
    if (done) done = io.make_directory(temporary);
    if (done) done = write_small_file(io, temporary + "/part0.safetensors", "half");
    if (done) done = io.sync_directory(temporary);
    if (done) done = io.sync_directory(concat(kRun, "/.stillframe"));
    if (done) done = write_small_file(io, concat(kRun, "/.stillframe/tags/paper~"), "1");
    return done;
  };
  cut_everywhere(
      prepare,
      [](SimulatedBackend& io, RunOracle& oracle) -> Status {
        auto recovered = recover(io, kRun, kOwnNonce);
        if (!recovered) return std::move(recovered).error();
        EXPECT_EQ(recovered->removed_temporaries.size(), 1u);
        EXPECT_EQ(recovered->finished_victims.size(), 1u);
        oracle.removed(1);
        return ok();
      },
      [this](const std::shared_ptr<SimulatedDrive>& drive, const RunOracle& oracle, bool) {
        (void)recover_and_judge(drive, oracle, staging_);
        SimulatedBackend io(drive);
        EXPECT_FALSE(io.status(concat(kRun, "/.stillframe/tmp-00000004-0000000000001111")));
        EXPECT_FALSE(io.status(concat(kRun, "/.stillframe/tags/paper~")));
      });
}

TEST_P(PowerCut, in_set_tag_leaves_the_old_tag_or_the_new) {
  cut_everywhere(
      [](SimulatedBackend& io, RunOracle& oracle) {
        auto done = prepare_three(io, oracle);
        if (done) done = set_tag(io, kRun, "paper", 1);
        return done;
      },
      [](SimulatedBackend& io, RunOracle&) { return set_tag(io, kRun, "paper", 2); },
      [this](const std::shared_ptr<SimulatedDrive>& drive, const RunOracle& oracle, bool is_done) {
        (void)recover_and_judge(drive, oracle, staging_);
        SimulatedBackend io(drive);
        auto contents = read_run(io, kRun);
        ASSERT_OK(contents);
        auto found = select(*contents, {.kind = format::Selector::Kind::kTag, .tag = "paper"});
        ASSERT_OK(found);
        EXPECT_TRUE((*found)->manifest.sequence == 2 ||
                    (!is_done && (*found)->manifest.sequence == 1));
      });
}

TEST_P(PowerCut, in_create_run_leaves_what_the_next_can_finish) {
  const std::string other_id = "ffffffffffffffffffffffffffffffff";
  cut_everywhere(
      [](SimulatedBackend&, RunOracle&) { return ok(); },
      [](SimulatedBackend& io, RunOracle&) -> Status {
        auto created = create_run(io, "/data/a/run", kTestRunId);
        if (!created) return std::move(created).error();
        return ok();
      },
      [&other_id](const std::shared_ptr<SimulatedDrive>& drive, const RunOracle&, bool is_done) {
        SimulatedBackend io(drive);
        auto seen = read_run(io, "/data/a/run");
        ASSERT_OK(seen);
        if (is_done) {
          EXPECT_EQ(seen->run_id, kTestRunId);
        }
        auto created = create_run(io, "/data/a/run", other_id);
        ASSERT_OK(created);
        if (!seen->run_id.empty()) {
          EXPECT_EQ(*created, seen->run_id);
        }
        drive->power_cycle();
        SimulatedBackend again(drive);
        auto contents = read_run(again, "/data/a/run");
        ASSERT_OK(contents);
        EXPECT_EQ(contents->run_id, *created);
        ASSERT_OK(recover(again, "/data/a/run", kOwnNonce));
        auto left = again.list_directory("/data/a/run/.stillframe");
        ASSERT_OK(left);
        for (const auto& entry : *left) {
          EXPECT_EQ(entry.name.find(kUnfinishedMark), std::string::npos) << entry.name;
        }
      });
}

// DUR-6 as a rule on the order itself, without waiting for an unlucky crash.
TEST_P(PowerCut, no_part_moves_before_its_directory_was_synced_with_the_dead_manifest) {
  auto drive = new_drive(GetParam());
  SimulatedBackend io(drive);
  RunOracle oracle(0);
  ASSERT_OK(prepare_three(io, oracle));
  drive->clear_trace();
  ASSERT_OK(retire(io, kRun, path_of(1), kRoomySpool));
  enum class Stage { kStanding, kBuried, kSynced };
  Stage stage = Stage::kStanding;
  for (const simulated::TraceEntry& entry : drive->trace()) {
    if (!simulated::is_mutating(entry.kind)) continue;
    if (entry.kind == OperationKind::kRename && entry.target.ends_with(".dead")) {
      stage = Stage::kBuried;
    } else if (entry.kind == OperationKind::kSyncDirectory && stage == Stage::kBuried) {
      stage = Stage::kSynced;
    } else {
      EXPECT_EQ(stage, Stage::kSynced) << entry.text();
    }
  }
}

// Every mutating operation fails once, and the process lives on: an error is said, nothing is
// harmed, and no fsync is tried again (DUR-2).
TEST_P(PowerCut, a_failing_operation_of_retire_is_an_error_and_recovery_finishes_it) {
  for (std::uint64_t nth = 1;; ++nth) {
    SCOPED_TRACE(concat("operation ", nth, " fails"));
    auto drive = new_drive(GetParam());
    RunOracle oracle(0);
    bool is_done = false;
    {
      SimulatedBackend io(drive);
      ASSERT_OK(prepare_three(io, oracle));
      simulated::Fault fault;
      fault.nth = nth;
      drive->fail(fault);
      is_done = remove(io, oracle, 3).has_value();
      drive->clear_faults();
    }
    EXPECT_EQ(drive->syncs_after_failed_sync(), 0u);
    {
      SimulatedBackend io(drive);
      auto contents = read_run(io, kRun);
      ASSERT_OK(contents);
      EXPECT_TRUE(contents->damaged.empty());
      EXPECT_EQ(contents->next_sequence, 4u);
    }
    const Sequences before = recover_and_judge(drive, oracle, staging_);
    drive->power_cycle();
    const Sequences after = recover_and_judge(drive, oracle, staging_);
    EXPECT_EQ(before, after);
    if (HasFailure()) return;
    if (is_done) {
      EXPECT_GT(nth, 8u);
      return;
    }
  }
}

TEST_P(PowerCut, a_spool_file_that_is_open_elsewhere_is_not_taken) {
  auto drive = new_drive(GetParam());
  SimulatedBackend io(drive);
  RunOracle oracle(0);
  ASSERT_OK(prepare_three(io, oracle));
  ASSERT_OK(retire(io, kRun, path_of(1), kRoomySpool));
  auto files = io.list_directory(concat(kRun, "/.stillframe/spool"));
  ASSERT_OK(files);
  ASSERT_EQ(files->size(), 2u);
  for (const auto& file : *files) {
    drive->set_open_elsewhere(concat(kRun, "/.stillframe/spool/", file.name), true);
  }
  auto taken = take_from_spool(io, kRun, 4096, "/data/taken");
  ASSERT_OK(taken);
  EXPECT_FALSE(taken->has_value());
  files = io.list_directory(concat(kRun, "/.stillframe/spool"));
  ASSERT_OK(files);
  EXPECT_TRUE(files->empty());
}

TEST_P(PowerCut, verify_finds_rot_on_the_simulated_drive) {
  auto drive = new_drive(GetParam());
  SimulatedBackend io(drive);
  RunOracle oracle(0);
  ASSERT_OK(prepare_three(io, oracle));
  auto contents = read_run(io, kRun);
  ASSERT_OK(contents);
  simulated::SeededRng rng(GetParam());
  for (int i = 0; i < 20; ++i) {
    const Checkpoint& checkpoint = contents->checkpoints[rng.below(3)];
    const auto& part = checkpoint.manifest.parts[rng.below(2)];
    const std::string path = concat(checkpoint.path, '/', part.file);
    const std::uint64_t bit = rng.below(8 * part.bytes);
    drive->flip_bit(path, bit);
    auto damage = verify_checkpoint(io, checkpoint, staging_.bytes());
    ASSERT_OK(damage);
    EXPECT_EQ(damage->size(), 1u) << path << " bit " << bit;
    drive->flip_bit(path, bit);
  }
}

}  // namespace
}  // namespace stillframe::catalog
