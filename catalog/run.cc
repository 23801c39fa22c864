// Scans a run directory. What lies there is input, not ours by right (SEC-10): nothing is followed,
// and nothing is believed before it verifies.
#include "catalog/run.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/run_files.h"

namespace stillframe::catalog {

namespace {

Error damage(std::string message) { return Error(Code::kDataLoss, std::move(message)); }

// What stands behind a checkpoint's name. Neither: a removal under way, or already over.
struct Seen {
  std::optional<format::Manifest> manifest;
  std::optional<Error> damage;
};

// A directory without manifest.json.
Result<Seen> look_at_remains(uring::IoBackend& io, const std::string& path) {
  auto entries = io.list_directory(path);
  if (!entries && entries.error().code() == Code::kNotFound) return Seen();
  if (!entries) return std::move(entries).error();
  const bool is_victim = std::any_of(
      entries->begin(), entries->end(),
      [](const uring::DirectoryEntry& entry) { return entry.name == format::kDeadManifestName; });
  if (is_victim || entries->empty()) return Seen();
  return Seen{.manifest = std::nullopt, .damage = damage("manifest.json is missing")};
}

Result<Seen> look_at(uring::IoBackend& io, const std::string& path, format::CheckpointName name,
                     std::uint32_t owner_uid) {
  auto status = io.status(path);
  if (!status && status.error().code() == Code::kNotFound) return Seen();
  if (!status) return std::move(status).error();
  Seen seen;
  if (status->kind != uring::FileKind::kDirectory) {
    seen.damage = damage("is not a directory; it was not followed");
    return seen;
  }
  if (status->owner_uid != owner_uid) {
    seen.damage = damage(concat("belongs to user ", status->owner_uid, ", the run to ", owner_uid));
    return seen;
  }

  auto text =
      read_small_file(io, concat(path, '/', format::kManifestName), format::kManifestBytesMax);
  if (!text && text.error().code() == Code::kNotFound) return look_at_remains(io, path);
  if (!text) return std::move(text).error();
  auto manifest = format::decode_manifest(*text);
  if (!manifest && says_nothing(manifest.error())) return std::move(manifest).error();
  if (!manifest) {
    seen.damage = std::move(manifest).error();
    return seen;
  }
  if (manifest->sequence != name.sequence || manifest->step != name.step) {
    seen.damage = damage(concat("its manifest is of ",
                                format::checkpoint_directory_name(
                                    {.sequence = manifest->sequence, .step = manifest->step})));
    return seen;
  }
  seen.manifest = *std::move(manifest);
  return seen;
}

// A scan does not end at one unreadable checkpoint; but where an error says nothing about the
// checkpoint there is no answer at all.
class Scan {
 public:
  Scan(uring::IoBackend& io, const std::string& run_path) : io_(io) { contents_.path = run_path; }

  Result<RunContents> all() {
    auto run_status = directory_status(io_, contents_.path);
    if (!run_status && run_status.error().code() == Code::kNotFound) return std::move(contents_);
    if (!run_status) return std::move(run_status).error();
    auto private_status = io_.status(private_path(contents_.path));
    const bool is_run = private_status && private_status->kind == uring::FileKind::kDirectory;
    owner_uid_ = is_run ? private_status->owner_uid : run_status->owner_uid;

    auto done = is_run ? ok() : read_alone();
    if (done) done = read_checkpoints();
    if (done && is_run) done = read_private();
    if (!done) return std::move(done).error();
    settle_identity();
    contents_.next_sequence = highest_ + (highest_ < UINT64_MAX ? 1 : 0);
    return std::move(contents_);
  }

 private:
  // A directory that is no run but itself a checkpoint: a whole model, or a copy.
  Status read_alone() {
    auto text = read_small_file(io_, concat(contents_.path, '/', format::kManifestName),
                                format::kManifestBytesMax);
    if (!text && text.error().code() == Code::kNotFound) return ok();
    if (!text && says_nothing(text.error())) return std::move(text).error();
    auto manifest = text ? format::decode_manifest(*text) : std::move(text).error();
    if (!manifest && says_nothing(manifest.error())) return std::move(manifest).error();
    if (!manifest) {
      add_damaged(contents_.path, {}, std::move(manifest).error());
      return ok();
    }
    highest_ = manifest->sequence;
    contents_.checkpoints.push_back(
        {.path = contents_.path, .manifest = *std::move(manifest), .tags = {}});
    return ok();
  }

