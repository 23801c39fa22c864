// C14: what a crash left. Never by age and never by guess: only what carries another instance's
// nonce, a dead manifest, or the mark of an unfinished file. Run twice, it does nothing the second
// time.
#include <utility>

#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/change.h"
#include "catalog/run_files.h"
#include "catalog/victim.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

// Whether the entry is a directory of the run's owner; links, and what other users put here, stay.
Result<bool> is_own_directory(uring::IoBackend& io, const std::string& path,
                              std::uint32_t owner_uid) {
  auto status = io.status(path);
  if (!status && status.error().code() == Code::kNotFound) return false;
  if (!status) return std::move(status).error();
  return status->kind == uring::FileKind::kDirectory && status->owner_uid == owner_uid;
}

// False: it holds directories, which no save makes, so it stays.
Result<bool> remove_temporary(uring::IoBackend& io, const std::string& path) {
  auto entries = io.list_directory(path);
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    if (entry.kind == uring::FileKind::kDirectory) return false;
  }
  for (const uring::DirectoryEntry& entry : *entries) {
    // Unlinked, never spooled: the blocks of an unfinished part may not have been allocated in
    // full.
    STEP("C14 unlink file of temporary");
    auto unlinked = unlink_if_there(io, concat(path, '/', entry.name));
    if (!unlinked) return std::move(unlinked).error();
  }
  STEP("C14 remove temporary");
  auto removed = io.remove_directory(path);
  if (!removed) return std::move(removed).error();
  return true;
}

// Of tags, of the sequence floor and of the run id: written, but not yet renamed.
Status remove_unfinished_files(uring::IoBackend& io, const std::string& directory) {
  auto entries = io.list_directory(directory);
  if (!entries && entries.error().code() == Code::kNotFound) return ok();
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    if (entry.kind == uring::FileKind::kDirectory) continue;
    if (entry.name.find(kUnfinishedMark) == std::string::npos) continue;
    STEP("C14 unlink unfinished file");
    auto unlinked = unlink_if_there(io, concat(directory, '/', entry.name));
    if (!unlinked) return unlinked;
  }
  return ok();
}

Status remove_temporaries(uring::IoBackend& io, const std::string& run_path,
                          std::uint64_t own_nonce, std::uint32_t owner_uid, Recovered& recovered) {
  const std::string directory = private_path(run_path);
  auto entries = io.list_directory(directory);
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    const auto name = format::parse_temporary_directory_name(entry.name);
    if (!name || name->nonce == own_nonce) continue;
    const std::string path = concat(directory, '/', entry.name);
    auto is_own = is_own_directory(io, path, owner_uid);
    if (!is_own) return std::move(is_own).error();
    if (!*is_own) continue;
    auto removed = remove_temporary(io, path);
    if (!removed) return std::move(removed).error();
    if (*removed) recovered.removed_temporaries.push_back(entry.name);
  }
  if (recovered.removed_temporaries.empty()) return ok();
  if (int e = STEP_ERROR("C14 sync private directory"); e != 0) {
    return os_error(concat("fsync ", directory), e);
  }
  return io.sync_directory(directory);
}

Status finish_victims(uring::IoBackend& io, const std::string& run_path, std::uint32_t owner_uid,
                      Recovered& recovered) {
  auto entries = io.list_directory(run_path);
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    const auto name = format::parse_checkpoint_directory_name(entry.name);
    if (!name) continue;
    const std::string path = concat(run_path, '/', entry.name);
    auto is_own = is_own_directory(io, path, owner_uid);
    if (!is_own) return std::move(is_own).error();
    if (!*is_own) continue;
    auto files = look_at_victim(io, path);
    if (!files) return std::move(files).error();
    // With both manifests somebody may be rescuing the checkpoint, so neither is touched. An empty
    // directory is the last that is seen of a victim.
    const bool is_victim = files->is_empty || (files->has_dead_manifest && !files->has_manifest);
    if (!is_victim) continue;
    STEP("C14 finish victim");
    auto done = keep_sequence_used(io, run_path, name->sequence);
    if (done) done = finish_victim(io, run_path, path, nullptr);
    if (!done) return done;
    // Not those that stay for the sake of somebody's own files in them.
    if (!io.status(path)) recovered.finished_victims.push_back(entry.name);
  }
  return ok();
}

}  // namespace

Result<Recovered> recover(uring::IoBackend& io, const std::string& run_path,
                          std::uint64_t own_nonce) {
  auto status = io.status(private_path(run_path));
  if (!status) return std::move(status).error();
  Recovered recovered;
  auto done = remove_unfinished_files(io, private_path(run_path));
  if (done) done = remove_unfinished_files(io, tags_path(run_path));
  if (done) done = remove_temporaries(io, run_path, own_nonce, status->owner_uid, recovered);
  if (done) done = finish_victims(io, run_path, status->owner_uid, recovered);
  if (!done) return std::move(done).error();
  return recovered;
}

}  // namespace stillframe::catalog
