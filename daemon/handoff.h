#pragma once

// What the stages of a save hand to each other. Each type can be made only by the stage whose
// promise it is, so a program that commits before it syncs does not compile.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/result.h"
#include "catalog/run.h"
#include "daemon/snapshot_plan.h"
#include "daemon/snapshot_stream.h"
#include "format/manifest.h"
#include "uring/io_backend.h"

namespace stillframe::daemon {

class HashPool;

// What a save writes besides the tensors, and where.
struct SaveRequest {
  std::string run_path;
  std::string run_id;
  std::uint64_t instance_nonce = 0;
  std::uint64_t sequence = 0;
  std::optional<std::uint64_t> previous_sequence;
  std::int64_t step = 0;
  std::uint32_t rank = 0;
  std::uint32_t world_size = 1;
  std::int64_t wall_ns = 0;
  std::map<std::string, double> metrics;
  std::vector<format::BestRule> best_rules;
  std::string framework;
  std::string python_version;
  bool has_pickle = false;
  std::string state_json;
};

// The snapshot while it is captured. All references outlive the save; nobody but the client's
// copiers writes to `slot` meanwhile.
struct Snapshot {
  const SnapshotPlan& plan;
  Bytes slot;
  SnapshotStream& stream;
};

// C1 to C3: room was found, the temporary directory and every part's file exist in full length.
class StagedShard {
 public:
  struct File {
    uring::FileId id;
    std::string path;
  };
  const std::string& directory() const noexcept { return directory_; }
  const std::vector<File>& files() const noexcept { return files_; }
  bool used_spool() const noexcept { return used_spool_; }
  // Again is harmless. Recycled parts are under a lease until they are closed, and nobody can open
  // a checkpoint whose parts are, so this comes before its name does.
  void close_parts(uring::IoBackend& io) {
    for (File& file : files_) {
      if (file.id != uring::FileId()) io.close(std::exchange(file.id, uring::FileId()));
    }
  }

 private:
  friend Result<StagedShard> stage(uring::IoBackend&, const SnapshotPlan&, const SaveRequest&);
  friend void discard(uring::IoBackend&, StagedShard);
  std::string directory_;
  std::vector<File> files_;  // One per part, open for O_DIRECT.
  bool used_spool_ = false;
};

// C4 and C5: the capture is complete, every byte of it was taken by the drive, and what was written
// has the hashes that were taken when it was captured.
class WrittenShard {
 public:
  const std::vector<std::vector<std::uint64_t>>& extent_hashes() const noexcept {
    return extent_hashes_;
  }

 private:
  friend Result<WrittenShard> write(uring::IoBackend&, const StagedShard&, const Snapshot&,
                                    HashPool&);
  std::vector<std::vector<std::uint64_t>> extent_hashes_;  // By part.
};

// C6: parts, sums and state are on the drive, each fsync() having returned 0 once.
class DurableShard {
 public:
  const std::vector<format::ManifestPart>& parts() const noexcept { return parts_; }
  const format::ManifestFile& sums() const noexcept { return sums_; }
  const format::ManifestFile& state() const noexcept { return state_; }

 private:
  friend Result<DurableShard> make_durable(uring::IoBackend&, StagedShard&, const WrittenShard&,
                                           const SnapshotPlan&, const SaveRequest&);
  std::vector<format::ManifestPart> parts_;
  format::ManifestFile sums_;
  format::ManifestFile state_;
};

// C7 to C10: the manifest and every directory entry are on the drive too: the state DURABLE.
class CommittedCheckpoint {
 public:
  const catalog::Checkpoint& checkpoint() const noexcept { return checkpoint_; }

 private:
  friend Result<CommittedCheckpoint> commit(uring::IoBackend&, const StagedShard&,
                                            const DurableShard&, const SaveRequest&);
  catalog::Checkpoint checkpoint_;
};

}  // namespace stillframe::daemon
