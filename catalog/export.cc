#include "catalog/export.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <utility>

#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/run_files.h"
#include "format/json.h"

namespace stillframe::catalog {

namespace {

constexpr std::string_view kWholeName = "model.safetensors";
constexpr std::string_view kIndexName = "model.safetensors.index.json";
constexpr std::string_view kConfigName = "config.json";

// One file to write: tensors that lie one after the other in the part.
struct FilePlan {
  std::string name;
  std::span<const format::PlacedTensor> tensors;
  std::map<std::string, std::string> metadata;
};

// torch 2.13 saves F8_E8M0 to safetensors and cannot load it (KeyError), so it travels as U8.
bool needs_u8(const format::PlacedTensor& tensor) {
  return tensor.spec.dtype == format::Dtype::kF8E8M0;
}

void note_dtypes(FilePlan& plan, Exported& exported) {
  std::string json;
  for (const format::PlacedTensor& tensor : plan.tensors) {
    if (!needs_u8(tensor)) continue;
    json.append(json.empty() ? "{" : ",");
    format::append_json_string(json, tensor.spec.name);
    json.append(":\"").append(format::name(tensor.spec.dtype)).append("\"");
    exported.as_u8.push_back(tensor.spec.name);
  }
  if (!json.empty()) plan.metadata[std::string(kDtypesKey)] = json.append("}");
}

// The part's bytes from the first tensor to the last, behind a header of their own.
PartRange range_of(const OpenPart& part, const FilePlan& plan) {
  PartRange range;
  range.begin = plan.tensors.empty() ? part.bytes : plan.tensors.front().offset;
  range.end =
      plan.tensors.empty() ? part.bytes : plan.tensors.back().offset + plan.tensors.back().bytes;
  std::vector<format::PlacedTensor> tensors(plan.tensors.begin(), plan.tensors.end());
  for (format::PlacedTensor& tensor : tensors) {
    tensor.offset -= range.begin;
    if (needs_u8(tensor)) tensor.spec.dtype = format::Dtype::kU8;
  }
  range.head = format::encode_header(plan.metadata, tensors, range.begin % kBlockBytes);
  return range;
}

Status write_file(uring::IoBackend& io, const OpenPart& part, const std::string& path,
                  const PartRange& range, Bytes staging, const Progress& progress) {
  STEP("export: create file");
  auto file = io.open(path, uring::OpenMode::kCreateDirect);
  if (!file) return std::move(file).error();
  const std::uint64_t bytes = range.head.size() + (range.end - range.begin);
  auto done = io.allocate(*file, round_up(bytes, kBlockBytes));
  if (done) done = copy_range(io, part, *file, range, staging, progress);
  if (done) done = io.truncate(*file, bytes);
  if (done) {
    if (int e = STEP_ERROR("export: sync file"); e != 0) {
      done = os_error(concat("fsync ", path), e);
    } else {
      done = io.sync(*file);
    }
  }
  io.close(*file);
  return done;
}

std::string shard_name(std::size_t index, std::size_t count) {
  const auto padded = [](std::size_t number) {
    std::string digits = concat(number);
    return digits.size() < 5 ? std::string(5 - digits.size(), '0') + digits : digits;
  };
  return concat("model-", padded(index + 1), "-of-", padded(count), ".safetensors");
}

// As transformers writes it: keys sorted, indented by two, a newline at the end.
std::string index_json(const std::vector<FilePlan>& plans, std::uint64_t total_bytes) {
  std::map<std::string_view, std::string_view> files;
  for (const FilePlan& plan : plans) {
    for (const format::PlacedTensor& tensor : plan.tensors) files[tensor.spec.name] = plan.name;
  }
  std::string json = concat("{\n  \"metadata\": {\n    \"total_size\": ", total_bytes,
                            "\n  },\n  \"weight_map\": {");
  std::string_view separator = "\n    ";
  for (const auto& [name, file] : files) {
    json.append(separator);
    format::append_json_string(json, name);
    json.append(": ");
    format::append_json_string(json, file);
    separator = ",\n    ";
  }
  return json.append("\n  }\n}\n");
}

Result<Exported> write_hf(uring::IoBackend& io, const OpenPart& part, const HfOptions& options,
                          const std::string& directory, Bytes staging, const Progress& progress) {
  const auto shards = split_into_shards(part.image.tensors, options.shard_bytes_max);
  Exported exported;
  std::vector<FilePlan> plans;
  std::uint64_t tensor_bytes = 0;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    FilePlan plan{
        .name = shards.size() == 1 ? std::string(kWholeName) : shard_name(i, shards.size()),
        .tensors = shards[i],
        .metadata = {{"format", "pt"}}};
    note_dtypes(plan, exported);
    const PartRange range = range_of(part, plan);
    auto done = write_file(io, part, concat(directory, '/', plan.name), range, staging, progress);
    if (!done) return std::move(done).error();
    tensor_bytes += range.end - range.begin;
    exported.bytes += range.head.size() + (range.end - range.begin);
    exported.files.push_back(plan.name);
    plans.push_back(std::move(plan));
  }
  auto done = ok();
  if (plans.size() > 1) {
    done =
        write_small_file(io, concat(directory, '/', kIndexName), index_json(plans, tensor_bytes));
    exported.files.emplace_back(kIndexName);
  }
  if (done && options.config_json) {
    done = write_small_file(io, concat(directory, '/', kConfigName), *options.config_json);
    exported.files.emplace_back(kConfigName);
  }
  STEP("export: sync directory");
  if (done) done = io.sync_directory(directory);
  if (!done) return std::move(done).error();
  return exported;
}

void remove_all(uring::IoBackend& io, const std::string& path) {
  auto status = io.status(path);
  if (!status) return;
  if (status->kind != uring::FileKind::kDirectory) {
    (void)io.unlink(path);
    return;
  }
  auto entries = io.list_directory(path);
  if (!entries) return;
  for (const uring::DirectoryEntry& entry : *entries) {
    (void)io.unlink(concat(path, '/', entry.name));
  }
  (void)io.remove_directory(path);
}

Status check_replaceable(uring::IoBackend& io, const std::string& path, ExportTarget::Kind kind,
                         ExportTarget::IsOurs is_ours) {
  auto status = io.status(path);
  if (!status) return std::move(status).error();
  const bool is_file = kind == ExportTarget::Kind::kFile;
  if (status->kind != (is_file ? uring::FileKind::kRegular : uring::FileKind::kDirectory)) {
    return Error(Code::kInvalidArgument,
                 concat(path, " is not a ", is_file ? "regular file" : "directory",
                        ", which this format makes; choose another name"));
  }
  if (is_file) return ok();
  auto entries = io.list_directory(path);
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    if (entry.kind == uring::FileKind::kRegular && is_ours(entry.name)) continue;
    return Error(Code::kInvalidArgument,
                 concat(path, " holds ", entry.name,
                        ", which no export of this format has made; it is not replaced"));
  }
  return ok();
}

}  // namespace

