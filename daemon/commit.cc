// C6 to C10 of a save: fsync, manifest, rename, fsync of the directories. No fsync is ever tried
// twice: after a failure the next one may return 0 for pages that were dropped (DUR-2).
#include <utility>
#include <vector>

#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "daemon/save.h"
#include "format/names.h"

namespace stillframe::daemon {

namespace {

// Creates a small file with these bytes. Left open, so that its fsync can run beside the others'.
Result<uring::FileId> create_small(uring::IoBackend& io, const std::string& path,
                                   std::string_view bytes) {
  auto file = io.open(path, uring::OpenMode::kCreateBuffered);
  if (!file) return file;
  auto written = io.write_all(*file, bytes);
  if (!written) {
    io.close(*file);
    return std::move(written).error();
  }
  return file;
}

// One fsync for each file, all in flight together. The first error is final.
Status sync_all(uring::IoBackend& io, const std::vector<uring::FileId>& files) {
  std::vector<uring::IoRequest> requests(files.size());
  std::optional<Error> error;
  std::size_t next = 0;
  std::size_t done_count = 0;
  while (done_count < next || (next < files.size() && !error)) {
    while (next < files.size() && !error && io.in_flight() < io.in_flight_max()) {
      requests[next].kind = uring::IoRequest::Kind::kSync;
      requests[next].file = files[next];
      if (int e = STEP_ERROR("C6 fsync file"); e != 0) {
        error = os_error("fsync", e);
        break;
      }
      auto submitted = io.submit(requests[next]);
      if (!submitted) {
        error = std::move(submitted).error();
        break;
      }
      ++next;
    }
    if (done_count == next) break;
    for (uring::IoRequest* request : io.wait(-1)) {
      ++done_count;
      if (request->error && !error) error = std::move(request->error);
    }
  }
  if (error) return *std::move(error);
  return ok();
}

format::Manifest make_manifest(const DurableShard& shard, const SaveRequest& request) {
  format::Manifest manifest;
  manifest.run_id = request.run_id;
  manifest.sequence = request.sequence;
  manifest.previous_sequence = request.previous_sequence;
  manifest.step = request.step;
  manifest.world_size = request.world_size;
  manifest.wall_ns = request.wall_ns;
  manifest.metrics = request.metrics;
  manifest.best_rules = request.best_rules;
  manifest.stillframe_version = STILLFRAME_VERSION;
  manifest.framework = request.framework;
  manifest.python_version = request.python_version;
  manifest.has_pickle = request.has_pickle;
  manifest.parts = shard.parts();
  manifest.sums = shard.sums();
  manifest.states = {shard.state()};
  return manifest;
}

}  // namespace

Result<DurableShard> make_durable(uring::IoBackend& io, StagedShard& staged,
                                  const WrittenShard& written, const SnapshotPlan& plan,
                                  const SaveRequest& request) {
  DurableShard shard;
  std::vector<uring::FileId> files;
  for (std::size_t i = 0; i < plan.parts.size(); ++i) {
    // O_DIRECT wrote whole blocks; the file ends with the last tensor's last byte.
    STEP("C6 cut part to its length");
    auto cut = io.truncate(staged.files()[i].id, plan.parts[i].bytes);
    if (!cut) return std::move(cut).error();
    files.push_back(staged.files()[i].id);
    shard.parts_.push_back(
        {.file = format::part_file_name(plan.parts[i].name, request.rank, request.world_size),
         .bytes = plan.parts[i].bytes,
         .root = format::root_of(written.extent_hashes()[i])});
  }

  const std::string sums = format::encode_sums(written.extent_hashes());
  const std::string state_name = format::state_file_name(request.rank, request.world_size);
  shard.sums_ = format::describe_file(format::kSumsName, sums);
  shard.state_ = format::describe_file(state_name, request.state_json);

  STEP("C6 write sums and state");
  auto sums_file = create_small(io, concat(staged.directory(), '/', format::kSumsName), sums);
  if (!sums_file) return std::move(sums_file).error();
  auto state_file =
      create_small(io, concat(staged.directory(), '/', state_name), request.state_json);
  if (!state_file) {
    io.close(*sums_file);
    return std::move(state_file).error();
  }
  files.push_back(*sums_file);
  files.push_back(*state_file);
  auto synced = sync_all(io, files);
  io.close(*sums_file);
  io.close(*state_file);
  if (!synced) return std::move(synced).error();
  staged.close_parts(io);
  return shard;
}

Result<CommittedCheckpoint> commit(uring::IoBackend& io, const StagedShard& staged,
                                   const DurableShard& shard, const SaveRequest& request) {
  const std::string private_path = concat(request.run_path, '/', format::kPrivateDirectory);
  const std::string final_path = concat(
      request.run_path, '/',
      format::checkpoint_directory_name({.sequence = request.sequence, .step = request.step}));
  CommittedCheckpoint committed;
  committed.checkpoint_.path = final_path;
  committed.checkpoint_.manifest = make_manifest(shard, request);
  // Metric names and versions are the client's words; what no reader would accept is not written.
  auto checked = format::check_manifest(committed.checkpoint_.manifest);
  if (!checked) return std::move(checked).error();

  STEP("C7 write manifest");
  auto manifest = create_small(io, concat(staged.directory(), '/', format::kManifestName),
                               format::encode_manifest(committed.checkpoint_.manifest));
  if (!manifest) return std::move(manifest).error();
  STEP("C7 fsync manifest");
  auto synced = io.sync(*manifest);
  io.close(*manifest);
  if (!synced) return std::move(synced).error();

  STEP("C8 fsync temporary directory");
  synced = io.sync_directory(staged.directory());
  if (!synced) return std::move(synced).error();
  if (staged.used_spool()) {
    STEP("C8 fsync spool directory");
    synced = io.sync_directory(concat(private_path, '/', format::kSpoolDirectory));
    if (!synced) return std::move(synced).error();
  }

  STEP("C9 rename to the final name");
  auto renamed = io.rename(staged.directory(), final_path, uring::RenameMode::kNoReplace);
  if (!renamed) return std::move(renamed).error();

  // The rename is undone when its directories cannot be synced: an unpromised checkpoint must not
  // turn up beside the error that its owner was given.
  STEP("C10 fsync run directory");
  synced = io.sync_directory(request.run_path);
  if (synced) {
    STEP("C10 fsync private directory");
    synced = io.sync_directory(private_path);
  }
  if (!synced) {
    (void)io.rename(final_path, staged.directory(), uring::RenameMode::kNoReplace);
    return std::move(synced).error();
  }
  return committed;
}

}  // namespace stillframe::daemon
