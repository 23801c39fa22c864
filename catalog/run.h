#pragma once

// A run directory as it stands: which checkpoints are in it, what latest, best and the tags name.
// Everything here works without a daemon. docs/FORMAT.md says what lies where.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "format/manifest.h"
#include "format/names.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// A committed checkpoint: its directory holds a manifest that verifies. (The parts' bytes were not
// read.)
struct Checkpoint {
  std::string path;  // RUN/00000012-step-1200
  format::Manifest manifest;
  std::vector<std::string> tags;

  std::uint64_t bytes() const noexcept;  // Of all parts.
};

// A directory with a checkpoint's name whose manifest is missing or does not verify. Listed, never
// counted, never removed by itself.
struct DamagedCheckpoint {
  std::string path;
  format::CheckpointName name;
  Error reason;
  std::vector<std::string> tags{};
};

struct RunContents {
  std::string path;
  // Empty: the directory is not a run (or does not exist). Of a directory that holds checkpoints
  // but has lost its run-id (somebody copied only them): the id of the newest one.
  std::string run_id;
  std::vector<Checkpoint> checkpoints;  // By sequence, oldest first.
  std::vector<DamagedCheckpoint> damaged;
  std::vector<std::string>
      damaged_tags;                 // Unreadable ones: while there are any, nothing is a victim.
  std::uint64_t next_sequence = 1;  // Above every sequence that this run ever used.

  const Checkpoint* newest() const noexcept;
  // The best by the newest checkpoint's rule, or by `rule` when given. NaN never wins, ties go to
  // the newest. nullptr: no checkpoint has that metric with a number.
  const Checkpoint* best(const format::BestRule* rule = nullptr) const;
  // The newest checkpoint's rule for that metric; empty: its first. nullptr: it has none.
  const format::BestRule* best_rule(std::string_view metric) const;
  // Those that have a number for the rule's metric, the best first; of equals the newest first.
  std::vector<const Checkpoint*> ranked(const format::BestRule& rule) const;
};

// Scans. A path that does not exist, or is an empty directory, is an empty RunContents, not an
// error. kInvalidArgument: not a directory, or not allowed. Needs no lock: what a writer removes
// meanwhile is left out.
//
// A directory that is no run but holds a manifest.json is a checkpoint that stands alone: a whole
// model, or the copy of a checkpoint. It is the one in the answer.
//
// Damaged is also what has a checkpoint's name and is a link, a file or another user's directory
// (than the run's), and what belongs to another run or carries another checkpoint's manifest. A
// directory with manifest.json and manifest.json.dead counts as its manifest.json says; one with
// only the dead one, or with nothing in it, is a removal under way and not listed.
Result<RunContents> read_run(uring::IoBackend& io, const std::string& run_path);

// kNotFound names what was asked and what there is; kDataLoss when the selector names a damaged one
// (or latest and every checkpoint is damaged).
Result<const Checkpoint*> select(const RunContents& contents, const format::Selector& selector);

// Makes the run directory with its parents, `.stillframe/{spool,tags}` and the run id, all fsynced;
// or takes what is there. Returns the run id. kInvalidArgument: not writable, or holds other
// people's files instead of a run (a directory that is neither empty nor a run). kDataLoss: a small
// file of the run that only a person can put right is missing or damaged; the message says which
// and how. Needs no lock: of two that make the same run at once, both return the one id.
Result<std::string> create_run(uring::IoBackend& io, const std::string& run_path,
                               const std::string& new_run_id);

}  // namespace stillframe::catalog