  Status read_checkpoints() {
    auto entries = io_.list_directory(contents_.path);
    if (!entries) return std::move(entries).error();
    for (const uring::DirectoryEntry& entry : *entries) {
      const auto name = format::parse_checkpoint_directory_name(entry.name);
      if (!name) continue;
      std::string path = concat(contents_.path, '/', entry.name);
      auto seen = look_at(io_, path, *name, owner_uid_);
      if (!seen) {
        if (says_nothing(seen.error())) return std::move(seen).error();
        seen = Seen{.manifest = std::nullopt, .damage = std::move(seen).error()};
      }
      if (seen->manifest) {
        highest_ = std::max(highest_, name->sequence);
        contents_.checkpoints.push_back(
            {.path = std::move(path), .manifest = *std::move(seen->manifest), .tags = {}});
        continue;
      }
      note(name->sequence);
      if (seen->damage) add_damaged(std::move(path), *name, *std::move(seen->damage));
    }
    std::sort(contents_.checkpoints.begin(), contents_.checkpoints.end(),
              [](const Checkpoint& a, const Checkpoint& b) {
                return std::pair(a.manifest.sequence, a.manifest.step) <
                       std::pair(b.manifest.sequence, b.manifest.step);
              });
    return ok();
  }

  Status read_private() {
    auto entries = io_.list_directory(private_path(contents_.path));
    if (!entries) return std::move(entries).error();
    for (const uring::DirectoryEntry& entry : *entries) {
      const auto name = format::parse_temporary_directory_name(entry.name);
      if (name) note(name->sequence);
    }
    // Readers go on without the floor; create_run() stops writers when it is damaged.
    if (auto floor = read_sequence_floor(io_, contents_.path); floor) note(*floor);

    auto run_id = read_small_file(
        io_, concat(private_path(contents_.path), '/', format::kRunIdName), kBlockBytes);
    if (!run_id && says_nothing(run_id.error())) return std::move(run_id).error();
    if (run_id && run_id->ends_with('\n')) {
      run_id->pop_back();
      if (parse_hash128(*run_id)) contents_.run_id = *std::move(run_id);
    }
    return read_tags();
  }

  Status read_tags() {
    auto entries = io_.list_directory(tags_path(contents_.path));
    if (!entries && entries.error().code() == Code::kNotFound) return ok();
    if (!entries) return std::move(entries).error();
    for (const uring::DirectoryEntry& entry : *entries) {
      if (!format::check_tag(entry.name)) continue;
      auto text =
          read_small_file(io_, concat(tags_path(contents_.path), '/', entry.name), kBlockBytes);
      if (!text && says_nothing(text.error())) return std::move(text).error();
      if (!text && text.error().code() == Code::kNotFound) continue;
      const auto sequence = text ? parse_sequence_text(*text) : std::nullopt;
      if (!sequence) {
        contents_.damaged_tags.push_back(entry.name);
        continue;
      }
      note(*sequence);
      for (Checkpoint& checkpoint : contents_.checkpoints) {
        if (checkpoint.manifest.sequence == *sequence) checkpoint.tags.push_back(entry.name);
      }
      for (DamagedCheckpoint& damaged : contents_.damaged) {
        if (damaged.name.sequence == *sequence) damaged.tags.push_back(entry.name);
      }
    }
    for (Checkpoint& checkpoint : contents_.checkpoints) {
      std::sort(checkpoint.tags.begin(), checkpoint.tags.end());
    }
    return ok();
  }

  // Parts of one run must never be taken for another's (RES-2).
  void settle_identity() {
    std::vector<Checkpoint>& all = contents_.checkpoints;
    if (contents_.run_id.empty() && !all.empty()) contents_.run_id = all.back().manifest.run_id;
    const auto is_foreign = [this](const Checkpoint& checkpoint) {
      return checkpoint.manifest.run_id != contents_.run_id;
    };
    for (Checkpoint& checkpoint : all) {
      if (!is_foreign(checkpoint)) continue;
      add_damaged(checkpoint.path,
                  {.sequence = checkpoint.manifest.sequence, .step = checkpoint.manifest.step},
                  damage(concat("belongs to run ", checkpoint.manifest.run_id, ", this is run ",
                                contents_.run_id)));
      contents_.damaged.back().tags = std::move(checkpoint.tags);
    }
    std::erase_if(all, is_foreign);
    std::sort(contents_.damaged.begin(), contents_.damaged.end(),
              [](const DamagedCheckpoint& a, const DamagedCheckpoint& b) {
                return std::pair(a.name.sequence, a.name.step) <
                       std::pair(b.name.sequence, b.name.step);
              });
  }

  void add_damaged(std::string path, format::CheckpointName name, Error reason) {
    contents_.damaged.push_back(
        {.path = std::move(path), .name = name, .reason = std::move(reason), .tags = {}});
  }

  void note(std::uint64_t sequence) {
    if (sequence <= kSequenceMax) highest_ = std::max(highest_, sequence);
  }

  uring::IoBackend& io_;
  RunContents contents_;
  std::uint32_t owner_uid_ = 0;
  std::uint64_t highest_ = 0;
};

}  // namespace

Result<RunContents> read_run(uring::IoBackend& io, const std::string& run_path) {
  return Scan(io, run_path).all();
}

}  // namespace stillframe::catalog
