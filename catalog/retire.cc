// C12 and C13. The order is the promise: manifest away, directory synced, and only then any byte of
// a part may change, because data overwrites skip the file system's journal (DUR-6, DUR-9).
#include <algorithm>
#include <set>
#include <utility>

#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/change.h"
#include "catalog/run_files.h"
#include "catalog/spool.h"
#include "catalog/victim.h"
#include "format/manifest.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

constexpr std::string_view kPartSuffix = ".safetensors";

bool is_part(std::string_view name) { return name.ends_with(kPartSuffix); }

// Whether a file in a checkpoint's directory is the checkpoint's. People put their own beside it.
class Belongings {
 public:
  static Belongings of(uring::IoBackend& io, const std::string& victim_path) {
    Belongings own;
    auto text = read_small_file(io, concat(victim_path, '/', format::kDeadManifestName),
                                format::kManifestBytesMax);
    if (!text) return own;
    auto manifest = format::decode_manifest(*text);
    if (!manifest) return own;
    own.is_known_ = true;
    for (const format::ManifestPart& part : manifest->parts) own.names_.insert(part.file);
    for (const format::ManifestFile& state : manifest->states) own.names_.insert(state.file);
    own.names_.insert(manifest->sums.file);
    return own;
  }

  bool include(const std::string& name) const {
    if (is_known_) return names_.contains(name);
    // A damaged checkpoint that its owner wants gone: by the looks of the name.
    return is_part(name) || name == format::kSumsName ||
           (name.starts_with("state") && name.ends_with(".json"));
  }

 private:
  bool is_known_ = false;
  std::set<std::string> names_;
};

Status bury_manifest(uring::IoBackend& io, const std::string& victim_path) {
  const std::string manifest = concat(victim_path, '/', format::kManifestName);
  const std::string dead = concat(victim_path, '/', format::kDeadManifestName);
  if (int e = STEP_ERROR("C12 rename manifest to dead"); e != 0) {
    return os_error(concat("rename ", manifest), e);
  }
  // Replaces an older dead one, which says nothing beside a manifest that stands.
  return io.rename(manifest, dead, uring::RenameMode::kReplace);
}

}  // namespace

Result<VictimFiles> look_at_victim(uring::IoBackend& io, const std::string& victim_path) {
  auto entries = io.list_directory(victim_path);
  if (!entries) return std::move(entries).error();
  VictimFiles files;
  for (const uring::DirectoryEntry& entry : *entries) {
    files.is_empty = false;
    if (entry.name == format::kManifestName) files.has_manifest = true;
    if (entry.name == format::kDeadManifestName) files.has_dead_manifest = true;
  }
  return files;
}

Status keep_sequence_used(uring::IoBackend& io, const std::string& run_path,
                          std::uint64_t sequence) {
  if (sequence > kSequenceMax) return ok();  // No run's, so nobody would be given it.
  auto entries = io.list_directory(run_path);
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    const auto name = format::parse_checkpoint_directory_name(entry.name);
    if (name && name->sequence > sequence && name->sequence <= kSequenceMax) return ok();
  }
  return raise_sequence_floor(io, run_path, sequence);
}

Status finish_victim(uring::IoBackend& io, const std::string& run_path,
                     const std::string& victim_path, const SpoolLimits* limits) {
  if (int e = STEP_ERROR("C12 sync victim"); e != 0) {
    return os_error(concat("fsync ", victim_path), e);
  }
  auto done = io.sync_directory(victim_path);
  if (!done) return done;

  const Belongings own = Belongings::of(io, victim_path);
  Spool spool(io, run_path, limits != nullptr ? *limits : SpoolLimits{.file_count_max = 0});
  auto entries = io.list_directory(victim_path);
  if (!entries) return std::move(entries).error();
  bool has_foreign_files = false;
  for (const uring::DirectoryEntry& entry : *entries) {
    if (entry.name == format::kDeadManifestName) continue;
    if (entry.kind == uring::FileKind::kDirectory || !own.include(entry.name)) {
      has_foreign_files = true;
      continue;
    }
    const std::string path = concat(victim_path, '/', entry.name);
    if (is_part(entry.name)) {
      auto taken = spool.take_in(path);
      if (!taken) return std::move(taken).error();
      if (*taken) continue;
    }
    STEP("C13 unlink file of victim");
    done = unlink_if_there(io, path);
    if (!done) return done;
  }

  if (!has_foreign_files) {
    // The dead manifest is what lets the next start finish this, so it must outlive the others also
    // on the disk: a directory with parts and no manifest of any kind counts as damaged.
    if (int e = STEP_ERROR("C13 sync emptied victim"); e != 0) {
      return os_error(concat("fsync ", victim_path), e);
    }
    done = io.sync_directory(victim_path);
    if (!done) return done;
    STEP("C13 unlink dead manifest");
    done = unlink_if_there(io, concat(victim_path, '/', format::kDeadManifestName));
    if (!done) return done;
    STEP("C13 remove victim");
    done = io.remove_directory(victim_path);
    if (!done) return done;
  }
  done = spool.sync();
  if (!done) return done;
  if (int e = STEP_ERROR("C13 sync run directory"); e != 0) {
    return os_error(concat("fsync ", run_path), e);
  }
  return io.sync_directory(run_path);
}

Status retire(uring::IoBackend& io, const std::string& run_path, const std::string& checkpoint_path,
              const SpoolLimits& limits) {
  const std::string name_text = last_component(checkpoint_path);
  const auto name = format::parse_checkpoint_directory_name(name_text);
  if (!name) {
    return Error(Code::kInvalidArgument, concat(checkpoint_path, " is not a checkpoint's name"));
  }
  // Inside this run, whatever the caller's path went through.
  const std::string victim_path = concat(run_path, '/', name_text);
  auto status = io.status(victim_path);
  if (!status) return std::move(status).error();
  if (status->kind != uring::FileKind::kDirectory) {
    return Error(Code::kInvalidArgument,
                 concat(victim_path, " is not a directory; remove it by hand"));
  }
  auto files = look_at_victim(io, victim_path);
  if (!files) return std::move(files).error();

  auto done = keep_sequence_used(io, run_path, name->sequence);
  if (done && files->has_manifest) done = bury_manifest(io, victim_path);
  if (!done) return done;
  // What died in an earlier attempt may lie in the spool already, or in a checkpoint since: on a
  // file system that kept both names of a rename, a second trip to the spool would give those bytes
  // away.
  return finish_victim(io, run_path, victim_path, files->has_manifest ? &limits : nullptr);
}

}  // namespace stillframe::catalog
