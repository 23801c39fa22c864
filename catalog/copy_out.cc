#include <utility>

#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/block_reader.h"
#include "catalog/part_copy.h"
#include "catalog/records.h"
#include "catalog/run_files.h"
#include "format/manifest.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

Status copy_part(uring::IoBackend& io, const OpenPart& part, const std::string& directory,
                 Bytes staging) {
  const std::string path = concat(directory, '/', part.file_name);
  STEP("copy: create part");
  auto target = io.open(path, uring::OpenMode::kCreateDirect);
  if (!target) return std::move(target).error();
  auto done = io.allocate(*target, round_up(part.bytes, kBlockBytes));
  if (done) done = copy_range(io, part, *target, {.begin = 0, .end = part.bytes}, staging);
  if (done) done = io.truncate(*target, part.bytes);
  if (done) {
    if (int e = STEP_ERROR("copy: sync part"); e != 0) {
      done = os_error(concat("fsync ", path), e);
    } else {
      done = io.sync(*target);
    }
  }
  io.close(*target);
  return done;
}

Status copy_all(uring::IoBackend& io, const OpenCheckpoint& opened, const std::string& directory,
                Bytes staging) {
  format::Manifest manifest = opened.checkpoint().manifest;
  std::vector<std::vector<std::uint64_t>> hashes;
  for (const OpenPart& part : opened.parts()) {
    auto done = copy_part(io, part, directory, staging);
    if (!done) return done;
    hashes.push_back(part.extent_hashes);
  }
  std::vector<std::string> states;
  for (std::uint32_t rank = 0; rank < manifest.states.size(); ++rank) {
    auto state = opened.read_state(rank);
    if (!state) return std::move(state).error();
    states.push_back(*std::move(state));
  }
  // Made again from what was verified: byte for byte what lies in the checkpoint.
  return write_records(io, directory, hashes, states, manifest);
}

}  // namespace

Status copy_out(uring::IoBackend& io, const Checkpoint& checkpoint, const std::string& target_path,
                Bytes staging) {
  if (staging.size() < kReadBlockBytes) {
    return Error(Code::kInternal, concat("copying needs ", kReadBlockBytes, " bytes of staging"));
  }
  if (io.status(target_path)) {
    return Error(Code::kInvalidArgument, concat(target_path, " exists already"));
  }
  auto opened = OpenCheckpoint::open(io, checkpoint);
  if (!opened) return std::move(opened).error();

  const std::string parent = parent_of(target_path);
  const std::string partial =
      concat(parent == "/" ? "" : parent, '/', last_component(target_path), ".partial");
  STEP("copy: make directory");
  auto done = io.make_directory(partial);
  if (!done) return done;
  done = copy_all(io, *opened, partial, staging);
  if (done) {
    STEP("copy: rename to the final name");
    done = io.rename(partial, target_path, uring::RenameMode::kNoReplace);
  }
  if (!done) {
    remove_files(io, partial);
    return done;
  }
  STEP("copy: sync parent directory");
  return io.sync_directory(parent);
}

}  // namespace stillframe::catalog
