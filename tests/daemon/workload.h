#pragma once

// A daemon's work without a daemon: saves and retirements on a simulated drive, of snapshots whose
// every byte follows from the step.

#include <cstdint>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "catalog/run.h"
#include "daemon/hash_pool.h"
#include "daemon/save.h"
#include "tests/oracle/run_oracle.h"
#include "uring/io_backend.h"

namespace stillframe::daemon {

class Workload {
 public:
  static constexpr std::uint64_t kSaveCount = 4;
  static constexpr std::uint32_t kKeepLast = 1;
  static const std::string kRunPath;

  Workload();

  // Tells the oracle, as all that follows does.
  Result<CommittedCheckpoint> save(uring::IoBackend& io, const std::string& run_id,
                                   std::uint64_t sequence);
  // Saves kSaveCount times and keeps kKeepLast, until something fails. Returns the newest sequence
  // that was acknowledged.
  std::uint64_t run(uring::IoBackend& io);

  // What is there after recovery: nothing damaged, every byte as its hash says and its hashes those
  // of its step, and such checkpoints as the oracle allows.
  void judge(uring::IoBackend& io, const std::string& where);

  // Of a fresh drive.
  void forget() {
    previous_.clear();
    oracle_ = testing::RunOracle(kKeepLast);
  }
  testing::RunOracle& oracle() { return oracle_; }
  const SnapshotPlan& plan() const { return plan_; }
  Bytes slot() { return slot_; }
  void capture(std::int64_t step, SnapshotStream& stream);
  // The extents' hashes of that step, by part. Fills the slot on the way.
  std::vector<std::vector<std::uint64_t>> fill(std::int64_t step);

 private:
  // The sums that verify_checkpoint() compared with are those of this step's bytes.
  void expect_right_hashes(uring::IoBackend& io, const catalog::Checkpoint& checkpoint,
                           const std::string& where);

  SnapshotPlan plan_;
  std::vector<std::byte> memory_;
  Bytes slot_;
  HashPool hash_pool_{1};
  std::string previous_;
  testing::RunOracle oracle_{kKeepLast};
};

}  // namespace stillframe::daemon
