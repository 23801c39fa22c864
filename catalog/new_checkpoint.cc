#include "catalog/new_checkpoint.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/hash.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/change.h"
#include "catalog/records.h"
#include "catalog/run_files.h"
#include "format/manifest.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

// What stays free beside it: manifests, directories and the file system's own needs.
constexpr std::uint64_t kReserveBytes = std::uint64_t{16} << 20;
constexpr std::size_t kWriteDepth = 2;  // One block is filled while the other is written.

// Writes one part from its first byte to its last, hashing each extent on the way.
class PartWriter {
 public:
  PartWriter(uring::IoBackend& io, std::size_t part_index, const format::PartImage& image,
             uring::FileId file, const FillTensor& fill, Bytes staging, const Progress& progress)
      : io_(io),
        part_index_(part_index),
        image_(image),
        file_(file),
        fill_(fill),
        staging_(staging),
        progress_(progress) {}

  // The hashes of its extents.
  Result<std::vector<std::uint64_t>> run() {
    for (std::uint64_t offset = 0; offset < image_.bytes && !error_; offset += kReadBlockBytes) {
      const std::size_t lane = (offset / kReadBlockBytes) % kWriteDepth;
      while (is_busy_[lane]) wait();
      if (!error_) write_block(lane, offset);
    }
    while (is_busy_[0] || is_busy_[1]) wait();
    if (error_) return *std::move(error_);
    return std::move(hashes_);
  }

 private:
  void write_block(std::size_t lane, std::uint64_t offset) {
    const Bytes memory = staging_.subspan(lane * kReadBlockBytes, kReadBlockBytes);
    const std::size_t bytes = std::min<std::uint64_t>(kReadBlockBytes, image_.bytes - offset);
    auto filled = fill_block(memory.first(bytes), offset);
    if (!filled) {
      error_ = std::move(filled).error();
      return;
    }
    const std::size_t padded = round_up(bytes, kBlockBytes);
    std::memset(memory.data() + bytes, 0, padded - bytes);
    for (std::size_t done = 0; done < bytes; done += kExtentBytes) {
      hashes_.push_back(hash_extent(memory.subspan(done, std::min(kExtentBytes, bytes - done))));
    }
    uring::IoRequest& request = requests_[lane];
    request = {};
    request.kind = uring::IoRequest::Kind::kWrite;
    request.file = file_;
    request.data = memory.data();
    request.bytes = padded;
    request.offset = offset;
    request.tag = lane;
    if (auto submitted = io_.submit(request); !submitted) {
      error_ = std::move(submitted).error();
      return;
    }
    is_busy_[lane] = true;
  }

  // The image from `offset` on: its header, then the tensors that lie there.
  Status fill_block(Bytes target, std::uint64_t offset) {
    const std::uint64_t end = offset + target.size();
    if (offset < image_.header.size()) {
      const std::size_t bytes =
          std::min<std::uint64_t>(target.size(), image_.header.size() - offset);
      std::memcpy(target.data(), image_.header.data() + offset, bytes);
    }
    while (next_tensor_ < image_.tensors.size()) {
      const format::PlacedTensor& tensor = image_.tensors[next_tensor_];
      const std::uint64_t tensor_end = tensor.offset + tensor.bytes;
      const std::uint64_t first = std::max(tensor.offset, offset);
      const std::uint64_t last = std::min(tensor_end, end);
      if (first < last) {
        const TensorSlice slice{
            .part = part_index_, .tensor = tensor.spec.name, .offset = first - tensor.offset};
        auto filled = fill_(slice, target.subspan(first - offset, last - first));
        if (!filled) return filled;
      }
      if (tensor_end > end) break;
      ++next_tensor_;
    }
    return ok();
  }

  void wait() {
    for (uring::IoRequest* request : io_.wait(-1)) {
      is_busy_[request->tag] = false;
      if (request->error && !error_) error_ = std::move(request->error);
      if (progress_) progress_(request->bytes);
    }
  }

  uring::IoBackend& io_;
  std::size_t part_index_;
  const format::PartImage& image_;
  uring::FileId file_;
  const FillTensor& fill_;
  Bytes staging_;
  const Progress& progress_;
  std::array<uring::IoRequest, kWriteDepth> requests_;
  std::array<bool, kWriteDepth> is_busy_ = {};
  std::size_t next_tensor_ = 0;
  std::vector<std::uint64_t> hashes_;
  std::optional<Error> error_;
};

// C3 to C6 of one part.
Result<std::vector<std::uint64_t>> write_part(uring::IoBackend& io, const std::string& path,
                                              PartWriter& writer, uring::FileId file,
                                              const format::PartImage& image) {
  auto allocated = io.allocate(file, round_up(image.bytes, kBlockBytes));
  if (!allocated) return std::move(allocated).error();
  auto hashes = writer.run();
  if (!hashes) return hashes;
  auto done = io.truncate(file, image.bytes);
  STEP("new checkpoint: fsync part");
  if (done) done = io.sync(file);
  if (!done) return Error(done.error().code(), concat(path, ": ", done.error().message()));
  return hashes;
}

