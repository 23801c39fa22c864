#pragma once

// A checkpoint's tensors as other libraries' files: one safetensors file, or a directory as Hugging
// Face's save_pretrained() writes it. Memory is the staging and the headers, whatever the model;
// every extent is checked against its hash on the way.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "catalog/block_reader.h"
#include "catalog/part_copy.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// Where an export goes. It is written as PATH.partial, synced, and only then renamed, so that PATH
// is absent, the old one, or complete.
class ExportTarget {
 public:
  enum class Kind : std::uint8_t { kFile, kDirectory };
  // Whether a file of that name may be in a directory that is replaced.
  using IsOurs = bool (*)(std::string_view file_name);

  // kInvalidArgument: PATH exists and `replaces` is false, is of the other kind, or is a directory
  // with a file that no export of this format has made; or PATH.partial exists.
  static Result<ExportTarget> prepare(uring::IoBackend& io, const std::string& path, Kind kind,
                                      bool replaces, IsOurs is_ours);

  const std::string& partial() const noexcept { return partial_; }
  // The synced file or directory at partial() becomes PATH, durably.
  Status publish(uring::IoBackend& io) const;
  // Removes what is at partial(), as far as that works.
  void discard(uring::IoBackend& io) const;

 private:
  std::string path_;
  std::string partial_;
  Kind kind_ = Kind::kFile;
  bool replaces_ = false;
};

struct Exported {
  std::uint64_t bytes = 0;         // Of the files with tensors.
  std::vector<std::string> files;  // Below the directory, or the file's own name.
  // Tensors that readers have no dtype for: stored as U8, their true dtype in the metadata.
  std::vector<std::string> as_u8;
};

// The metadata key of a file whose U8 tensors have another true dtype: JSON, name to dtype.
inline constexpr std::string_view kDtypesKey = "stillframe.dtypes";

// The whole part as one file; byte for byte the part's, unless a tensor has to become U8.
Result<Exported> export_file(uring::IoBackend& io, const OpenPart& part, const ExportTarget& target,
                             Bytes staging, const Progress& progress);

// model.safetensors, or model-00001-of-0000N.safetensors with model.safetensors.index.json where
// that would be more than `shard_bytes_max` (of tensors; one tensor alone may be larger), and
// config.json where there is one. Names and order are the part's; tied tensors are in it once.
struct HfOptions {
  std::uint64_t shard_bytes_max = 5'000'000'000;
  std::optional<std::string> config_json = {};
};
Result<Exported> export_hf(uring::IoBackend& io, const OpenPart& part, const HfOptions& options,
                           const ExportTarget& target, Bytes staging, const Progress& progress);
bool is_hf_file(std::string_view file_name);

// Runs of tensors, in order, of at most `bytes_max` or one tensor each. Pure.
std::vector<std::span<const format::PlacedTensor>> split_into_shards(
    std::span<const format::PlacedTensor> tensors, std::uint64_t bytes_max);

}  // namespace stillframe::catalog
