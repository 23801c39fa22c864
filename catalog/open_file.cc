// A safetensors file that stands alone, opened as a checkpoint of one part.
#include <algorithm>
#include <utility>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/read_now.h"
#include "catalog/run_files.h"
#include "format/file_hashes.h"
#include "format/manifest.h"

namespace stillframe::catalog {

namespace {

constexpr std::string_view kPartName = "file";

Error damage(const std::string& file_name, std::string_view why) {
  return Error(Code::kDataLoss, concat(file_name, ": ", why));
}

// Whole extents from the file's first byte to where its header ends, or to the end of the file.
struct Head {
  Mapping memory;
  std::uint64_t bytes = 0;

  Bytes all() const { return memory.bytes().first(bytes); }
  Bytes extent(std::uint64_t index) const {
    const std::uint64_t begin = index * kExtentBytes;
    return all().subspan(begin, std::min<std::uint64_t>(kExtentBytes, bytes - begin));
  }
};

Result<Head> read_head_of(uring::IoBackend& io, const OpenPart& part, std::uint64_t wanted_bytes) {
  Head head;
  head.bytes = std::min(round_up(wanted_bytes, kExtentBytes), part.bytes);
  auto memory = allocate_aligned(head.bytes);
  if (!memory) return std::move(memory).error();
  head.memory = *std::move(memory);
  for (std::uint64_t done = 0; done < head.bytes; done += kExtentBytes) {
    const std::uint64_t bytes = std::min<std::uint64_t>(kExtentBytes, head.bytes - done);
    auto read = read_now(io, part, done,
                         head.memory.bytes().subspan(done, round_up(bytes, kBlockBytes)), bytes);
    if (!read) return std::move(read).error();
  }
  return head;
}

Result<Head> read_whole_header(uring::IoBackend& io, const OpenPart& part) {
  constexpr std::uint64_t kLengthBytes = 8;
  if (part.bytes < kLengthBytes) return damage(part.file_name, "is no safetensors file");
  auto head = read_head_of(io, part, kLengthBytes);
  if (!head) return head;
  auto header_bytes = format::header_bytes(head->all(), part.bytes);
  if (!header_bytes && says_nothing(header_bytes.error())) return std::move(header_bytes).error();
  if (!header_bytes) return damage(part.file_name, header_bytes.error().message());
  if (*header_bytes <= head->bytes) return head;
  return read_head_of(io, part, *header_bytes);
}

// Checks the extents of the head while the digits are blank, and gives each the hash that it has
// with them: what the header promised is then what a later read has to find.
Status check_head(OpenPart& part, const Head& head) {
  auto hashes = format::decode_file_hashes(part.image);
  if (!hashes) return damage(part.file_name, hashes.error().message());
  part.extent_hashes = *std::move(hashes);

  std::vector<std::uint64_t> as_read;
  for (std::uint64_t i = 0; i * kExtentBytes < head.bytes; ++i) {
    as_read.push_back(hash_extent(head.extent(i)));
  }
  const std::span<char> header(reinterpret_cast<char*>(head.all().data()),
                               part.image.header.size());
  std::ranges::fill(format::find_file_hashes(header), '0');
  for (std::uint64_t i = 0; i < as_read.size(); ++i) {
    if (hash_extent(head.extent(i)) != part.extent_hashes[i]) {
      return damage(part.file_name, concat("extent ", i, " (offset ", i * kExtentBytes, ", ",
                                           head.extent(i).size(), " bytes): hash differs"));
    }
    part.extent_hashes[i] = as_read[i];
  }
  return ok();
}

Status read_image(uring::IoBackend& io, OpenPart& part) {
  auto head = read_whole_header(io, part);
  if (!head) return std::move(head).error();
  auto image = format::decode_part(kPartName, head->all(), part.bytes);
  if (!image && says_nothing(image.error())) return std::move(image).error();
  if (!image) return damage(part.file_name, image.error().message());
  part.image = *std::move(image);
  if (!format::has_file_hashes(part.image)) return ok();
  return check_head(part, *head);
}

}  // namespace

Result<OpenCheckpoint> OpenCheckpoint::open_file(uring::IoBackend& io, const std::string& path) {
  auto file = io.open(path, uring::OpenMode::kReadDirect);
  if (!file) return std::move(file).error();
  OpenCheckpoint opened(io, {.path = parent_of(path), .manifest = {}, .tags = {}});
  opened.parts_.push_back({.file = *file,
                           .file_name = last_component(path),
                           .bytes = 0,
                           .image = {},
                           .extent_hashes = {}});
  OpenPart& part = opened.parts_.back();
  auto status = io.file_status(*file);
  if (!status) return std::move(status).error();
  part.bytes = status->bytes;
  auto read = read_image(io, part);
  if (!read) return std::move(read).error();
  opened.checkpoint_.manifest.run_id = to_hex(Hash128());
  opened.checkpoint_.manifest.parts.push_back(
      {.file = part.file_name, .bytes = part.bytes, .root = format::root_of(part.extent_hashes)});
  return opened;
}

}  // namespace stillframe::catalog