Result<ExportTarget> ExportTarget::prepare(uring::IoBackend& io, const std::string& path, Kind kind,
                                           bool replaces, IsOurs is_ours) {
  ExportTarget target;
  const std::string parent = parent_of(path);
  target.path_ = concat(parent == "/" ? "" : parent, '/', last_component(path));
  target.partial_ = target.path_ + ".partial";
  target.kind_ = kind;
  if (io.status(target.path_)) {
    if (!replaces) {
      return Error(Code::kInvalidArgument, concat(path, " exists already; --force replaces it"));
    }
    auto replaceable = check_replaceable(io, target.path_, kind, is_ours);
    if (!replaceable) return std::move(replaceable).error();
    target.replaces_ = true;
  }
  if (io.status(target.partial_)) {
    return Error(Code::kInvalidArgument,
                 concat(target.partial_,
                        " is in the way: another export writes it, or one that "
                        "was stopped has left it; then remove it"));
  }
  return target;
}

Status ExportTarget::publish(uring::IoBackend& io) const {
  STEP("export: rename to the final name");
  uring::RenameMode mode = uring::RenameMode::kNoReplace;
  if (replaces_) {
    mode = kind_ == Kind::kFile ? uring::RenameMode::kReplace : uring::RenameMode::kExchange;
  }
  auto done = io.rename(partial_, path_, mode);
  if (!done) return done;
  STEP("export: sync parent directory");
  done = io.sync_directory(parent_of(path_));
  if (!done) {
    // What is not durable goes back, where discard() finds it; but a file that was replaced is
    // gone.
    if (mode != uring::RenameMode::kReplace) (void)io.rename(path_, partial_, mode);
    return done;
  }
  if (mode == uring::RenameMode::kExchange) remove_all(io, partial_);  // The old one.
  return ok();
}

void ExportTarget::discard(uring::IoBackend& io) const { remove_all(io, partial_); }

Result<Exported> export_file(uring::IoBackend& io, const OpenPart& part, const ExportTarget& target,
                             Bytes staging, const Progress& progress) {
  Exported exported;
  FilePlan plan{
      .name = part.file_name, .tensors = part.image.tensors, .metadata = part.image.metadata};
  note_dtypes(plan, exported);
  const PartRange range =
      exported.as_u8.empty() ? PartRange{.begin = 0, .end = part.bytes} : range_of(part, plan);
  auto done = write_file(io, part, target.partial(), range, staging, progress);
  if (done) done = target.publish(io);
  if (!done) {
    target.discard(io);
    return std::move(done).error();
  }
  exported.bytes = range.head.size() + (range.end - range.begin);
  exported.files.push_back(plan.name);
  return exported;
}

Result<Exported> export_hf(uring::IoBackend& io, const OpenPart& part, const HfOptions& options,
                           const ExportTarget& target, Bytes staging, const Progress& progress) {
  STEP("export: make directory");
  auto done = io.make_directory(target.partial());
  if (!done) return std::move(done).error();
  auto exported = write_hf(io, part, options, target.partial(), staging, progress);
  if (exported) {
    done = target.publish(io);
    if (!done) exported = std::move(done).error();
  }
  if (!exported) target.discard(io);
  return exported;
}

bool is_hf_file(std::string_view file_name) {
  return file_name == kWholeName || file_name == kIndexName || file_name == kConfigName ||
         (file_name.starts_with("model-") && file_name.ends_with(".safetensors"));
}

std::vector<std::span<const format::PlacedTensor>> split_into_shards(
    std::span<const format::PlacedTensor> tensors, std::uint64_t bytes_max) {
  std::vector<std::span<const format::PlacedTensor>> shards;
  std::size_t first = 0;
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (i > first && (bytes > bytes_max || tensors[i].bytes > bytes_max - bytes)) {
      shards.push_back(tensors.subspan(first, i - first));
      first = i;
      bytes = 0;
    }
    bytes += tensors[i].bytes;
  }
  shards.push_back(tensors.subspan(first));
  return shards;
}

}  // namespace stillframe::catalog
