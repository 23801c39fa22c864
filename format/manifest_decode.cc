// The other direction of manifest.cc. First the checksum, then the version, then the members; at
// the end the manifest is encoded again and must give the same bytes, so that one manifest has
// exactly one text and whatever a check here should miss is refused all the same.

#include <charconv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "base/text.h"
#include "format/json_tree.h"
#include "format/manifest.h"
#include "format/manifest_text.h"
#include "format/utf8.h"

namespace stillframe::format {

namespace {

constexpr std::size_t kDepth = 3;  // The document, a list, an entry.

using Kind = JsonValue::Kind;

Error damaged(std::string_view why) { return Error(Code::kDataLoss, concat("manifest: ", why)); }

// Takes the members of one object one by one. The first thing that is wrong is kept and makes all
// further answers meaningless, so callers look once, at the end.
class Members {
 public:
  explicit Members(const JsonValue& object, std::string_view where) : where_(where) {
    if (object.kind == Kind::kObject)
      object_ = &object;
    else
      fail("is not an object");
  }

  // `null` where the member is missing; which is then an error already.
  const JsonValue& take(std::string_view key, Kind kind) {
    static const JsonValue kNothing;
    if (!error_.empty()) return kNothing;
    // Members come in a fixed order, so a missing and an unknown one show as the same thing.
    const std::size_t index = next_++;
    if (index == object_->keys.size() || object_->keys[index] != key) {
      fail(concat("expected ", printable(key), ", found ",
                  index == object_->keys.size() ? "the end" : printable(object_->keys[index])));
      return kNothing;
    }
    const JsonValue& value = object_->items[index];
    if (value.kind == kind || (value.kind == Kind::kNull && is_optional_)) return value;
    fail(concat(printable(key), " has a value of the wrong kind"));
    return kNothing;
  }

  const JsonValue& take_or_null(std::string_view key, Kind kind) {
    is_optional_ = true;
    const JsonValue& value = take(key, kind);
    is_optional_ = false;
    return value;
  }

  std::string text(std::string_view key) { return take(key, Kind::kString).text; }

  template <class Integer>
  Integer integer(std::string_view key) {
    return to_integer<Integer>(key, take(key, Kind::kNumber).text);
  }

  template <class Integer>
  std::optional<Integer> integer_or_null(std::string_view key) {
    const JsonValue& value = take_or_null(key, Kind::kNumber);
    if (value.kind == Kind::kNull) return std::nullopt;
    return to_integer<Integer>(key, value.text);
  }

  Hash128 hash(std::string_view key) {
    const Result<Hash128> hash = parse_hash128(text(key));
    if (hash) return *hash;
    fail(concat(printable(key), " is not a hash"));
    return {};
  }

  void fail(std::string_view why) {
    if (error_.empty()) error_ = concat(where_, ": ", why);
  }

  // The first error, or that members are left over.
  std::string finish() {
    if (error_.empty() && next_ != object_->keys.size()) {
      fail(concat("member ", printable(object_->keys[next_]), " is not known"));
    }
    return error_;
  }

 private:
  template <class Integer>
  Integer to_integer(std::string_view key, std::string_view digits) {
    Integer number = 0;
    const char* const end = digits.data() + digits.size();
    const auto parsed = std::from_chars(digits.data(), end, number);
    if (parsed.ec != std::errc() || parsed.ptr != end) {
      fail(concat(printable(key), " is not an integer in its range"));
    }
    return number;
  }

