#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "base/text.h"
#include "catalog/block_reader.h"
#include "catalog/change.h"
#include "cli/address.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

// What is to go: a checkpoint, or the damaged rest of one.
struct Victim {
  std::string path;
  std::uint64_t sequence = 0;
  std::uint64_t bytes = 0;
  std::vector<std::string> tags;
  bool is_damaged = false;
};

// Only names that stay what they are: by the time of the removal, latest may be another one.
Result<std::uint64_t> settled_sequence(const catalog::RunContents& run, const Address& address) {
  using Kind = format::Selector::Kind;
  const format::Selector& selector = address.selector;
  if (selector.kind == Kind::kSequence) return selector.sequence;
  auto found = catalog::select(run, selector);
  if (!found) return std::move(found).error();
  const std::uint64_t sequence = (*found)->manifest.sequence;
  const auto sharing =
      std::count_if(run.checkpoints.begin(), run.checkpoints.end(),
                    [&](const auto& other) { return other.manifest.step == selector.step; });
  const bool is_settled =
      selector.kind == Kind::kTag || (selector.kind == Kind::kStep && sharing == 1);
  if (is_settled) return sequence;
  return Error(
      Code::kInvalidArgument,
      concat("rm wants a name that means one checkpoint for good; ", format::to_text(selector),
             " is now: stillframe rm ", address.run_path, '@', sequence));
}

Result<Victim> find_victim(const catalog::RunContents& run, std::uint64_t sequence) {
  for (const catalog::Checkpoint& one : run.checkpoints) {
    if (one.manifest.sequence != sequence) continue;
    return Victim{.path = one.path,
                  .sequence = sequence,
                  .bytes = one.bytes(),
                  .tags = one.tags,
                  .is_damaged = false};
  }
  for (const catalog::DamagedCheckpoint& one : run.damaged) {
    if (one.name.sequence != sequence) continue;
    return Victim{
        .path = one.path, .sequence = sequence, .bytes = 0, .tags = one.tags, .is_damaged = true};
  }
  return Error(Code::kNotFound, concat(run.path, " has no checkpoint ", sequence,
                                       "; see: stillframe ls ", run.path));
}

// Whether the run still restores without the victim: one other checkpoint whose files are all
// there, with the lengths, headers and sums that its manifest promises.
bool others_restore(uring::IoBackend& io, const catalog::RunContents& run, const Victim& victim) {
  return std::any_of(run.checkpoints.rbegin(), run.checkpoints.rend(), [&](const auto& other) {
    return other.manifest.sequence != victim.sequence &&
           catalog::OpenCheckpoint::open(io, other).has_value();
  });
}

Status may_remove(uring::IoBackend& io, const catalog::RunContents& run, const Victim& victim,
                  bool is_forced) {
  if (is_forced) return ok();
  if (!victim.tags.empty()) {
    return Error(Code::kInvalidArgument,
                 concat(victim.path, " is protected by ", joined(victim.tags, ", "),
                        "; stillframe unpin it first, or rm --force"));
  }
  if (!victim.is_damaged && !others_restore(io, run, victim)) {
    return Error(Code::kInvalidArgument, concat(victim.path,
                                                " is the last one that restores; to "
                                                "remove it all the same: --force"));
  }
  return ok();
}

}  // namespace

Result<Exit> rm(Tool& tool, const std::string& text, bool is_forced) {
  auto address = read_address(text);
  if (!address) return std::move(address).error();
  auto run = open_run(tool, address->run_path);
  if (!run) return std::move(run).error();
  auto sequence = settled_sequence(*run, *address);
  if (!sequence) return std::move(sequence).error();
  auto victim = find_victim(*run, *sequence);
  if (!victim) return std::move(victim).error();
  auto io = tool.io();
  if (!io) return std::move(io).error();
  auto allowed = may_remove(**io, *run, *victim, is_forced);
  if (!allowed) return std::move(allowed).error();

  for (const std::string& tag : victim->tags) {
    auto removed = put_tag(tool, address->run_path, tag, 0);
    if (!removed) return std::move(removed).error();
  }
  shm::wire::RetireT request;
  std::error_code failed;
  request.run_path = std::filesystem::canonical(address->run_path, failed).string();
  request.sequence = victim->sequence;
  if (failed) return Error(Code::kNotFound, concat(address->run_path, ": ", failed.message()));
  const auto here = [&](uring::IoBackend& backend) -> Status {
    // Looked at again: until now somebody else could hold the lock and change the run.
    auto now = catalog::read_run(backend, address->run_path);
    if (!now) return std::move(now).error();
    auto still = find_victim(*now, victim->sequence);
    if (!still) return std::move(still).error();
    auto still_allowed = may_remove(backend, *now, *still, is_forced);
    if (!still_allowed) return still_allowed;
    // Nothing for the spool: whoever removes by hand wants the space.
    const catalog::SpoolLimits no_spool{.file_count_max = 0, .bytes_max = 0};
    return catalog::retire(backend, address->run_path, still->path, no_spool);
  };
  auto removed =
      change_run(tool, address->run_path, here, shm::make_message(0, std::move(request)));
  if (!removed) return std::move(removed).error();

  if (tool.options().as_json) {
    print_json(tool, boost::json::object{{"removed", victim->path},
                                         {"sequence", victim->sequence},
                                         {"bytes", victim->bytes}});
  } else {
    tool.print("removed {}  {}\n", victim->path, human_bytes(victim->bytes));
  }
  return Exit::kDone;
}

}  // namespace stillframe::cli
