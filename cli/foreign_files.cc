#include "cli/foreign_files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/os_error.h"
#include "base/text.h"
#include "catalog/export.h"
#include "cli/model_config.h"
#include "format/json_tree.h"
#include "format/names.h"
#include "format/safetensors.h"

namespace stillframe::cli {

namespace {

constexpr std::uint64_t kJsonBytesMax = std::uint64_t{256} << 20;
constexpr std::size_t kLengthBytes = 8;

Result<std::string> read_text(const std::string& path) {
  auto file = ForeignFile::open(path);
  if (!file) return std::move(file).error();
  if (file->bytes() > kJsonBytesMax) {
    return Error(Code::kInvalidArgument, concat(path, ": ", file->bytes(), " bytes are too many"));
  }
  std::string text(file->bytes(), '\0');
  auto read = file->read(0, std::as_writable_bytes(std::span(text)));
  if (!read) return std::move(read).error();
  return text;
}

Result<format::PartImage> read_header(const ForeignFile& file) {
  const auto damaged = [&](const Error& error) {
    return Error(error.code(), concat(file.path(), ": ", error.message()));
  };
  std::array<std::byte, kLengthBytes> length{};
  if (file.bytes() < length.size()) {
    return Error(Code::kDataLoss, concat(file.path(), ": ", file.bytes(),
                                         " bytes are too few for a safetensors file"));
  }
  auto read = file.read(0, length);
  if (!read) return std::move(read).error();
  auto bytes = format::header_bytes(length, file.bytes());
  if (!bytes) return damaged(bytes.error());
  std::string header(*bytes, '\0');
  read = file.read(0, std::as_writable_bytes(std::span(header)));
  if (!read) return std::move(read).error();
  auto image = format::decode_part("model", std::as_bytes(std::span(header)), file.bytes());
  if (!image) return damaged(image.error());
  return image;
}

// Gives tensors that an export stored as U8 their dtypes back.
Status restore_dtypes(const std::string& path, format::PartSpec& part) {
  const auto noted = part.metadata.find(std::string(catalog::kDtypesKey));
  if (noted == part.metadata.end()) return ok();
  auto dtypes = format::read_json_tree(noted->second, 2);
  if (!dtypes) return std::move(dtypes).error();
  for (std::size_t i = 0; i < dtypes->keys.size(); ++i) {
    const auto dtype = format::parse_dtype(dtypes->items[i].text);
    const auto tensor =
        std::find_if(part.tensors.begin(), part.tensors.end(),
                     [&](const format::TensorSpec& one) { return one.name == dtypes->keys[i]; });
    if (!dtype || format::element_bytes(*dtype) != 1 || tensor == part.tensors.end() ||
        tensor->dtype != format::Dtype::kU8) {
      return Error(Code::kDataLoss, concat(path, ": ", catalog::kDtypesKey, " says that ",
                                           dtypes->keys[i], " is ", dtypes->items[i].text));
    }
    tensor->dtype = *dtype;
  }
  part.metadata.erase(noted);
  return ok();
}

// Adds the tensors of one safetensors file to the plan's part.
Status add_file(ImportPlan& plan, const std::string& path) {
  auto file = ForeignFile::open(path);
  if (!file) return std::move(file).error();
  auto image = read_header(*file);
  if (!image) return std::move(image).error();
  format::PartSpec& part = plan.checkpoint.parts[0];
  for (const format::PlacedTensor& tensor : image->tensors) {
    const Segment segment{
        .file = plan.files.size(), .offset = tensor.offset, .bytes = tensor.bytes};
    const bool is_new = plan.sources[0].try_emplace(tensor.spec.name, 1, segment).second;
    if (!is_new) {
      return Error(Code::kDataLoss,
                   concat(path, ": the tensor ", tensor.spec.name, " is in another shard too"));
    }
    part.tensors.push_back(tensor.spec);
  }
  part.metadata.merge(image->metadata);
  plan.files.push_back(*std::move(file));
  return restore_dtypes(path, part);
}

ImportPlan plan_of_one_part(const std::string& name) {
  ImportPlan plan;
  plan.checkpoint.parts.push_back({.name = name, .tensors = {}, .metadata = {}});
  plan.checkpoint.state_json = "{\"format_version\": 1}\n";
  plan.sources.resize(1);
  return plan;
}

const format::JsonValue* member(const format::JsonValue& object, std::string_view key) {
  const auto found = std::find(object.keys.begin(), object.keys.end(), key);
  if (found == object.keys.end()) return nullptr;
  return &object.items[static_cast<std::size_t>(found - object.keys.begin())];
}

// Each tensor's file, as model.safetensors.index.json has it.
Result<std::map<std::string, std::string>> read_index(const std::string& path) {
  auto text = read_text(path);
  if (!text) return std::move(text).error();
  auto index = format::read_json_tree(*text, 16);
  if (!index) return Error(Code::kDataLoss, concat(path, ": ", index.error().message()));
  const format::JsonValue* const files = member(*index, "weight_map");
  if (files == nullptr || files->kind != format::JsonValue::Kind::kObject) {
    return Error(Code::kDataLoss, concat(path, ": has no weight_map"));
  }
  std::map<std::string, std::string> map;
  for (std::size_t i = 0; i < files->keys.size(); ++i) {
    // A file of this directory and no path out of it.
    if (auto named = format::check_name("shard", files->items[i].text); !named) {
      return Error(Code::kDataLoss, concat(path, ": ", named.error().message()));
    }
    map.emplace(files->keys[i], files->items[i].text);
  }
  return map;
}

Status add_shards(ImportPlan& plan, const std::string& directory,
                  const std::map<std::string, std::string>& index) {
  std::set<std::string> shards;
  for (const auto& [tensor, file] : index) shards.insert(file);
  for (const std::string& shard : shards) {
    auto added = add_file(plan, concat(directory, '/', shard));
    if (!added && added.error().code() == Code::kNotFound) {
      return Error(Code::kNotFound, concat(directory, ": the index names the shard ", shard,
                                           ", which is missing; fetch it again"));
    }
    if (!added) return added;
  }
  for (const auto& [tensor, file] : index) {
    const auto found = plan.sources[0].find(tensor);
    if (found != plan.sources[0].end() &&
        plan.files[found->second[0].file].path() == concat(directory, '/', file)) {
      continue;
    }
    return Error(Code::kDataLoss, concat(directory, ": the index says that ", tensor, " is in ",
                                         file, ", and it is not"));
  }
  if (index.size() != plan.sources[0].size()) {
    return Error(Code::kDataLoss, concat(directory, ": the shards hold ", plan.sources[0].size(),
                                         " tensors, the index ", index.size()));
  }
  return ok();
}

}  // namespace

Result<ForeignFile> ForeignFile::open(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return os_error(concat("open ", path), errno);
  return of(std::move(fd), path);
}

Result<ForeignFile> ForeignFile::of_scratch(UniqueFd fd) { return of(std::move(fd), "scratch"); }

Result<ForeignFile> ForeignFile::of(UniqueFd fd, const std::string& path) {
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return os_error(concat("stat ", path), errno);
  if (!S_ISREG(status.st_mode)) {
    return Error(Code::kInvalidArgument, concat(path, " is not a regular file"));
  }
  (void)::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
  return ForeignFile(std::move(fd), path, static_cast<std::uint64_t>(status.st_size));
}

Status ForeignFile::read(std::uint64_t offset, Bytes target) const {
  while (!target.empty()) {
    const ssize_t count =
        ::pread(fd_.get(), target.data(), target.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return os_error(concat("read ", path_), errno);
    if (count == 0) {
      return Error(Code::kDataLoss, concat(path_, ": ends at ", offset, ", while it is read"));
    }
    offset += static_cast<std::uint64_t>(count);
    target = target.subspan(static_cast<std::size_t>(count));
  }
  return ok();
}

Status ImportPlan::check() const {
  for (std::size_t i = 0; i < checkpoint.parts.size(); ++i) {
    for (const format::TensorSpec& tensor : checkpoint.parts[i].tensors) {
      const auto found = sources[i].find(tensor.name);
      auto wanted = format::tensor_bytes(tensor);
      if (!wanted) return std::move(wanted).error();
      std::uint64_t bytes = 0;
      bool is_within = found != sources[i].end();
      if (is_within) {
        for (const Segment& segment : found->second) {
          is_within = is_within && segment.file < files.size() &&
                      segment.offset <= files[segment.file].bytes() &&
                      segment.bytes <= files[segment.file].bytes() - segment.offset;
          bytes += segment.bytes;
        }
      }
      if (is_within && bytes == *wanted) continue;
      return Error(Code::kInvalidArgument,
                   concat("the tensor ", tensor.name, " has ", *wanted,
                          " bytes, and the files do not hold them where they should"));
    }
  }
  return ok();
}

Status ImportPlan::fill(const catalog::TensorSlice& slice, Bytes target) const {
  const auto found = sources[slice.part].find(slice.tensor);
  ::stillframe::check(found != sources[slice.part].end(), "a planned tensor has its sources");
  std::uint64_t skipped = slice.offset;
  for (const Segment& segment : found->second) {
    if (target.empty()) break;
    if (skipped >= segment.bytes) {
      skipped -= segment.bytes;
      continue;
    }
    const std::size_t bytes = std::min<std::uint64_t>(segment.bytes - skipped, target.size());
    auto read = files[segment.file].read(segment.offset + skipped, target.first(bytes));
    if (!read) return read;
    target = target.subspan(bytes);
    skipped = 0;
  }
  ::stillframe::check(target.empty(), "a tensor's segments are its bytes");
  return ok();
}

Result<ImportPlan> plan_safetensors(const std::string& path, const std::string& part) {
  ImportPlan plan = plan_of_one_part(part);
  auto added = add_file(plan, path);
  if (!added) return std::move(added).error();
  return plan;
}

Result<ImportPlan> plan_hf(const std::string& directory) {
  ImportPlan plan = plan_of_one_part("model");
  const std::string index_path = concat(directory, "/model.safetensors.index.json");
  auto index = read_index(index_path);
  if (index) {
    auto added = add_shards(plan, directory, *index);
    if (!added) return std::move(added).error();
  } else if (index.error().code() != Code::kNotFound) {
    return std::move(index).error();
  } else {
    auto added = add_file(plan, concat(directory, "/model.safetensors"));
    if (!added && added.error().code() == Code::kNotFound) {
      return Error(Code::kNotFound, concat(directory,
                                           " has neither model.safetensors nor "
                                           "model.safetensors.index.json"));
    }
    if (!added) return std::move(added).error();
  }
  auto config = read_text(concat(directory, "/config.json"));
  if (config) {
    auto state = state_with_config(*config);
    if (state) {
      plan.checkpoint.state_json = *std::move(state);
    } else {
      plan.notes.emplace_back("config.json is left out: it is not a JSON object");
    }
  } else if (config.error().code() != Code::kNotFound) {
    return std::move(config).error();
  }
  return plan;
}

}  // namespace stillframe::cli
