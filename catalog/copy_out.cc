#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/hash.h"
#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/block_reader.h"
#include "catalog/run_files.h"
#include "format/manifest.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

// One block of a part on its way: read, checked, written.
struct Lane {
  uring::IoRequest request;
  Bytes memory;
  std::uint64_t offset = 0;
  std::size_t bytes = 0;  // Of the part, without padding.
};

Status check_block(const OpenPart& part, const Lane& lane) {
  if (lane.request.moved_bytes < lane.bytes) {
    return Error(Code::kDataLoss, concat(part.file_name, ": ends early, at ",
                                         lane.offset + lane.request.moved_bytes));
  }
  for (std::size_t done = 0; done < lane.bytes; done += kExtentBytes) {
    const std::size_t bytes = std::min(kExtentBytes, lane.bytes - done);
    const std::uint64_t extent = (lane.offset + done) / kExtentBytes;
    if (hash_extent(lane.memory.subspan(done, bytes)) == part.extent_hashes[extent]) continue;
    return Error(Code::kDataLoss, concat(part.file_name, " extent ", extent, " (offset ",
                                         lane.offset + done, ", ", bytes, " bytes): hash differs"));
  }
  return ok();
}

// Copies one part, several blocks in flight, each as fast as its own read and write.
class PartCopy {
 public:
  PartCopy(uring::IoBackend& io, const OpenPart& part, uring::FileId target, Bytes staging)
      : io_(io), part_(part), target_(target) {
    lane_count_ = std::min(kReadDepth, staging.size() / kReadBlockBytes);
    for (std::size_t i = 0; i < lane_count_; ++i) {
      lanes_[i].memory = staging.subspan(i * kReadBlockBytes, kReadBlockBytes);
      lanes_[i].request.tag = i;
    }
  }

  Status run() {
    for (std::size_t i = 0; i < lane_count_; ++i) start_read(lanes_[i]);
    while (in_flight_count_ > 0) {
      for (uring::IoRequest* request : io_.wait(-1)) {
        --in_flight_count_;
        if (request->error) fail(*std::move(request->error));
        if (error_) continue;
        Lane& lane = lanes_[request->tag];
        if (request->kind == uring::IoRequest::Kind::kRead) {
          start_write(lane);
        } else {
          start_read(lane);
        }
      }
    }
    if (error_) return *std::move(error_);
    return ok();
  }

 private:
  void start_read(Lane& lane) {
    if (error_ || next_offset_ >= part_.bytes) return;
    lane.offset = next_offset_;
    lane.bytes = std::min<std::uint64_t>(kReadBlockBytes, part_.bytes - lane.offset);
    next_offset_ += lane.bytes;
    lane.request.kind = uring::IoRequest::Kind::kRead;
    lane.request.file = part_.file;
    submit(lane);
  }

  void start_write(Lane& lane) {
    if (auto checked = check_block(part_, lane); !checked) return fail(std::move(checked).error());
    // The padding is cut off again, but must not carry old memory to the disk meanwhile (SEC-8).
    const std::size_t padded_bytes = round_up(lane.bytes, kBlockBytes);
    std::memset(lane.memory.data() + lane.bytes, 0, padded_bytes - lane.bytes);
    lane.request.kind = uring::IoRequest::Kind::kWrite;
    lane.request.file = target_;
    submit(lane);
  }

  void submit(Lane& lane) {
    lane.request.data = lane.memory.data();
    lane.request.bytes = round_up(lane.bytes, kBlockBytes);
    lane.request.offset = lane.offset;
    lane.request.moved_bytes = 0;
    lane.request.error.reset();
    auto submitted = io_.submit(lane.request);
    if (!submitted) return fail(std::move(submitted).error());
    ++in_flight_count_;
  }

  void fail(Error error) {
    if (!error_) error_ = std::move(error);
  }

  uring::IoBackend& io_;
  const OpenPart& part_;
  uring::FileId target_;
  std::array<Lane, kReadDepth> lanes_;
  std::size_t lane_count_ = 0;
  std::uint64_t next_offset_ = 0;
  std::size_t in_flight_count_ = 0;
  std::optional<Error> error_;
};

Status copy_part(uring::IoBackend& io, const OpenPart& part, const std::string& directory,
                 Bytes staging) {
  const std::string path = concat(directory, '/', part.file_name);
  STEP("copy: create part");
  auto target = io.open(path, uring::OpenMode::kCreateDirect);
  if (!target) return std::move(target).error();
  auto done = io.allocate(*target, round_up(part.bytes, kBlockBytes));
  if (done) done = PartCopy(io, part, *target, staging).run();
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
  const format::Manifest& manifest = opened.checkpoint().manifest;
  std::vector<std::vector<std::uint64_t>> hashes;
  for (const OpenPart& part : opened.parts()) {
    auto done = copy_part(io, part, directory, staging);
    if (!done) return done;
    hashes.push_back(part.extent_hashes);
  }
  for (std::uint32_t rank = 0; rank < manifest.states.size(); ++rank) {
    auto state = opened.read_state(rank);
    if (!state) return std::move(state).error();
    auto done = write_small_file(
        io, concat(directory, '/', format::state_file_name(rank, manifest.world_size)), *state);
    if (!done) return done;
  }
  // Made again from what was verified: byte for byte what lies in the checkpoint.
  auto done =
      write_small_file(io, concat(directory, '/', format::kSumsName), format::encode_sums(hashes));
  if (!done) return done;
  done = write_small_file(io, concat(directory, '/', format::kManifestName),
                          format::encode_manifest(manifest));
  if (!done) return done;
  STEP("copy: sync directory");
  return io.sync_directory(directory);
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
