#include "client/remove.h"

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "catalog/block_reader.h"
#include "catalog/run.h"
#include "uring/io_backend.h"

namespace stillframe::client {

Status may_remove(const std::string& run_path, std::uint64_t sequence) {
  // Nothing but small files is read: no ring is needed.
  auto created = uring::create_backend({.choice = uring::BackendOptions::Choice::kThreads});
  if (!created) return std::move(created).error();
  uring::IoBackend& io = *created->backend;
  auto run = catalog::read_run(io, run_path);
  if (!run) return std::move(run).error();
  const auto& all = run->checkpoints;
  const auto victim = std::find_if(
      all.begin(), all.end(), [&](const auto& one) { return one.manifest.sequence == sequence; });
  if (victim == all.end()) {
    return Error(Code::kNotFound, concat(run_path, " has no checkpoint ", sequence));
  }
  if (!victim->tags.empty()) {
    return Error(Code::kInvalidArgument, concat(victim->path, " is protected by the tag ",
                                                victim->tags.front(), "; unpin it first"));
  }
  // One whose files are all there, with the lengths, headers and sums that its manifest promises.
  const bool has_newer = std::any_of(all.rbegin(), all.rend(), [&](const auto& one) {
    return one.manifest.sequence > sequence && catalog::OpenCheckpoint::open(io, one).has_value();
  });
  if (!has_newer) {
    return Error(Code::kInvalidArgument,
                 concat(victim->path, " stays: no newer checkpoint of the run restores"));
  }
  return ok();
}

}  // namespace stillframe::client