format::Manifest begin_manifest(const RunContents& run, const std::string& run_id,
                                const NewCheckpoint& wanted) {
  format::Manifest manifest;
  manifest.run_id = run_id;
  manifest.sequence = run.next_sequence;
  if (const Checkpoint* newest = run.newest()) {
    manifest.previous_sequence = newest->manifest.sequence;
    manifest.best_rules = newest->manifest.best_rules;
  }
  manifest.step = wanted.step;
  manifest.wall_ns = wanted.wall_ns;
  manifest.metrics = wanted.metrics;
  manifest.stillframe_version = STILLFRAME_VERSION;
  manifest.framework = wanted.framework;
  manifest.python_version = wanted.python_version;
  return manifest;
}

Status admit(uring::IoBackend& io, const std::string& run_path, std::uint64_t bytes) {
  auto space = io.space(run_path);
  if (!space) return std::move(space).error();
  if (space->free_bytes >= bytes + kReserveBytes) return ok();
  return Error(Code::kResourceExhausted,
               concat("disk full: the checkpoint needs ", bytes + kReserveBytes,
                      " bytes with reserve, ", space->free_bytes, " are free in ", run_path));
}

Result<std::vector<format::PartImage>> place_all(const NewCheckpoint& wanted) {
  std::vector<format::PartImage> images;
  for (const format::PartSpec& part : wanted.parts) {
    auto image = format::place(part);
    if (!image) return std::move(image).error();
    images.push_back(*std::move(image));
  }
  return images;
}

// C3 to C8: everything in the temporary directory, durable.
Status write_all(uring::IoBackend& io, const std::string& directory, const NewCheckpoint& wanted,
                 const std::vector<format::PartImage>& images, const FillTensor& fill,
                 Bytes staging, const Progress& progress, format::Manifest& manifest) {
  std::vector<std::vector<std::uint64_t>> hashes;
  for (std::size_t i = 0; i < images.size(); ++i) {
    const std::string file_name = format::part_file_name(images[i].name, 0, 1);
    const std::string path = concat(directory, '/', file_name);
    STEP("new checkpoint: create part");
    auto file = io.open(path, uring::OpenMode::kCreateDirect);
    if (!file) return std::move(file).error();
    PartWriter writer(io, i, images[i], *file, fill, staging, progress);
    auto written = write_part(io, path, writer, *file, images[i]);
    io.close(*file);
    if (!written) return std::move(written).error();
    manifest.parts.push_back(
        {.file = file_name, .bytes = images[i].bytes, .root = format::root_of(*written)});
    hashes.push_back(*std::move(written));
  }
  return write_records(io, directory, hashes, {&wanted.state_json, 1}, manifest);
}

}  // namespace

Status check_new_checkpoint(const NewCheckpoint& wanted) {
  if (wanted.state_json.size() > format::kStateBytesMax) {
    return Error(Code::kInvalidArgument,
                 concat("what is not a tensor has ", wanted.state_json.size(), " bytes, at most ",
                        format::kStateBytesMax));
  }
  auto images = place_all(wanted);
  if (!images) return std::move(images).error();
  // With stand-ins for what only the run and the bytes can tell.
  format::Manifest manifest = begin_manifest({}, std::string(32, '0'), wanted);
  for (const format::PartImage& image : *images) {
    manifest.parts.push_back(
        {.file = format::part_file_name(image.name, 0, 1), .bytes = image.bytes, .root = {}});
    manifest.sums.bytes += 8 * format::extent_count(image.bytes);
  }
  manifest.sums.file = std::string(format::kSumsName);
  manifest.states = {
      {.file = format::state_file_name(0, 1), .bytes = wanted.state_json.size(), .hash = {}}};
  return format::check_manifest(manifest);
}

Result<Checkpoint> commit_new_checkpoint(uring::IoBackend& io, const std::string& run_path,
                                         std::uint64_t nonce, const NewCheckpoint& wanted,
                                         const FillTensor& fill, Bytes staging,
                                         const Progress& progress) {
  check(staging.size() >= kWriteDepth * kReadBlockBytes, "a new checkpoint has its staging");
  auto images = place_all(wanted);
  if (!images) return std::move(images).error();
  auto run = read_run(io, run_path);
  if (!run) return std::move(run).error();
  std::uint64_t bytes = wanted.state_json.size();
  for (const format::PartImage& image : *images) bytes += image.bytes;
  auto done = admit(io, run_path, bytes);
  if (!done) return std::move(done).error();

  Checkpoint made;
  made.manifest = begin_manifest(*run, run->run_id, wanted);
  const std::uint64_t sequence = made.manifest.sequence;
  made.path =
      concat(run_path, '/',
             format::checkpoint_directory_name({.sequence = sequence, .step = wanted.step}));
  const std::string directory =
      concat(private_path(run_path), '/',
             format::temporary_directory_name({.sequence = sequence, .nonce = nonce}));
  STEP("new checkpoint: make temporary directory");
  done = io.make_directory(directory);
  if (!done) return std::move(done).error();
  done = write_all(io, directory, wanted, *images, fill, staging, progress, made.manifest);
  if (done) {
    STEP("new checkpoint: rename to the final name");
    done = io.rename(directory, made.path, uring::RenameMode::kNoReplace);
  }
  if (done) {
    STEP("new checkpoint: fsync run directory");
    done = io.sync_directory(run_path);
    if (done) done = io.sync_directory(private_path(run_path));
    // As at a save: what was not promised must not turn up beside the error.
    if (!done) (void)io.rename(made.path, directory, uring::RenameMode::kNoReplace);
  }
  if (!done) {
    remove_files(io, directory);
    return std::move(done).error();
  }
  return made;
}

}  // namespace stillframe::catalog
