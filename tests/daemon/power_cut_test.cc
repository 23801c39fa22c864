// The save path on a drive that loses power, fails and fills up: at every operation of save and
// retention, the old checkpoint or the new one, complete, and never a third thing (P1, P2, P4).
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "base/text.h"
#include "catalog/change.h"
#include "catalog/run.h"
#include "daemon/save.h"
#include "tests/daemon/workload.h"
#include "tests/simulated/simulated_backend.h"

namespace stillframe::daemon {
namespace {

using simulated::OperationKind;
using simulated::SimulatedBackend;
using simulated::SimulatedDrive;

constexpr std::uint64_t kSaveCount = Workload::kSaveCount;
const std::string& kRunPath = Workload::kRunPath;

// All operations in the plain build; with a sanitizer every fourth, which is enough for its own
// finds.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kStride = 8;
#else
constexpr std::uint64_t kStride = 1;
#endif

TEST(PowerCut, at_every_operation_leaves_the_old_or_the_new_checkpoint) {
  constexpr std::uint64_t kCrashesPerOperation = 4;
  Workload workload;
  std::uint64_t operation = 0;
  for (bool was_cut = true; was_cut;) {
    operation += kStride;
    const auto drive = SimulatedDrive::create({.seed = operation});
    drive->cut_power_at(operation);
    workload.forget();
    std::uint64_t acknowledged = 0;
    {
      SimulatedBackend io(drive);
      acknowledged = workload.run(io);
    }
    was_cut = drive->is_power_off();
    if (!was_cut) {
      EXPECT_EQ(acknowledged, kSaveCount);
    }
    for (std::uint64_t seed = 1; seed <= kCrashesPerOperation; ++seed) {
      const auto crashed = drive->crashed_copy(operation * 1000 + seed);
      SimulatedBackend io(crashed);
      workload.judge(io,
                     concat("cut at operation ", operation, ", seed ", operation * 1000 + seed));
      if (::testing::Test::HasFailure()) return;
    }
  }
  std::printf("%lu operations, %lu crashes of each\n",
              static_cast<unsigned long>(operation / kStride),
              static_cast<unsigned long>(kCrashesPerOperation));
  EXPECT_GT(operation, 60U);
}

TEST(FailingDrive, that_fails_any_one_operation_loses_nothing_and_is_not_asked_twice) {
  Workload workload;
  for (std::uint64_t nth = 1;; nth += kStride) {
    const auto drive = SimulatedDrive::create({.seed = nth});
    drive->fail({.nth = nth, .error = EIO});
    workload.forget();
    SimulatedBackend io(drive);
    const std::uint64_t acknowledged = workload.run(io);
    EXPECT_EQ(drive->syncs_after_failed_sync(), 0U) << "operation " << nth;
    if (acknowledged == kSaveCount && drive->operation_count() < nth) break;
    drive->clear_faults();
    // Without a crash, and with one.
    workload.judge(io, concat("EIO at operation ", nth));
    drive->power_cycle();
    SimulatedBackend again(drive);
    workload.judge(again, concat("EIO at operation ", nth, ", then a power cut"));
    if (::testing::Test::HasFailure()) return;
    ASSERT_LT(nth, 2000U);
  }
}

TEST(FailingDrive, whose_fsync_fails_gives_no_checkpoint_and_recycles_nothing_of_it) {
  for (std::uint64_t nth = 1; nth <= 5; ++nth) {
    Workload workload;
    const auto drive = SimulatedDrive::create({.seed = nth});
    SimulatedBackend io(drive);
    ASSERT_TRUE(io.make_directory("/data"));
    auto run_id = catalog::create_run(io, kRunPath, std::string(32, 'a'));
    ASSERT_TRUE(run_id);
    ASSERT_TRUE(workload.save(io, *run_id, 1));
    drive->fail({.kind = OperationKind::kSync, .nth = nth, .error = EIO});
    const auto failed = workload.save(io, *run_id, 2);
    drive->clear_faults();
    if (failed) {
      EXPECT_GT(nth, 4U) << "a save has two parts, sums, state and manifest to sync";
      continue;
    }
    EXPECT_EQ(failed.error().code(), Code::kUnavailable);
    EXPECT_EQ(drive->syncs_after_failed_sync(), 0U);
    auto spool = io.list_directory(kRunPath + "/.stillframe/spool");
    ASSERT_TRUE(spool);
    EXPECT_TRUE(spool->empty());
    auto contents = catalog::read_run(io, kRunPath);
    ASSERT_TRUE(contents);
    EXPECT_EQ(contents->newest()->manifest.sequence, 1U);
    EXPECT_TRUE(workload.save(io, *run_id, 3)) << "the next save works";
  }
}

TEST(FullDisk, fails_the_save_early_gives_its_space_back_and_keeps_the_previous_checkpoint) {
  Workload workload;
  const auto drive = SimulatedDrive::create({.seed = 1});
  SimulatedBackend io(drive);
  ASSERT_TRUE(io.make_directory("/data"));
  auto run_id = catalog::create_run(io, kRunPath, std::string(32, 'a'));
  ASSERT_TRUE(run_id);
  ASSERT_TRUE(workload.save(io, *run_id, 1));
  const std::uint64_t used_bytes = io.space("/")->total_bytes - io.space("/")->free_bytes;
  const std::uint64_t needed_bytes = workload.plan().bytes + (std::uint64_t{16} << 20);
  for (std::uint64_t percent = 0; percent < 100; ++percent) {
    drive->set_capacity(used_bytes + needed_bytes * percent / 100);
    const std::uint64_t free_before = io.space("/")->free_bytes;
    auto failed = workload.save(io, *run_id, 2);
    ASSERT_FALSE(failed) << percent << " % of the room";
    EXPECT_EQ(failed.error().code(), Code::kResourceExhausted) << failed.error().message();
    EXPECT_EQ(io.space("/")->free_bytes, free_before) << "space was not given back";
    EXPECT_EQ(io.open_file_count(), 0U);
    workload.judge(io, concat("full disk, ", percent, " % of the room"));
  }
  drive->set_capacity(used_bytes + (std::uint64_t{64} << 20));
  EXPECT_TRUE(workload.save(io, *run_id, 3));
}

TEST(Capture, that_is_voided_leaves_nothing_behind) {
  Workload workload;
  const auto drive = SimulatedDrive::create({.seed = 1});
  SimulatedBackend io(drive);
  ASSERT_TRUE(io.make_directory("/data"));
  auto run_id = catalog::create_run(io, kRunPath, std::string(32, 'a'));
  ASSERT_TRUE(run_id);
  HashPool hash_pool(1);
  SnapshotStream stream(workload.plan(), [&io] { io.wake(); });
  stream.void_capture(Error(Code::kCancelled, "the trainer died"));
  SaveRequest request;
  request.run_path = kRunPath;
  request.run_id = *run_id;
  request.sequence = 1;
  const Snapshot snapshot{.plan = workload.plan(), .slot = workload.slot(), .stream = stream};
  auto failed = save(io, snapshot, request, hash_pool);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().message(), "the trainer died");
  auto entries = io.list_directory(kRunPath + "/.stillframe");
  ASSERT_TRUE(entries);
  for (const auto& entry : *entries) EXPECT_FALSE(entry.name.starts_with("tmp-")) << entry.name;
}

}  // namespace
}  // namespace stillframe::daemon
