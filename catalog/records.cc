#include "catalog/records.h"

#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/run_files.h"
#include "format/names.h"

namespace stillframe::catalog {

Status write_records(uring::IoBackend& io, const std::string& directory,
                     const std::vector<std::vector<std::uint64_t>>& extent_hashes,
                     std::span<const std::string> states, format::Manifest& manifest) {
  const std::string sums = format::encode_sums(extent_hashes);
  manifest.sums = format::describe_file(format::kSumsName, sums);
  manifest.states.clear();
  for (std::uint32_t rank = 0; rank < states.size(); ++rank) {
    manifest.states.push_back(
        format::describe_file(format::state_file_name(rank, manifest.world_size), states[rank]));
  }
  auto done = format::check_manifest(manifest);
  if (!done) return done;
  done = write_small_file(io, concat(directory, '/', format::kSumsName), sums);
  if (!done) return done;
  for (std::size_t rank = 0; rank < states.size(); ++rank) {
    done = write_small_file(io, concat(directory, '/', manifest.states[rank].file), states[rank]);
    if (!done) return done;
  }
  STEP("records: write manifest");
  done = write_small_file(io, concat(directory, '/', format::kManifestName),
                          format::encode_manifest(manifest));
  if (!done) return done;
  if (int e = STEP_ERROR("records: fsync directory"); e != 0) {
    return os_error(concat("fsync ", directory), e);
  }
  return io.sync_directory(directory);
}

}  // namespace stillframe::catalog
