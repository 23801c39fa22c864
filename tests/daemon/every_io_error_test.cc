// F4, F5: the n-th operation on the drive fails, for every n of a save, of recovery and of reading
// back, once and for ever, with every error that a drive gives. Each time: a clean failure or none,
// the previous checkpoint as it was, nothing left open, nothing left lying about.
#include <gtest/gtest.h>

#include <cerrno>
#include <memory>
#include <optional>
#include <ostream>
#include <string>

#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/change.h"
#include "catalog/run.h"
#include "tests/daemon/workload.h"
#include "tests/simulated/simulated_backend.h"

namespace stillframe::daemon {
namespace {

using simulated::OperationKind;
using simulated::SimulatedBackend;
using simulated::SimulatedDrive;

constexpr std::uint64_t kOperationCountMax = 2000;  // Reaching it means that a loop never ends.

// With a sanitizer every fifth operation has to do.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kStride = 5;
#else
constexpr std::uint64_t kStride = 1;
#endif

struct Trouble {
  const char* name;
  int error;
  bool for_ever;
};
void PrintTo(const Trouble& trouble, std::ostream* out) { *out << trouble.name; }

class EveryIoError : public ::testing::TestWithParam<Trouble> {
 protected:
  static simulated::Fault fault(std::uint64_t nth, std::optional<OperationKind> kind = {}) {
    return {.kind = kind, .nth = nth, .error = GetParam().error, .for_ever = GetParam().for_ever};
  }
  static std::string where(std::string_view doing, std::uint64_t nth) {
    return concat(GetParam().name, " at operation ", nth, " of ", doing);
  }
};
INSTANTIATE_TEST_SUITE_P(Troubles, EveryIoError,
                         ::testing::Values(Trouble{"EIO_once", EIO, false},
                                           Trouble{"EIO_for_ever", EIO, true},
                                           Trouble{"ENOSPC_once", ENOSPC, false},
                                           Trouble{"ENOSPC_for_ever", ENOSPC, true},
                                           Trouble{"EDQUOT_once", EDQUOT, false},
                                           Trouble{"EINTR_once", EINTR, false},
                                           Trouble{"EAGAIN_once", EAGAIN, false},
                                           Trouble{"EAGAIN_for_ever", EAGAIN, true}),
                         [](const auto& one) { return std::string(one.param.name); });

// The names below the private directory that only a save in progress has.
std::size_t temporary_count(uring::IoBackend& io) {
  auto entries = io.list_directory(Workload::kRunPath + "/.stillframe");
  if (!entries) return 0;
  std::size_t count = 0;
  for (const auto& entry : *entries) count += entry.name.starts_with("tmp-") ? 1U : 0U;
  return count;
}

// As restore does: the newest checkpoint's state and every extent of it, none believed unchecked.
// Returns its sequence; 0: there is none.
Result<std::uint64_t> read_newest(uring::IoBackend& io) {
  auto contents = catalog::read_run(io, Workload::kRunPath);
  if (!contents) return std::move(contents).error();
  if (!contents->damaged.empty()) return contents->damaged.front().reason;
  if (contents->newest() == nullptr) return std::uint64_t{0};
  auto open = catalog::OpenCheckpoint::open(io, *contents->newest());
  if (!open) return std::move(open).error();
  auto state = open->read_state(0);
  if (!state) return std::move(state).error();
  auto staging = catalog::allocate_aligned(2 * catalog::kReadBlockBytes);
  if (!staging) return std::move(staging).error();
  std::vector<catalog::ExtentRange> wanted;
  for (std::size_t i = 0; i < open->parts().size(); ++i) {
    wanted.push_back({.part = i, .extent_count = open->parts()[i].extent_hashes.size()});
  }
  catalog::BlockReader reader(io, *open, wanted, staging->bytes());
  for (;;) {
    auto block = reader.next();
    if (!block) return std::move(block).error();
    if (!*block) return contents->newest()->manifest.sequence;
    const auto& part = open->parts()[(*block)->part];
    EXPECT_EQ(hash_extent((*block)->bytes), part.extent_hashes[(*block)->offset / kExtentBytes])
        << "bytes that the drive never had";
    reader.recycle(**block);
  }
}

void expect_clean(SimulatedBackend& io, const SimulatedDrive& drive, const std::string& where) {
  EXPECT_EQ(io.open_file_count(), 0U) << where << ": files were left open";
  EXPECT_EQ(io.in_flight(), 0U) << where;
  EXPECT_EQ(drive.syncs_after_failed_sync(), 0U) << where << ": a failed fsync was tried again";
}

TEST_P(EveryIoError, in_a_save_costs_that_save_at_most) {
  Workload workload;
  std::uint64_t nth = 1;
  for (;; nth += kStride) {
    ASSERT_LT(nth, kOperationCountMax);
    const std::string at = where("saving", nth);
    const auto drive = SimulatedDrive::create({.seed = nth});
    drive->fail(fault(nth));
    workload.forget();
    SimulatedBackend io(drive);
    const std::uint64_t acknowledged = workload.run(io);
    expect_clean(io, *drive, at);
    if (drive->fault_count() == 0) {
      EXPECT_EQ(acknowledged, Workload::kSaveCount);
      break;
    }
    drive->clear_faults();
    workload.judge(io, at);
    EXPECT_EQ(temporary_count(io), 0U) << at << ": space was not given back";
    if (HasFailure()) return;
    // The drive is well again: so are saves.
    (void)io.make_directory("/data");
    auto run_id = catalog::create_run(io, Workload::kRunPath, std::string(32, 'a'));
    ASSERT_TRUE(run_id) << at << ": " << run_id.error().message();
    auto contents = catalog::read_run(io, Workload::kRunPath);
    ASSERT_TRUE(contents);
    auto next = workload.save(io, *run_id, contents->next_sequence);
    ASSERT_TRUE(next) << at << ": " << next.error().message();
    auto newest = read_newest(io);
    ASSERT_TRUE(newest) << at << ": " << newest.error().message();
    EXPECT_EQ(*newest, contents->next_sequence) << at;
    drive->power_cycle();
    SimulatedBackend again(drive);
    workload.judge(again, at + ", then a power cut");
    if (HasFailure()) return;
  }
  std::printf("%s: %lu operations of a save\n", GetParam().name, static_cast<unsigned long>(nth));
  EXPECT_GT(nth, 60U);
}

// Also those that change nothing: opening, reading, listing, asking for the status.
constexpr OperationKind kReadingKinds[] = {OperationKind::kOpen, OperationKind::kRead,
                                           OperationKind::kList, OperationKind::kStatus};

TEST_P(EveryIoError, in_what_a_save_reads_costs_that_save_at_most) {
  Workload workload;
  std::uint64_t total = 0;
  for (const OperationKind kind : kReadingKinds) {
    for (std::uint64_t nth = 1;; nth += kStride, ++total) {
      ASSERT_LT(nth, kOperationCountMax);
      const std::string at = where(name(kind), nth);
      const auto drive = SimulatedDrive::create({.seed = nth});
      drive->fail(fault(nth, kind));
      workload.forget();
      SimulatedBackend io(drive);
      const std::uint64_t acknowledged = workload.run(io);
      expect_clean(io, *drive, at);
      if (drive->fault_count() == 0) {
        EXPECT_EQ(acknowledged, Workload::kSaveCount);
        break;
      }
      drive->clear_faults();
      workload.judge(io, at);
      if (HasFailure()) return;
    }
  }
  std::printf("%s: %lu operations\n", GetParam().name, static_cast<unsigned long>(total));
  EXPECT_GT(total, 10U);
}

TEST_P(EveryIoError, in_reading_back_is_an_error_and_never_other_bytes) {
  Workload workload;
  const auto drive = SimulatedDrive::create({.seed = 1});
  SimulatedBackend io(drive);
  ASSERT_EQ(workload.run(io), Workload::kSaveCount);
  std::uint64_t total = 0;
  for (const OperationKind kind : kReadingKinds) {
    for (std::uint64_t nth = 1;; ++nth, ++total) {
      ASSERT_LT(nth, kOperationCountMax);
      const std::string at = where(name(kind), nth);
      const std::uint64_t count_before = drive->fault_count();
      drive->fail(fault(nth, kind));
      auto newest = read_newest(io);
      drive->clear_faults();
      expect_clean(io, *drive, at);
      if (drive->fault_count() == count_before) {
        ASSERT_TRUE(newest) << at << ": " << newest.error().message();
        break;
      }
      if (newest) {
        EXPECT_EQ(*newest, Workload::kSaveCount) << at << ": an older one was taken";
      } else {
        EXPECT_FALSE(newest.error().message().empty()) << at;
      }
      newest = read_newest(io);
      ASSERT_TRUE(newest) << at << ", afterwards: " << newest.error().message();
      EXPECT_EQ(*newest, Workload::kSaveCount) << at;
    }
  }
  std::printf("%s: %lu operations\n", GetParam().name, static_cast<unsigned long>(total));
  EXPECT_GT(total, 10U);
}

TEST_P(EveryIoError, in_recovery_is_an_error_and_the_next_recovery_finishes) {
  Workload workload;
  // Killed in the midst of a removal, and in the midst of a save.
  const auto killed = SimulatedDrive::create({.seed = 7});
  {
    SimulatedBackend io(killed);
    ASSERT_EQ(workload.run(io), Workload::kSaveCount);
    auto contents = catalog::read_run(io, Workload::kRunPath);
    ASSERT_TRUE(contents);
    const std::string victim = contents->newest()->path;
    ASSERT_TRUE(workload.save(io, contents->run_id, contents->next_sequence));
    ASSERT_TRUE(io.rename(victim + "/manifest.json", victim + "/manifest.json.dead",
                          uring::RenameMode::kReplace));
    const std::string temporary =
        concat(Workload::kRunPath, "/.stillframe/tmp-00000006-0000000000001111");
    ASSERT_TRUE(io.make_directory(temporary));
    auto half = io.open(temporary + "/model.safetensors", uring::OpenMode::kCreateDirect);
    ASSERT_TRUE(half);
    ASSERT_TRUE(io.allocate(*half, kBlockBytes));
    io.close(*half);
    ASSERT_TRUE(io.sync_directory(temporary));
    ASSERT_TRUE(io.sync_directory(Workload::kRunPath + "/.stillframe"));
    ASSERT_TRUE(io.sync_directory(victim));
  }
  std::uint64_t nth = 1;
  for (;; ++nth) {
    ASSERT_LT(nth, kOperationCountMax);
    const std::string at = where("recovery", nth);
    const auto drive = killed->crashed_copy(7);
    SimulatedBackend io(drive);
    drive->fail(fault(nth));
    auto recovered = catalog::recover(io, Workload::kRunPath, 2);
    expect_clean(io, *drive, at);
    if (drive->fault_count() == 0) {
      ASSERT_TRUE(recovered) << recovered.error().message();
      break;
    }
    drive->clear_faults();
    workload.judge(io, at);
    EXPECT_EQ(temporary_count(io), 0U) << at;
    if (HasFailure()) return;
  }
  EXPECT_GT(nth, 8U);
  std::printf("%s: %lu operations of recovery\n", GetParam().name,
              static_cast<unsigned long>(nth - 1));
}

// F10: the drive says yes and does nothing. No code can prevent it; it must be found out, and the
// checkpoint before is still there.
TEST(LyingDrive, that_loses_any_one_write_is_found_out) {
  Workload workload;
  std::uint64_t found_count = 0;
  for (std::uint64_t nth = 1;; ++nth) {
    ASSERT_LT(nth, kOperationCountMax);
    const std::string at = concat("write ", nth, " lost");
    workload.forget();
    const auto drive = SimulatedDrive::create({.seed = nth});
    SimulatedBackend io(drive);
    ASSERT_TRUE(io.make_directory("/data"));
    auto run_id = catalog::create_run(io, Workload::kRunPath, std::string(32, 'a'));
    ASSERT_TRUE(run_id);
    ASSERT_TRUE(workload.save(io, *run_id, 1));
    ASSERT_TRUE(workload.save(io, *run_id, 2));
    // Into recycled files, whose old bytes look like good ones.
    auto contents = catalog::read_run(io, Workload::kRunPath);
    ASSERT_TRUE(contents);
    ASSERT_TRUE(catalog::retire(io, Workload::kRunPath, contents->checkpoints.front().path,
                                {.file_count_max = 8, .bytes_max = 1U << 30}));
    drive->fail({.kind = OperationKind::kWrite, .nth = nth, .error = simulated::kLostWrite});
    auto saved = workload.save(io, *run_id, 3);
    drive->clear_faults();
    if (drive->fault_count() == 0) break;
    ++found_count;
    ASSERT_TRUE(saved) << at << ": " << saved.error().message();
    workload.oracle().harmed(3);
    auto staging = catalog::allocate_aligned(catalog::kReadBlockBytes);
    ASSERT_TRUE(staging);
    contents = catalog::read_run(io, Workload::kRunPath);
    ASSERT_TRUE(contents) << at;
    std::size_t complaint_count = contents->damaged.size();
    std::vector<std::int64_t> restorable;
    for (const auto& checkpoint : contents->checkpoints) {
      auto complaints = catalog::verify_checkpoint(io, checkpoint, staging->bytes());
      ASSERT_TRUE(complaints) << at;
      if (complaints->empty()) restorable.push_back(checkpoint.manifest.step);
      complaint_count += complaints->size();
    }
    for (const std::string& complaint :
         workload.oracle().judge(restorable, testing::RunOracle::Retention::kMayLag)) {
      ADD_FAILURE() << at << ": " << complaint;
    }
    EXPECT_GE(complaint_count, 1U) << at << ": nobody noticed";
    if (HasFailure()) return;
  }
  std::printf("%lu lost writes found\n", static_cast<unsigned long>(found_count));
  EXPECT_GE(found_count, 5U);
}

}  // namespace
}  // namespace stillframe::daemon
