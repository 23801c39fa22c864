// The save path, in order, on one screen. A new developer opens this file first; then stage.cc,
// write.cc and commit.cc, in which each stage is. The letters are the steps of docs/ARCHITECTURE.md
// section 4.
#include "daemon/save.h"

#include <utility>

namespace stillframe::daemon {

namespace {

// Everything after the files exist; the caller removes them if this fails.
Result<CommittedCheckpoint> fill_and_commit(uring::IoBackend& io, StagedShard& staged,
                                            const Snapshot& snapshot, const SaveRequest& request,
                                            HashPool& hash_pool) {
  // C4, C5: the image goes to the drive from the memory in which it was captured. Overlaps with the
  // capture, and with training all the more.
  auto written = write(io, staged, snapshot, hash_pool);
  if (!written) return std::move(written).error();

  // C6: what the drive took is not yet what the drive keeps.
  auto shard = make_durable(io, staged, *written, snapshot.plan, request);
  if (!shard) return std::move(shard).error();

  // C7 to C10: the rename in here is the only moment at which this checkpoint becomes visible. A
  // crash before it leaves files that recovery removes; after it, restore must succeed.
  return commit(io, staged, *shard, request);
}

}  // namespace

Result<CommittedCheckpoint> save(uring::IoBackend& io, const Snapshot& snapshot,
                                 const SaveRequest& request, HashPool& hash_pool) {
  // C1 to C3: a full disk shows here, before the first byte.
  auto staged = stage(io, snapshot.plan, request);
  if (!staged) return std::move(staged).error();

  auto committed = fill_and_commit(io, *staged, snapshot, request, hash_pool);
  if (!committed) discard(io, *std::move(staged));
  return committed;
}

}  // namespace stillframe::daemon
