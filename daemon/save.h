#pragma once

#include "base/result.h"
#include "daemon/handoff.h"
#include "daemon/hash_pool.h"
#include "uring/io_backend.h"

namespace stillframe::daemon {

// Takes one snapshot from its first captured byte to DURABLE. Blocks; call on the run's I/O thread.
// Writes while the capture still runs.
//
// kCancelled, kDataLoss: the capture was voided, for the reason it was given. kResourceExhausted:
// the disk is full. kUnavailable: the drive failed a write or an fsync; nothing is retried. After
// any error the files are gone again, and earlier checkpoints are as they were.
Result<CommittedCheckpoint> save(uring::IoBackend& io, const Snapshot& snapshot,
                                 const SaveRequest& request, HashPool& hash_pool);

// The stages, in order. Public for their tests.
Result<StagedShard> stage(uring::IoBackend& io, const SnapshotPlan& plan,
                          const SaveRequest& request);
Result<WrittenShard> write(uring::IoBackend& io, const StagedShard& staged,
                           const Snapshot& snapshot, HashPool& hash_pool);
// Closes the parts.
Result<DurableShard> make_durable(uring::IoBackend& io, StagedShard& staged,
                                  const WrittenShard& written, const SnapshotPlan& plan,
                                  const SaveRequest& request);
Result<CommittedCheckpoint> commit(uring::IoBackend& io, const StagedShard& staged,
                                   const DurableShard& shard, const SaveRequest& request);
// Removes what a failed save made, as far as the drive lets it. Nothing goes to the spool.
void discard(uring::IoBackend& io, StagedShard staged);

}  // namespace stillframe::daemon
