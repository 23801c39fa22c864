#pragma once

// Every name that Stillframe may put on a disk, in one place, each with its exact inverse.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"

namespace stillframe::format {

// [A-Za-z0-9._-]{1,128}, not "." or "..": part names, tags, model names. kInvalidArgument
// otherwise, with `what` ("tag") and the offending name in the message.
Status check_name(std::string_view what, std::string_view name);
// 1 to 4096 bytes of UTF-8 without control characters, not "__metadata__". Tensor names are never
// paths.
Status check_tensor_name(std::string_view name);

// "00000012-step-1200": sequence in at least 8 digits, step.
struct CheckpointName {
  std::uint64_t sequence = 0;
  std::int64_t step = 0;
  bool operator==(const CheckpointName&) const = default;
};
std::string checkpoint_directory_name(CheckpointName name);
std::optional<CheckpointName> parse_checkpoint_directory_name(std::string_view text);

// "model" -> "model.safetensors"; with a world size above 1
// "model.rank00003-of-00008.safetensors".
std::string part_file_name(std::string_view part, std::uint32_t rank, std::uint32_t world_size);
std::string state_file_name(std::uint32_t rank, std::uint32_t world_size);  // "state.json"

// Their inverses. They need the world size: "a.rank00000-of-00002.safetensors" is part "a" of two
// ranks and part "a.rank00000-of-00002" of one.
struct RankFile {
  std::string part;
  std::uint32_t rank = 0;
  bool operator==(const RankFile&) const = default;
};
std::optional<RankFile> parse_part_file_name(std::string_view file, std::uint32_t world_size);
std::optional<std::uint32_t> parse_state_file_name(std::string_view file, std::uint32_t world_size);

inline constexpr std::string_view kManifestName = "manifest.json";
inline constexpr std::string_view kDeadManifestName = "manifest.json.dead";
inline constexpr std::string_view kSumsName = "manifest.sums";
inline constexpr std::string_view kPrivateDirectory = ".stillframe";
inline constexpr std::string_view kLockName = "lock";
inline constexpr std::string_view kRunIdName = "run-id";
inline constexpr std::string_view kSpoolDirectory = "spool";
inline constexpr std::string_view kTagsDirectory = "tags";

// "tmp-00000012-0123456789abcdef": sequence and the instance's nonce.
struct TemporaryName {
  std::uint64_t sequence = 0;
  std::uint64_t nonce = 0;
  bool operator==(const TemporaryName&) const = default;
};
std::string temporary_directory_name(TemporaryName name);
std::optional<TemporaryName> parse_temporary_directory_name(std::string_view text);

// Whether it is the name of a metric: 1 to 256 bytes of UTF-8, no control characters.
bool is_metric_name(std::string_view name);

// What RUN@WHAT names.
struct Selector {
  enum class Kind : std::uint8_t { kLatest, kBest, kSequence, kStep, kTag };
  Kind kind = Kind::kLatest;
  std::uint64_t sequence = 0;  // kSequence
  std::int64_t step = 0;       // kStep: the newest checkpoint of that step
  std::string tag{};           // kTag; {} so that designated initialisers may leave it out
  std::string metric{};        // kBest: by this one; empty: by the run's first criterion
  bool operator==(const Selector&) const = default;
};

// "latest", "best", "best:METRIC", "12" (a sequence; leading zeros are allowed), "step-1200", or a
// tag.
// kInvalidArgument for anything else.
Result<Selector> parse_selector(std::string_view text);
std::string to_text(const Selector& selector);

// A tag must not read as another selector: not all digits, not "step-<digits>", "latest" or "best",
// and not a checkpoint's directory name.
Status check_tag(std::string_view tag);

// "checkpoints/run1@best" -> run and selector; "checkpoints/run1" -> latest;
// "checkpoints/run1/00000012-step-1200" -> that sequence of checkpoints/run1;
// "checkpoints/run1/latest" -> the selector, the link itself is never read. Only an '@' in the last
// component counts, and trailing slashes do not. kInvalidArgument: empty, NUL, no run before '@',
// or not a selector behind it.
struct CheckpointAddress {
  std::string run_path;
  Selector selector;
};
Result<CheckpointAddress> parse_address(std::string_view text);

}  // namespace stillframe::format
