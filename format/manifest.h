#pragma once

// manifest.json says what a checkpoint holds and is written last; manifest.sums lists the hash of
// every extent. docs/FORMAT.md sections 3 and 4 are normative.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/hash.h"
#include "base/result.h"

namespace stillframe::format {

inline constexpr std::uint32_t kFormatVersion = 1;
inline constexpr std::uint64_t kManifestBytesMax = std::uint64_t{16} << 20;
inline constexpr std::uint64_t kStateBytesMax = std::uint64_t{256} << 20;

struct ManifestPart {
  std::string file;         // "model.safetensors"
  std::uint64_t bytes = 0;  // Exact length.
  Hash128 root;             // XXH3-128 of this part's bytes of manifest.sums.
  bool operator==(const ManifestPart&) const = default;
};

struct ManifestFile {
  std::string file;  // "manifest.sums", "state.json"
  std::uint64_t bytes = 0;
  Hash128 hash;  // XXH3-128 of the whole file.
  bool operator==(const ManifestFile&) const = default;
};

// What the manifest says of a small file with these bytes.
ManifestFile describe_file(std::string_view file, std::string_view bytes);

// How `best` is chosen among checkpoints.
enum class BestMode : std::uint8_t { kMin, kMax };
struct BestRule {
  std::string metric;
  BestMode mode = BestMode::kMin;
  bool operator==(const BestRule&) const = default;
};

struct Manifest {
  std::string run_id;  // 32 hexadecimal digits, made with the run.
  std::uint64_t sequence = 0;
  std::optional<std::uint64_t> previous_sequence;
  std::int64_t step = 0;
  std::uint32_t world_size = 1;
  std::int64_t wall_ns = 0;               // Information only: nothing is ordered by it.
  std::map<std::string, double> metrics;  // NaN and infinities are written as strings.
  std::vector<BestRule> best_rules;       // The first is what `best` means. Each metric once.
  std::string stillframe_version;
  std::string framework;       // "torch 2.13.0", from the client
  std::string python_version;  // "3.11.7", or empty
  bool has_pickle = false;     // state.json holds opted-in pickles.
  std::vector<ManifestPart> parts;
  ManifestFile sums;
  std::vector<ManifestFile> states;  // One per rank.
  bool operator==(const Manifest&) const = default;
};

// One line of JSON a member, "checksum" last: XXH3-128 over all bytes before its key, then an exact
// ending. encode(*decode(text)) == text for what encode() made.
std::string encode_manifest(const Manifest& manifest);

// Whether decode_manifest() would accept what encode_manifest() makes of it: kInvalidArgument names
// the member. Whoever fills a manifest from a client's words asks first.
Status check_manifest(const Manifest& manifest);

// kDataLoss: damaged, truncated, trailing bytes, duplicate or unknown keys, values out of range,
// names that may not occur. kInvalidArgument: intact, but of a newer major format version, which is
// named.
Result<Manifest> decode_manifest(std::string_view text);

// How many extents a part of that length has, and so how many sums.
constexpr std::uint64_t extent_count(std::uint64_t part_bytes) noexcept {
  return part_bytes / kExtentBytes + (part_bytes % kExtentBytes != 0 ? 1 : 0);
}

// Little-endian u64 for each extent of each part, parts in manifest order.
std::string encode_sums(const std::vector<std::vector<std::uint64_t>>& extent_hashes_by_part);

// Splits and checks manifest.sums against the manifest: length, whole-file hash, every root.
Result<std::vector<std::vector<std::uint64_t>>> decode_sums(const Manifest& manifest,
                                                            std::string_view sums);
// Hash of one part's sums: its root.
Hash128 root_of(const std::vector<std::uint64_t>& extent_hashes);

}  // namespace stillframe::format
