#include <algorithm>
#include <utility>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/read_now.h"
#include "catalog/run_files.h"
#include "format/manifest.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

Error damage(std::string message) { return Error(Code::kDataLoss, std::move(message)); }

// What is absent or of the wrong kind where the manifest promises a file is damage; the rest is
// not.
Error as_damage(const std::string& file, Error error) {
  if (error.code() != Code::kNotFound && error.code() != Code::kInvalidArgument) return error;
  return Error(Code::kDataLoss, concat(file, ": ", error.message()), error.native());
}

// The size is compared before anything is read, so a huge sparse file costs nothing (SEC-10).
Status check_size(uring::IoBackend& io, uring::FileId file, const std::string& name,
                  std::uint64_t bytes) {
  auto status = io.file_status(file);
  if (!status) return std::move(status).error();
  if (status->bytes == bytes) return ok();
  return damage(concat(name, ": has ", status->bytes, " bytes, the manifest says ", bytes));
}

Result<std::string> read_listed_file(uring::IoBackend& io, const std::string& directory,
                                     const format::ManifestFile& listed) {
  auto file = io.open(concat(directory, '/', listed.file), uring::OpenMode::kReadBuffered);
  if (!file) return as_damage(listed.file, std::move(file).error());
  Result<std::string> bytes = std::string();
  if (auto checked = check_size(io, *file, listed.file, listed.bytes); !checked) {
    bytes = std::move(checked).error();
  } else {
    bytes = io.read_all(*file, listed.bytes);
  }
  io.close(*file);
  if (!bytes) return bytes;
  if (bytes->size() != listed.bytes || hash128(*bytes) != listed.hash) {
    return damage(concat(listed.file, ": hash differs"));
  }
  return bytes;
}

Result<std::vector<std::vector<std::uint64_t>>> read_sums(uring::IoBackend& io,
                                                          const Checkpoint& checkpoint) {
  auto sums = read_listed_file(io, checkpoint.path, checkpoint.manifest.sums);
  if (!sums) return std::move(sums).error();
  return format::decode_sums(checkpoint.manifest, *sums);
}

// Reads extents `first` to `end` into their places in `head` and checks each before it is believed.
Status read_head(uring::IoBackend& io, const OpenPart& part, std::uint64_t first, std::uint64_t end,
                 Bytes head) {
  for (std::uint64_t extent = first; extent < end; ++extent) {
    const std::uint64_t offset = extent * kExtentBytes;
    const std::size_t bytes = std::min<std::uint64_t>(kExtentBytes, part.bytes - offset);
    const Bytes target = head.subspan(offset, round_up(bytes, kBlockBytes));
    auto read = read_now(io, part, offset, target, bytes);
    if (!read) return read;
    if (hash_extent(target.first(bytes)) != part.extent_hashes[extent]) {
      return damage(concat(part.file_name, " extent ", extent, " (offset ", offset, ", ", bytes,
                           " bytes): hash differs"));
    }
  }
  return ok();
}

Status read_image(uring::IoBackend& io, const std::string& part_name, OpenPart& part) {
  if (part.bytes == 0) return damage(concat(part.file_name, ": is empty"));
  auto first = allocate_aligned(std::min<std::uint64_t>(part.bytes, kExtentBytes));
  if (!first) return std::move(first).error();
  auto read = read_head(io, part, 0, 1, first->bytes());
  if (!read) return read;
  auto header_bytes = format::header_bytes(first->bytes(), part.bytes);
  if (!header_bytes && says_nothing(header_bytes.error())) return std::move(header_bytes).error();
  if (!header_bytes) {
    return damage(concat(part.file_name, ": ", header_bytes.error().message()));
  }

  Mapping whole = *std::move(first);
  const std::uint64_t head_bytes = std::min(round_up(*header_bytes, kExtentBytes), part.bytes);
  if (*header_bytes > kExtentBytes) {
    auto larger = allocate_aligned(head_bytes);
    if (!larger) return std::move(larger).error();
    whole = *std::move(larger);
    read = read_head(io, part, 0, format::extent_count(head_bytes), whole.bytes());
    if (!read) return read;
  }
  auto image = format::decode_part(
      part_name, whole.bytes().first(std::min<std::uint64_t>(head_bytes, whole.bytes().size())),
      part.bytes);
  if (!image && says_nothing(image.error())) return std::move(image).error();
  if (!image) return damage(concat(part.file_name, ": ", image.error().message()));
  part.image = *std::move(image);
  return ok();
}