  const JsonValue* object_ = nullptr;
  std::size_t next_ = 0;
  bool is_optional_ = false;
  std::string where_;
  std::string error_;
};

std::optional<double> parse_metric(const JsonValue& value) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (value.kind == Kind::kString) {
    if (value.text == "NaN") return std::numeric_limits<double>::quiet_NaN();
    if (value.text == "Infinity") return kInfinity;
    if (value.text == "-Infinity") return -kInfinity;
    return std::nullopt;
  }
  if (value.kind != Kind::kNumber) return std::nullopt;
  double number = 0;
  const char* const end = value.text.data() + value.text.size();
  const auto parsed = std::from_chars(value.text.data(), end, number);
  if (parsed.ec != std::errc() || parsed.ptr != end) return std::nullopt;
  return number;
}

std::map<std::string, double> decode_metrics(Members& members) {
  std::map<std::string, double> metrics;
  const JsonValue& object = members.take("metrics", Kind::kObject);
  for (std::size_t i = 0; i < object.keys.size(); ++i) {
    const std::string& name = object.keys[i];
    const auto number = parse_metric(object.items[i]);
    if (!number) members.fail(concat("metric ", printable(name), " is not a number"));
    metrics.emplace(name, number.value_or(0));
  }
  return metrics;
}

std::vector<BestRule> decode_best_rules(Members& members) {
  std::vector<BestRule> rules;
  for (const JsonValue& value : members.take("best", Kind::kArray).items) {
    Members rule(value, "best");
    BestRule best{.metric = rule.text("metric"), .mode = BestMode::kMin};
    const std::string mode = rule.text("mode");
    if (mode == "max")
      best.mode = BestMode::kMax;
    else if (mode != "min")
      rule.fail("mode is neither \"min\" nor \"max\"");
    if (const std::string error = rule.finish(); !error.empty()) members.fail(error);
    rules.push_back(std::move(best));
  }
  return rules;
}

template <class Entry>
Entry decode_entry(Members& members, const JsonValue& value, std::string_view where) {
  Members entry(value, where);
  Entry decoded;
  decoded.file = entry.text("file");
  decoded.bytes = entry.integer<std::uint64_t>("bytes");
  if constexpr (std::is_same_v<Entry, ManifestPart>)
    decoded.root = entry.hash("root");
  else
    decoded.hash = entry.hash("hash");
  if (const std::string error = entry.finish(); !error.empty()) members.fail(error);
  return decoded;
}

template <class Entry>
std::vector<Entry> decode_list(Members& members, std::string_view key) {
  std::vector<Entry> entries;
  for (const JsonValue& value : members.take(key, Kind::kArray).items) {
    entries.push_back(decode_entry<Entry>(members, value, key));
  }
  return entries;
}

// Exact length of the tail, then the hash of all bytes before its key.
Status check_checksum(std::string_view text) {
  if (text.size() > kManifestBytesMax) {
    return damaged(concat(text.size(), " bytes, at most ", kManifestBytesMax));
  }
  if (text.size() < kManifestStart.size() + kChecksumTailBytes) {
    return damaged(concat("truncated to ", text.size(), " bytes"));
  }
  const std::size_t body_bytes = text.size() - kChecksumTailBytes;
  const std::string_view tail = text.substr(body_bytes);
  if (!tail.starts_with(kChecksumStart) || !tail.ends_with(kChecksumEnd)) {
    return damaged("does not end in its checksum");
  }
  const Result<Hash128> stored = parse_hash128(tail.substr(kChecksumStart.size(), kChecksumDigits));
  if (!stored) return damaged(concat("checksum: ", stored.error().message()));
  const Hash128 computed = hash128(text.substr(0, body_bytes));
  if (*stored != computed) {
    return damaged(
        concat("its bytes have the checksum ", to_hex(computed), ", it states ", to_hex(*stored)));
  }
  return ok();
}

// The bytes are intact here, so a version that this build does not know is another program's and no
// damage.
Status check_version(std::string_view text) {
  if (!text.starts_with(kManifestStart)) return damaged("does not begin with its format version");
  text.remove_prefix(kManifestStart.size());
  std::uint64_t version = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), version);
  const bool is_ended = parsed.ptr != text.data() + text.size() && *parsed.ptr == ',';
  if (parsed.ec != std::errc() || !is_ended || version == 0) {
    return damaged("its format version is not a positive integer");
  }
  if (version > kFormatVersion) {
    return Error(Code::kInvalidArgument,
                 concat("manifest: format version ", version, "; this build reads up to ",
                        kFormatVersion, ". A newer Stillframe wrote it"));
  }
  return ok();
}

}  // namespace

Result<Manifest> decode_manifest(std::string_view text) {
  if (Status checksum = check_checksum(text); !checksum) return std::move(checksum).error();
  if (Status version = check_version(text); !version) return std::move(version).error();

  const Result<JsonValue> document = read_json_tree(text.substr(0, text.size() - 1), kDepth);
  if (!document) {
    if (document.error().code() != Code::kDataLoss) return document.error();
    return damaged(document.error().message());
  }
  Members members(*document, "document");
  Manifest manifest;
  (void)members.integer<std::uint32_t>("format_version");
  manifest.run_id = members.text("run_id");
  manifest.sequence = members.integer<std::uint64_t>("sequence");
  manifest.previous_sequence = members.integer_or_null<std::uint64_t>("previous_sequence");
  manifest.step = members.integer<std::int64_t>("step");
  manifest.world_size = members.integer<std::uint32_t>("world_size");
  manifest.wall_ns = members.integer<std::int64_t>("wall_ns");
  manifest.metrics = decode_metrics(members);
  manifest.best_rules = decode_best_rules(members);
  manifest.stillframe_version = members.text("stillframe_version");
  manifest.framework = members.text("framework");
  manifest.python_version = members.text("python_version");
  manifest.has_pickle = members.take("has_pickle", Kind::kBool).boolean;
  manifest.parts = decode_list<ManifestPart>(members, "parts");
  manifest.sums = decode_entry<ManifestFile>(members, members.take("sums", Kind::kObject), "sums");
  manifest.states = decode_list<ManifestFile>(members, "states");
  (void)members.hash("checksum");

  if (const std::string error = members.finish(); !error.empty()) return damaged(error);
  if (const Status valid = check_manifest(manifest); !valid) {
    return damaged(valid.error().message());
  }
  if (encode_manifest(manifest) != text) return damaged("is not spelled as this version spells it");
  return manifest;
}

}  // namespace stillframe::format
