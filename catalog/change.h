#pragma once

// Every change to a run directory but the commit itself (daemon/save.cc): removal, recycling,
// recovery, tags. The caller holds the run's lock (run_lock.h). Steps C12 to C14 of the commit
// protocol; each is idempotent, so that it can be stopped anywhere and run again.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "catalog/run.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

struct SpoolLimits {
  std::size_t file_count_max = 8;
  std::uint64_t bytes_max = 0;  // Of all spool files together; what does not fit is unlinked.
};

// Removes one checkpoint: manifest -> manifest.json.dead, fsync of its directory, only then parts
// to the spool or unlinked, then the rest (DUR-6, DUR-9). Removing the newest also records its
// sequence, so that it is never used again. kUnavailable: the drive failed; what is left is
// finished by recover(). Takes damaged ones too, for an owner who asks for it. Files in the
// directory that are not the checkpoint's stay, with the directory and the dead manifest, which no
// reader counts.
Status retire(uring::IoBackend& io, const std::string& run_path, const std::string& checkpoint_path,
              const SpoolLimits& limits);

// Start-up: removes tmp directories whose nonce is not `own_nonce` (parts in them are unlinked,
// never spooled), finishes victims that hold manifest.json.dead. Anything else odd is left alone
// and reported.
struct Recovered {
  std::vector<std::string> removed_temporaries;
  std::vector<std::string> finished_victims;
};
Result<Recovered> recover(uring::IoBackend& io, const std::string& run_path,
                          std::uint64_t own_nonce);

// Moves a spool file of about `bytes` to `target_path` and opens it for O_DIRECT writing, when
// there is one that nobody else has open, mapped or linked (DUR-7); others found unfit are
// unlinked. Its old length stays: the caller allocates to the right one. nullopt: none fits.
Result<std::optional<uring::FileId>> take_from_spool(uring::IoBackend& io,
                                                     const std::string& run_path,
                                                     std::uint64_t bytes,
                                                     const std::string& target_path);
// Gives all spool files back to the file system. Returns the bytes freed. Used when a save meets a
// full disk, before it gives up.
Result<std::uint64_t> empty_spool(uring::IoBackend& io, const std::string& run_path);

// Writes, fsyncs and renames .stillframe/tags/TAG; tags protect a checkpoint from retention.
// kNotFound: no such checkpoint. remove_tag: kNotFound when there is no such tag.
Status set_tag(uring::IoBackend& io, const std::string& run_path, const std::string& tag,
               std::uint64_t sequence);
Status remove_tag(uring::IoBackend& io, const std::string& run_path, const std::string& tag);
// Whether a tag names this checkpoint now; a tag that cannot be read may name any.
Result<bool> is_tagged(uring::IoBackend& io, const std::string& run_path, std::uint64_t sequence);

// Which checkpoints a policy would remove, oldest first: all but the newest `keep_last` (0: all
// stay), those with a step divisible by `keep_every` (0: none for that), the best ones by each
// rule of `best`, tagged ones, and always the newest. Pure.
struct BestKeep {
  format::BestRule rule;
  std::uint32_t count = 0;
};
struct RetentionPolicy {
  std::uint32_t keep_last = 0;
  std::uint32_t keep_every = 0;
  std::vector<BestKeep> best = {};
};
std::vector<const Checkpoint*> choose_victims(const RunContents& contents,
                                              const RetentionPolicy& policy);

// The links `latest` and `best` for people and other tools: made afresh, never read, errors
// harmless.
void refresh_links(uring::IoBackend& io, const RunContents& contents);

}  // namespace stillframe::catalog
