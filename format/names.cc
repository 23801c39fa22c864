#include "format/names.h"

#include <algorithm>
#include <charconv>

#include "base/hash.h"
#include "base/text.h"
#include "format/safetensors.h"
#include "format/utf8.h"

namespace stillframe::format {

namespace {

constexpr std::string_view kLatest = "latest";
constexpr std::string_view kBest = "best";
constexpr std::string_view kBestOf = "best:";
constexpr std::size_t kMetricNameBytesMax = 256;
constexpr std::string_view kStepPrefix = "step-";
constexpr std::string_view kStepInfix = "-step-";
constexpr std::string_view kTemporaryPrefix = "tmp-";
constexpr std::string_view kPartSuffix = ".safetensors";
constexpr std::string_view kDigits = "0123456789";
constexpr std::size_t kSequenceDigits = 8;
constexpr std::size_t kRankDigits = 5;
constexpr std::size_t kNonceDigits = 16;
constexpr std::size_t kNameBytesMax = 128;
constexpr std::size_t kAddressBytesMax = 4096;  // PATH_MAX

bool is_digits(std::string_view text) noexcept {
  return !text.empty() && text.find_first_not_of(kDigits) == std::string_view::npos;
}

template <class Number>
std::optional<Number> parse_number(std::string_view digits, int base = 10) noexcept {
  Number number = 0;
  const char* const end = digits.data() + digits.size();
  const auto parsed = std::from_chars(digits.data(), end, number, base);
  if (parsed.ec != std::errc() || parsed.ptr != end || digits.empty()) return std::nullopt;
  return number;
}

std::string zero_filled(std::uint64_t number, std::size_t digits) {
  const std::string text = std::to_string(number);
  return std::string(digits - std::min(digits, text.size()), '0') + text;
}

std::string rank_infix(std::uint32_t rank, std::uint32_t world_size) {
  if (world_size <= 1) return {};
  return concat(".rank", zero_filled(rank, kRankDigits), "-of-",
                zero_filled(world_size, kRankDigits));
}

// The rank in the middle of "<before><rank infix><after>"; nullopt where the text has another world
// size or none.
std::optional<std::uint32_t> parse_rank_infix(std::string_view infix, std::uint32_t world_size) {
  if (world_size <= 1) return infix.empty() ? std::optional<std::uint32_t>(0) : std::nullopt;
  constexpr std::string_view kBefore = ".rank";
  if (!infix.starts_with(kBefore)) return std::nullopt;
  const std::string_view digits = infix.substr(kBefore.size(), infix.find('-') - kBefore.size());
  const auto rank = parse_number<std::uint32_t>(digits);
  if (!rank || *rank >= world_size || rank_infix(*rank, world_size) != infix) return std::nullopt;
  return rank;
}

Error bad_name(std::string_view what, std::string_view name, std::string_view why) {
  return Error(Code::kInvalidArgument, concat(what, " ", printable(name), ": ", why));
}

}  // namespace

Status check_name(std::string_view what, std::string_view name) {
  constexpr std::string_view kAllowed =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  if (name.empty() || name.size() > kNameBytesMax) {
    return bad_name(what, name, concat("has ", name.size(), " bytes, not 1 to ", kNameBytesMax));
  }
  if (name.find_first_not_of(kAllowed) != std::string_view::npos) {
    return bad_name(what, name, "only letters, digits, '.', '_' and '-' may stand in it");
  }
  if (name == "." || name == "..") return bad_name(what, name, "is a directory");
  return ok();
}

Status check_tensor_name(std::string_view name) {
  if (name.empty() || name.size() > kTensorNameBytesMax) {
    return bad_name("tensor", name,
                    concat("its name has ", name.size(), " bytes, not 1 to ", kTensorNameBytesMax));
  }
  if (!is_plain_utf8(name)) {
    return bad_name("tensor", name, "its name is not UTF-8 without control characters");
  }
  if (name == kMetadataKey) return bad_name("tensor", name, "safetensors keeps this name");
  return ok();
}

std::string checkpoint_directory_name(CheckpointName name) {
  return concat(zero_filled(name.sequence, kSequenceDigits), kStepInfix, name.step);
}

std::optional<CheckpointName> parse_checkpoint_directory_name(std::string_view text) {
  const std::size_t split = text.find(kStepInfix);
  if (split == std::string_view::npos) return std::nullopt;
  const std::string_view step_digits = text.substr(split + kStepInfix.size());
  const auto sequence = parse_number<std::uint64_t>(text.substr(0, split));
  const auto step = parse_number<std::int64_t>(step_digits);
  if (!sequence || !step || !is_digits(step_digits)) return std::nullopt;
  const CheckpointName name{.sequence = *sequence, .step = *step};
  // Two spellings of one checkpoint would be two directories with one sequence.
  if (checkpoint_directory_name(name) != text) return std::nullopt;
  return name;
}

std::string part_file_name(std::string_view part, std::uint32_t rank, std::uint32_t world_size) {
  return concat(part, rank_infix(rank, world_size), kPartSuffix);
}

std::optional<RankFile> parse_part_file_name(std::string_view file, std::uint32_t world_size) {
  if (!file.ends_with(kPartSuffix)) return std::nullopt;
  const std::string_view stem = file.substr(0, file.size() - kPartSuffix.size());
  const std::size_t infix = world_size > 1 ? stem.rfind(".rank") : stem.size();
  if (infix == std::string_view::npos) return std::nullopt;
  const auto rank = parse_rank_infix(stem.substr(infix), world_size);
  if (!rank || !check_name("part", stem.substr(0, infix))) return std::nullopt;
  return RankFile{.part = std::string(stem.substr(0, infix)), .rank = *rank};
}

std::string state_file_name(std::uint32_t rank, std::uint32_t world_size) {
  return concat("state", rank_infix(rank, world_size), ".json");
}

std::optional<std::uint32_t> parse_state_file_name(std::string_view file,
                                                   std::uint32_t world_size) {
  constexpr std::string_view kBefore = "state";
  constexpr std::string_view kAfter = ".json";
  if (file.size() < kBefore.size() + kAfter.size() || !file.starts_with(kBefore) ||
      !file.ends_with(kAfter)) {
    return std::nullopt;
  }
  file.remove_prefix(kBefore.size());
  file.remove_suffix(kAfter.size());
  return parse_rank_infix(file, world_size);
}

std::string temporary_directory_name(TemporaryName name) {
  return concat(kTemporaryPrefix, zero_filled(name.sequence, kSequenceDigits), "-",
                to_hex(name.nonce));
}

std::optional<TemporaryName> parse_temporary_directory_name(std::string_view text) {
  if (!text.starts_with(kTemporaryPrefix)) return std::nullopt;
  const std::string_view rest = text.substr(kTemporaryPrefix.size());
  const std::size_t split = rest.find('-');
  if (split == std::string_view::npos) return std::nullopt;
  const auto sequence = parse_number<std::uint64_t>(rest.substr(0, split));
  const auto nonce = parse_number<std::uint64_t>(rest.substr(split + 1), 16);
  if (!sequence || !nonce || rest.size() - split - 1 != kNonceDigits) return std::nullopt;
  const TemporaryName name{.sequence = *sequence, .nonce = *nonce};
  if (temporary_directory_name(name) != text) return std::nullopt;
  return name;
}

bool is_metric_name(std::string_view name) {
  return !name.empty() && name.size() <= kMetricNameBytesMax && is_plain_utf8(name);
}

Result<Selector> parse_selector(std::string_view text) {
  if (text == kLatest) return Selector{.kind = Selector::Kind::kLatest};
  if (text == kBest) return Selector{.kind = Selector::Kind::kBest};
  if (text.starts_with(kBestOf)) {
    const std::string_view metric = text.substr(kBestOf.size());
    if (!is_metric_name(metric)) return bad_name("selector", text, "names no metric");
    return Selector{.kind = Selector::Kind::kBest, .metric = std::string(metric)};
  }
  if (is_digits(text)) {
    const auto sequence = parse_number<std::uint64_t>(text);
    if (!sequence) return bad_name("selector", text, "no sequence is that large");
    return Selector{.kind = Selector::Kind::kSequence, .sequence = *sequence};
  }
  if (text.starts_with(kStepPrefix) && is_digits(text.substr(kStepPrefix.size()))) {
    const auto step = parse_number<std::int64_t>(text.substr(kStepPrefix.size()));
    if (!step) return bad_name("selector", text, "no step is that large");
    return Selector{.kind = Selector::Kind::kStep, .step = *step};
  }
  if (Status tag = check_tag(text); !tag) return std::move(tag).error();
  return Selector{.kind = Selector::Kind::kTag, .tag = std::string(text)};
}

std::string to_text(const Selector& selector) {
  switch (selector.kind) {
    case Selector::Kind::kLatest: return std::string(kLatest);
    case Selector::Kind::kBest:
      return selector.metric.empty() ? std::string(kBest) : concat(kBestOf, selector.metric);
    case Selector::Kind::kSequence: return std::to_string(selector.sequence);
    case Selector::Kind::kStep: return concat(kStepPrefix, selector.step);
    case Selector::Kind::kTag: return selector.tag;
  }
  return {};
}

Status check_tag(std::string_view tag) {
  if (Status name = check_name("tag", tag); !name) return name;
  const bool is_step = tag.starts_with(kStepPrefix) && is_digits(tag.substr(kStepPrefix.size()));
  if (tag == kLatest || tag == kBest || is_digits(tag) || is_step ||
      parse_checkpoint_directory_name(tag)) {
    return bad_name("tag", tag, "already means a checkpoint");
  }
  return ok();
}

Result<CheckpointAddress> parse_address(std::string_view text) {
  if (text.empty() || text.size() > kAddressBytesMax || text.find('\0') != std::string_view::npos) {
    return bad_name("checkpoint", text, "is not a path of 1 to 4096 bytes without NUL");
  }
  while (text.size() > 1 && text.ends_with('/')) text.remove_suffix(1);
  const std::size_t slash = text.rfind('/');
  const std::size_t start = slash == std::string_view::npos ? 0 : slash + 1;
  const std::string_view last = text.substr(start);

  // Only the last component may hold the selector: "user@host/run1" is a path.
  if (const std::size_t at = last.rfind('@'); at != std::string_view::npos) {
    if (at == 0) return bad_name("checkpoint", text, "no run stands before '@'");
    Result<Selector> selector = parse_selector(last.substr(at + 1));
    if (!selector) return std::move(selector).error();
    return CheckpointAddress{.run_path = std::string(text.substr(0, start + at)),
                             .selector = *std::move(selector)};
  }

  const std::string_view parent = slash == std::string_view::npos ? std::string_view(".")
                                  : slash == 0                    ? std::string_view("/")
                                                                  : text.substr(0, slash);
  if (const auto name = parse_checkpoint_directory_name(last)) {
    return CheckpointAddress{
        .run_path = std::string(parent),
        .selector = {.kind = Selector::Kind::kSequence, .sequence = name->sequence}};
  }
  if (last == kLatest || last == kBest) {
    const auto kind = last == kLatest ? Selector::Kind::kLatest : Selector::Kind::kBest;
    return CheckpointAddress{.run_path = std::string(parent), .selector = {.kind = kind}};
  }
  return CheckpointAddress{.run_path = std::string(text), .selector = {}};
}

}  // namespace stillframe::format
