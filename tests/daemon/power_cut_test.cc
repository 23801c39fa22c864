// The save path on a drive that loses power, fails and fills up: at every operation of save and
// retention, the old checkpoint or the new one, complete, and never a third thing (P1, P2, P4).
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/change.h"
#include "catalog/run.h"
#include "daemon/hash_pool.h"
#include "daemon/save.h"
#include "shm/arena.h"
#include "tests/simulated/simulated_backend.h"

namespace stillframe::daemon {
namespace {

using simulated::OperationKind;
using simulated::SimulatedBackend;
using simulated::SimulatedDrive;

constexpr std::uint64_t kSaveCount = 4;
const std::string kRunPath = "/data/run";

SnapshotPlan small_plan() {
  SnapshotPlan plan;
  std::vector<std::uint64_t> image_bytes;
  for (const auto& [name, bytes] :
       {std::pair<std::string, std::uint64_t>{"model", 1'100'001}, {"optimizer", 9'000}}) {
    format::PartSpec part;
    part.name = name;
    part.tensors.push_back({.name = name + ".w", .dtype = format::Dtype::kU8, .shape = {bytes}});
    plan.parts.push_back(*format::place(part));
    image_bytes.push_back(plan.parts.back().bytes);
    plan.extent_counts.push_back(
        static_cast<std::uint32_t>(format::extent_count(plan.parts.back().bytes)));
    plan.extent_count += plan.extent_counts.back();
    plan.bytes += plan.parts.back().bytes;
  }
  auto slot = *shm::plan_slot(image_bytes);
  plan.part_offsets = slot.part_offsets;
  plan.slot_bytes = slot.slot_bytes;
  return plan;
}

// A daemon's work without a daemon: captured snapshots whose bytes follow from the step.
class Workload {
 public:
  Workload() : plan_(small_plan()), memory_(plan_.slot_bytes + kBlockBytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    slot_ = Bytes(memory_).subspan(round_up(address, kBlockBytes) - address, plan_.slot_bytes);
  }

  Result<CommittedCheckpoint> save(uring::IoBackend& io, const std::string& run_id,
                                   std::uint64_t sequence) {
    SnapshotStream stream(plan_, [&io] { io.wake(); });
    capture(static_cast<std::int64_t>(sequence), stream);
    SaveRequest request;
    request.run_path = kRunPath;
    request.run_id = run_id;
    request.instance_nonce = 1;
    request.sequence = sequence;
    request.step = static_cast<std::int64_t>(sequence);
    request.state_json = concat("{\"step\": ", sequence, "}");
    return stillframe::daemon::save(io, {.plan = plan_, .slot = slot_, .stream = stream}, request,
                                    hash_pool_);
  }

  // Saves and keeps one, until something fails. Returns the newest sequence that was acknowledged.
  std::uint64_t run(uring::IoBackend& io) {
    std::uint64_t acknowledged = 0;
    if (!io.make_directory("/data") || !io.sync_directory("/")) return 0;
    auto run_id = catalog::create_run(io, kRunPath, std::string(32, 'a'));
    if (!run_id) return 0;
    for (std::uint64_t sequence = 1; sequence <= kSaveCount; ++sequence) {
      auto committed = save(io, *run_id, sequence);
      if (!committed) return acknowledged;
      acknowledged = sequence;
      if (!previous_.empty() &&
          !catalog::retire(io, kRunPath, previous_, {.file_count_max = 8, .bytes_max = 1U << 30})) {
        return acknowledged;
      }
      previous_ = committed->checkpoint().path;
    }
    return acknowledged;
  }

  // What is there after recovery: nothing damaged, every byte as its hash says, the newest not
  // older than what was acknowledged.
  void judge(uring::IoBackend& io, std::uint64_t acknowledged, const std::string& where) {
    if (!io.status(kRunPath)) {
      EXPECT_EQ(acknowledged, 0U) << where;
      return;
    }
    // As a daemon opens a run.
    auto run_id = catalog::create_run(io, kRunPath, std::string(32, 'b'));
    ASSERT_TRUE(run_id) << where << ": " << run_id.error().message();
    auto recovered = catalog::recover(io, kRunPath, 2);
    ASSERT_TRUE(recovered) << where << ": " << recovered.error().message();
    auto contents = catalog::read_run(io, kRunPath);
    ASSERT_TRUE(contents) << where << ": " << contents.error().message();
    for (const auto& damaged : contents->damaged) {
      ADD_FAILURE() << where << ": " << damaged.path << ": " << damaged.reason.message();
    }
    auto staging = catalog::allocate_aligned(catalog::kReadBlockBytes);
    ASSERT_TRUE(staging);
    for (const auto& checkpoint : contents->checkpoints) {
      auto complaints = catalog::verify_checkpoint(io, checkpoint, staging->bytes());
      ASSERT_TRUE(complaints) << where;
      for (const std::string& complaint : *complaints) {
        ADD_FAILURE() << where << ": " << checkpoint.path << ": " << complaint;
      }
      expect_right_hashes(io, checkpoint, where);
    }
    if (acknowledged == 0) return;
    ASSERT_NE(contents->newest(), nullptr) << where << ": an acknowledged checkpoint is gone";
    EXPECT_GE(contents->newest()->manifest.sequence, acknowledged) << where;
    EXPECT_LE(contents->newest()->manifest.sequence, acknowledged + 1) << where;
  }

  void forget() { previous_.clear(); }
  const SnapshotPlan& plan() const { return plan_; }
  Bytes slot() { return slot_; }
  void capture(std::int64_t step, SnapshotStream& stream) {
    const std::vector<std::vector<std::uint64_t>> hashes = fill(step);
    for (std::uint32_t part = 0; part < hashes.size(); ++part) {
      for (std::uint32_t extent = 0; extent < hashes[part].size(); ++extent) {
        EXPECT_TRUE(stream.accept(
            {.ticket = 1, .part = part, .extent = extent, .hash = hashes[part][extent]}));
      }
    }
    EXPECT_TRUE(stream.complete());
  }

 private:
  std::vector<std::vector<std::uint64_t>> fill(std::int64_t step) {
    std::vector<std::vector<std::uint64_t>> hashes;
    for (std::size_t part = 0; part < plan_.parts.size(); ++part) {
      const format::PartImage& image = plan_.parts[part];
      const Bytes bytes = plan_.image(slot_, part);
      std::memset(bytes.data(), static_cast<int>(step * 16 + static_cast<int>(part) + 1),
                  bytes.size());
      std::memset(bytes.data() + image.bytes, 0, bytes.size() - image.bytes);
      std::memcpy(bytes.data(), image.header.data(), image.header.size());
      hashes.emplace_back();
      for (std::uint64_t offset = 0; offset < image.bytes; offset += kExtentBytes) {
        hashes.back().push_back(hash_extent(
            bytes.subspan(offset, std::min<std::uint64_t>(kExtentBytes, image.bytes - offset))));
      }
    }
    return hashes;
  }

  // The sums that verify_checkpoint() compared with are those of this step's bytes.
  void expect_right_hashes(uring::IoBackend& io, const catalog::Checkpoint& checkpoint,
                           const std::string& where) {
    auto open = catalog::OpenCheckpoint::open(io, checkpoint);
    ASSERT_TRUE(open) << where << ": " << open.error().message();
    const auto hashes = fill(checkpoint.manifest.step);
    for (std::size_t part = 0; part < hashes.size(); ++part) {
      EXPECT_EQ(open->parts()[part].extent_hashes, hashes[part])
          << where << ": bytes of another step";
    }
  }

  SnapshotPlan plan_;
  std::vector<std::byte> memory_;
  Bytes slot_;
  HashPool hash_pool_{1};
  std::string previous_;
};

TEST(PowerCut, at_every_operation_leaves_the_old_or_the_new_checkpoint) {
  constexpr std::uint64_t kCrashesPerOperation = 4;
  Workload workload;
  std::uint64_t operation = 0;
  for (bool was_cut = true; was_cut;) {
    ++operation;
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
      workload.judge(io, acknowledged,
                     concat("cut at operation ", operation, ", seed ", operation * 1000 + seed));
      if (::testing::Test::HasFailure()) return;
    }
  }
  std::printf("%lu operations, %lu crashes of each\n", static_cast<unsigned long>(operation),
              static_cast<unsigned long>(kCrashesPerOperation));
  EXPECT_GT(operation, 60U);
}

TEST(FailingDrive, that_fails_any_one_operation_loses_nothing_and_is_not_asked_twice) {
  Workload workload;
  for (std::uint64_t nth = 1;; ++nth) {
    const auto drive = SimulatedDrive::create({.seed = nth});
    drive->fail({.nth = nth, .error = EIO});
    workload.forget();
    SimulatedBackend io(drive);
    const std::uint64_t acknowledged = workload.run(io);
    EXPECT_EQ(drive->syncs_after_failed_sync(), 0U) << "operation " << nth;
    if (acknowledged == kSaveCount && drive->operation_count() < nth) break;
    drive->clear_faults();
    // Without a crash, and with one.
    workload.judge(io, acknowledged, concat("EIO at operation ", nth));
    drive->power_cycle();
    SimulatedBackend again(drive);
    workload.judge(again, acknowledged, concat("EIO at operation ", nth, ", then a power cut"));
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
  for (std::uint64_t free_bytes :
       {std::uint64_t{0}, std::uint64_t{1} << 19, std::uint64_t{17} << 20}) {
    drive->set_capacity(used_bytes + free_bytes);
    const std::uint64_t free_before = io.space("/")->free_bytes;
    auto failed = workload.save(io, *run_id, 2);
    ASSERT_FALSE(failed) << free_bytes;
    EXPECT_EQ(failed.error().code(), Code::kResourceExhausted) << failed.error().message();
    EXPECT_EQ(io.space("/")->free_bytes, free_before) << "space was not given back";
    workload.judge(io, 1, "full disk");
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
