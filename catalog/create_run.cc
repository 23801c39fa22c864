#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/hash.h"
#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/run.h"
#include "catalog/run_files.h"

namespace stillframe::catalog {

namespace {

// Makes one directory, or finds it made.
Status make_one(uring::IoBackend& io, const std::string& path) {
  STEP("create_run: make directory");
  auto made = io.make_directory(path);
  if (made || made.error().native() != EEXIST) return made;
  auto status = directory_status(io, path);
  if (!status) return std::move(status).error();
  return ok();
}

Status sync_one(uring::IoBackend& io, const std::string& path) {
  if (int e = STEP_ERROR("create_run: sync directory"); e != 0) {
    return os_error(concat("fsync ", path), e);
  }
  return io.sync_directory(path);
}

Result<std::string> read_run_id(uring::IoBackend& io, const std::string& run_path) {
  const std::string path = concat(private_path(run_path), '/', format::kRunIdName);
  auto text = read_small_file(io, path, kBlockBytes);
  if (!text) return text;
  if (text->ends_with('\n')) {
    text->pop_back();
    if (parse_hash128(*text)) return text;
  }
  return Error(Code::kDataLoss,
               concat(path, " is damaged; write the run_id of the run's manifests into it"));
}

// A new id would disown what is there.
Status check_nothing_to_disown(uring::IoBackend& io, const std::string& run_path) {
  auto entries = io.list_directory(run_path);
  if (!entries) return std::move(entries).error();
  const bool has_checkpoints =
      std::any_of(entries->begin(), entries->end(), [](const uring::DirectoryEntry& entry) {
        return format::parse_checkpoint_directory_name(entry.name).has_value();
      });
  if (!has_checkpoints) return ok();
  return Error(Code::kDataLoss, concat(run_path, " holds checkpoints, but ",
                                       format::kPrivateDirectory, '/', format::kRunIdName,
                                       " is missing; write the run_id of their manifests into it"));
}

Status check_is_run_or_empty(uring::IoBackend& io, const std::string& run_path) {
  auto entries = io.list_directory(run_path);
  if (!entries) return std::move(entries).error();
  const bool is_run = std::any_of(
      entries->begin(), entries->end(),
      [](const uring::DirectoryEntry& entry) { return entry.name == format::kPrivateDirectory; });
  if (entries->empty() || is_run) return ok();
  return Error(Code::kInvalidArgument,
               concat(run_path, " is neither empty nor a run of Stillframe: it holds ",
                      entries->front().name, "; choose another directory"));
}

// Publishes the id, unless another process was first. No lock is held yet, so the name of the
// unfinished file is our own.
Status publish_run_id(uring::IoBackend& io, const std::string& run_path,
                      const std::string& new_run_id) {
  const std::string path = concat(private_path(run_path), '/', format::kRunIdName);
  const std::string unfinished = concat(path, kUnfinishedMark, new_run_id);
  auto written = write_small_file(io, unfinished, concat(new_run_id, '\n'));
  if (!written) return written;
  STEP("create_run: name run id");
  auto renamed = io.rename(unfinished, path, uring::RenameMode::kNoReplace);
  if (renamed) return ok();
  (void)io.unlink(unfinished);
  // Somebody else's id is in place, or their recovery swept ours away, which also comes after
  // theirs.
  if (read_run_id(io, run_path)) return ok();
  return renamed;
}

}  // namespace

Status make_directories(uring::IoBackend& io, const std::string& path) {
  auto status = directory_status(io, path);
  if (status) {
    // Somebody made it, perhaps we before a crash, and perhaps its name is not yet durable. A
    // parent that we may not open cannot be synced; it is not ours then, and older than the run.
    (void)sync_one(io, parent_of(path));
    return ok();
  }
  if (status.error().code() != Code::kNotFound) return std::move(status).error();
  auto made = make_directories(io, parent_of(path));
  if (!made) return made;
  made = make_one(io, path);
  if (!made) return made;
  return sync_one(io, parent_of(path));
}

Result<std::string> create_run(uring::IoBackend& io, const std::string& run_path,
                               const std::string& new_run_id) {
  auto done = make_directories(io, run_path);
  if (done) done = check_is_run_or_empty(io, run_path);
  if (done) done = make_one(io, private_path(run_path));
  if (done) done = sync_one(io, run_path);
  if (done) done = make_one(io, spool_path(run_path));
  if (done) done = make_one(io, tags_path(run_path));
  if (!done) return std::move(done).error();

  auto run_id = read_run_id(io, run_path);
  if (!run_id && run_id.error().code() == Code::kNotFound) {
    done = check_nothing_to_disown(io, run_path);
    if (done) done = publish_run_id(io, run_path, new_run_id);
    if (!done) return std::move(done).error();
    run_id = read_run_id(io, run_path);
  }
  if (!run_id) return run_id;
  done = sync_one(io, private_path(run_path));
  if (!done) return std::move(done).error();
  auto floor = read_sequence_floor(io, run_path);
  if (!floor) return std::move(floor).error();
  return run_id;
}

}  // namespace stillframe::catalog
