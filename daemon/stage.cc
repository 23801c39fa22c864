// C1 to C3 of a save: room on the disk, a temporary directory, every part's file in full length.
#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/change.h"
#include "catalog/run_files.h"
#include "daemon/save.h"
#include "format/names.h"

namespace stillframe::daemon {

namespace {

// What stays free after a save: manifests, directories and the file system's own needs.
constexpr std::uint64_t kReserveBytes = std::uint64_t{16} << 20;

Status admit(uring::IoBackend& io, const SnapshotPlan& plan, const SaveRequest& request) {
  const std::uint64_t needed_bytes = plan.bytes + request.state_json.size() + kReserveBytes;
  auto space = io.space(request.run_path);
  if (!space) return std::move(space).error();
  if (space->free_bytes >= needed_bytes) return ok();
  // Spool files are taken at full length or not at all, so their room may count twice or never;
  // with a disk this full they are worth more as free space.
  auto freed = catalog::empty_spool(io, request.run_path);
  if (!freed) return std::move(freed).error();
  space = io.space(request.run_path);
  if (!space) return std::move(space).error();
  if (space->free_bytes >= needed_bytes) return ok();
  return Error(Code::kResourceExhausted,
               concat("disk full: a checkpoint needs ", needed_bytes, " bytes with reserve, ",
                      space->free_bytes, " are free in ", request.run_path,
                      "; remove checkpoints (stillframe rm) or lower keep_last"));
}

Result<uring::FileId> create_file(uring::IoBackend& io, const std::string& path,
                                  std::uint64_t bytes) {
  STEP("C3 create part");
  auto file = io.open(path, uring::OpenMode::kCreateDirect);
  if (!file) return file;
  if (int e = STEP_ERROR("C3 allocate part"); e != 0) {
    io.close(*file);
    return os_error(concat("allocate ", path), e);
  }
  auto allocated = io.allocate(*file, bytes);
  if (!allocated) {
    io.close(*file);
    return std::move(allocated).error();
  }
  return file;
}

Result<std::optional<uring::FileId>> recycle_file(uring::IoBackend& io, const SaveRequest& request,
                                                  const std::string& path, std::uint64_t bytes) {
  auto recycled = catalog::take_from_spool(io, request.run_path, bytes, path);
  if (!recycled || !*recycled) return recycled;
  STEP("C3 allocate recycled part");
  auto allocated = io.allocate(**recycled, bytes);
  if (!allocated) {
    io.close(**recycled);
    return std::move(allocated).error();
  }
  return recycled;
}

}  // namespace

Result<StagedShard> stage(uring::IoBackend& io, const SnapshotPlan& plan,
                          const SaveRequest& request) {
  STEP("C1 admit");
  auto admitted = admit(io, plan, request);
  if (!admitted) return std::move(admitted).error();

  StagedShard staged;
  staged.directory_ = concat(request.run_path, '/', format::kPrivateDirectory, '/',
                             format::temporary_directory_name(
                                 {.sequence = request.sequence, .nonce = request.instance_nonce}));
  STEP("C2 make temporary directory");
  auto made = io.make_directory(staged.directory_);
  if (!made) return std::move(made).error();

  for (const format::PartImage& part : plan.parts) {
    std::string path = concat(staged.directory_, '/',
                              format::part_file_name(part.name, request.rank, request.world_size));
    // Whole blocks for O_DIRECT; cut to the exact length before the fsync.
    const std::uint64_t bytes = round_up(part.bytes, kBlockBytes);
    auto recycled = recycle_file(io, request, path, bytes);
    if (!recycled) {
      discard(io, std::move(staged));
      return std::move(recycled).error();
    }
    if (*recycled) {
      staged.used_spool_ = true;
      staged.files_.push_back({.id = **recycled, .path = std::move(path)});
      continue;
    }
    auto created = create_file(io, path, bytes);
    if (!created) {
      discard(io, std::move(staged));
      return std::move(created).error();
    }
    staged.files_.push_back({.id = *created, .path = std::move(path)});
  }
  return staged;
}

void discard(uring::IoBackend& io, StagedShard staged) {
  staged.close_parts(io);
  // What cannot be removed now is swept by the next start (C14).
  catalog::remove_files(io, staged.directory_);
}

}  // namespace stillframe::daemon