Result<OpenPart> open_part(uring::IoBackend& io, const Checkpoint& checkpoint,
                           const format::ManifestPart& listed) {
  auto file = io.open(concat(checkpoint.path, '/', listed.file), uring::OpenMode::kReadDirect);
  if (!file) return as_damage(listed.file, std::move(file).error());
  auto checked = check_size(io, *file, listed.file, listed.bytes);
  if (!checked) {
    io.close(*file);
    return std::move(checked).error();
  }
  return OpenPart{.file = *file,
                  .file_name = listed.file,
                  .bytes = listed.bytes,
                  .image = {},
                  .extent_hashes = {}};
}

}  // namespace

Status read_now(uring::IoBackend& io, const OpenPart& part, std::uint64_t offset, Bytes target,
                std::size_t wanted_bytes) {
  uring::IoRequest request;
  request.kind = uring::IoRequest::Kind::kRead;
  request.file = part.file;
  request.data = target.data();
  request.bytes = round_up(wanted_bytes, kBlockBytes);
  request.offset = offset;
  auto submitted = io.submit(request);
  if (!submitted) return submitted;
  while (io.wait(-1).empty()) {
  }
  if (request.error) return *std::move(request.error);
  if (request.moved_bytes < wanted_bytes) {
    return damage(concat(part.file_name, ": ends early, at ", offset + request.moved_bytes));
  }
  return ok();
}

OpenCheckpoint::OpenCheckpoint(uring::IoBackend& io, Checkpoint checkpoint)
    : io_(&io), checkpoint_(std::move(checkpoint)) {}

OpenCheckpoint::OpenCheckpoint(OpenCheckpoint&& other) noexcept
    : io_(other.io_),
      checkpoint_(std::move(other.checkpoint_)),
      parts_(std::exchange(other.parts_, {})) {}

OpenCheckpoint& OpenCheckpoint::operator=(OpenCheckpoint&& other) noexcept {
  OpenCheckpoint taken(std::move(other));
  std::swap(io_, taken.io_);
  std::swap(checkpoint_, taken.checkpoint_);
  std::swap(parts_, taken.parts_);
  return *this;
}

OpenCheckpoint::~OpenCheckpoint() {
  for (const OpenPart& part : parts_) io_->close(part.file);
}

Result<OpenCheckpoint> OpenCheckpoint::open(uring::IoBackend& io, const Checkpoint& checkpoint) {
  auto sums = read_sums(io, checkpoint);
  if (!sums) return std::move(sums).error();
  OpenCheckpoint opened(io, checkpoint);
  const format::Manifest& manifest = checkpoint.manifest;
  for (std::size_t i = 0; i < manifest.parts.size(); ++i) {
    const auto name = format::parse_part_file_name(manifest.parts[i].file, manifest.world_size);
    if (!name) return damage(concat(manifest.parts[i].file, ": is not the name of a part"));
    auto part = open_part(io, checkpoint, manifest.parts[i]);
    if (!part) return std::move(part).error();
    opened.parts_.push_back(*std::move(part));
    opened.parts_.back().extent_hashes = std::move((*sums)[i]);
    auto read = read_image(io, name->part, opened.parts_.back());
    if (!read) return std::move(read).error();
  }
  return opened;
}

Result<OpenCheckpoint> OpenCheckpoint::open_damaged(uring::IoBackend& io,
                                                    const Checkpoint& checkpoint,
                                                    std::vector<std::string>& damage) {
  auto sums = read_sums(io, checkpoint);
  if (!sums && sums.error().code() != Code::kDataLoss) return std::move(sums).error();
  if (!sums) damage.emplace_back(sums.error().message());

  OpenCheckpoint opened(io, checkpoint);
  for (std::size_t i = 0; i < checkpoint.manifest.parts.size(); ++i) {
    auto part = open_part(io, checkpoint, checkpoint.manifest.parts[i]);
    if (!part && part.error().code() != Code::kDataLoss) return std::move(part).error();
    if (!part) {
      damage.emplace_back(part.error().message());
      continue;
    }
    opened.parts_.push_back(*std::move(part));
    if (sums) opened.parts_.back().extent_hashes = std::move((*sums)[i]);
  }
  return opened;
}

Result<std::string> OpenCheckpoint::read_state(std::uint32_t rank) const {
  const std::string name = format::state_file_name(rank, checkpoint_.manifest.world_size);
  // With one rank every rank's file would have the same name.
  const bool is_rank = rank < checkpoint_.manifest.world_size;
  for (const format::ManifestFile& state : checkpoint_.manifest.states) {
    if (is_rank && state.file == name) return read_listed_file(*io_, checkpoint_.path, state);
  }
  return Error(Code::kNotFound, concat(checkpoint_.path, " has no state of rank ", rank));
}

}  // namespace stillframe::catalog
