#include <algorithm>
#include <utility>

#include "base/hash.h"
#include "base/text.h"
#include "catalog/block_reader.h"
#include "catalog/run_files.h"
#include "format/manifest.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

// Whether the error says something about the checkpoint rather than about the attempt to read it.
bool is_damage(const Error& error) {
  return error.code() == Code::kDataLoss || error.code() == Code::kNotFound ||
         error.code() == Code::kInvalidArgument;
}

Status verify_manifest(uring::IoBackend& io, const Checkpoint& checkpoint,
                       std::vector<std::string>& damage) {
  auto text = read_small_file(io, concat(checkpoint.path, '/', format::kManifestName),
                              format::kManifestBytesMax);
  if (!text && !is_damage(text.error())) return std::move(text).error();
  if (!text) {
    damage.push_back(concat(format::kManifestName, ": ", text.error().message()));
  } else if (*text != format::encode_manifest(checkpoint.manifest)) {
    damage.push_back(concat(format::kManifestName, ": is not what the checkpoint was found with"));
  }
  return ok();
}

// Other readers merge every safetensors file of a directory, so one too many is damage too.
Status verify_listing(uring::IoBackend& io, const Checkpoint& checkpoint,
                      std::vector<std::string>& damage) {
  auto entries = io.list_directory(checkpoint.path);
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    if (!entry.name.ends_with(".safetensors")) continue;
    const auto& parts = checkpoint.manifest.parts;
    const bool is_listed =
        std::any_of(parts.begin(), parts.end(),
                    [&entry](const format::ManifestPart& part) { return part.file == entry.name; });
    if (!is_listed) damage.push_back(concat(entry.name, ": the manifest does not list it"));
  }
  return ok();
}

void verify_block(const OpenPart& part, const ReadBlock& block, std::vector<std::string>& damage) {
  for (std::size_t done = 0; done < block.bytes.size(); done += kExtentBytes) {
    const std::size_t bytes = std::min(kExtentBytes, block.bytes.size() - done);
    const std::uint64_t offset = block.offset + done;
    const std::uint64_t extent = offset / kExtentBytes;
    if (hash_extent(block.bytes.subspan(done, bytes)) == part.extent_hashes[extent]) continue;
    damage.push_back(concat(part.file_name, " extent ", extent, " (offset ", offset, ", ", bytes,
                            " bytes): hash differs"));
  }
}

Status verify_extents(uring::IoBackend& io, const OpenCheckpoint& opened, Bytes staging,
                      std::vector<std::string>& damage) {
  std::vector<ExtentRange> wanted;
  for (std::size_t i = 0; i < opened.parts().size(); ++i) {
    // Without sums there is nothing to compare with; that the sums are damaged is in the list
    // already.
    wanted.push_back(
        {.part = i, .first_extent = 0, .extent_count = opened.parts()[i].extent_hashes.size()});
  }
  BlockReader reader(io, opened, std::move(wanted), staging);
  for (;;) {
    auto block = reader.next();
    if (!block && is_damage(block.error())) {
      damage.emplace_back(block.error().message());
      return ok();
    }
    if (!block) return std::move(block).error();
    if (!*block) return ok();
    verify_block(opened.parts()[(*block)->part], **block, damage);
    reader.recycle(**block);
  }
}

}  // namespace

Result<std::vector<std::string>> verify_checkpoint(uring::IoBackend& io,
                                                   const Checkpoint& checkpoint, Bytes staging) {
  std::vector<std::string> damage;
  auto done = verify_manifest(io, checkpoint, damage);
  if (done) done = verify_listing(io, checkpoint, damage);
  if (!done) return std::move(done).error();
  auto opened = OpenCheckpoint::open_damaged(io, checkpoint, damage);
  if (!opened) return std::move(opened).error();
  done = verify_extents(io, *opened, staging, damage);
  if (!done) return std::move(done).error();

  for (std::uint32_t rank = 0; rank < checkpoint.manifest.states.size(); ++rank) {
    auto state = opened->read_state(rank);
    if (!state && !is_damage(state.error())) return std::move(state).error();
    if (!state) damage.emplace_back(state.error().message());
  }
  if (damage.empty()) {
    // Every byte is as it was written; what was written must also be a checkpoint.
    auto decoded = OpenCheckpoint::open(io, checkpoint);
    if (!decoded && !is_damage(decoded.error())) return std::move(decoded).error();
    if (!decoded) damage.emplace_back(decoded.error().message());
  }
  return damage;
}

}  // namespace stillframe::catalog
