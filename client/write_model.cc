#include "client/write_model.h"

#include <optional>
#include <utility>
#include <vector>

#include "base/os_error.h"
#include "base/out_of_memory.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/aligned_memory.h"
#include "catalog/records.h"
#include "catalog/run_files.h"
#include "client/capture_sources.h"
#include "client/layout.h"
#include "client/part_writer.h"
#include "client/temporary.h"
#include "format/file_hashes.h"
#include "format/manifest.h"
#include "format/names.h"

namespace stillframe::client {

namespace {

Error invalid(const std::string& path, std::string_view why) {
  return Error(Code::kInvalidArgument, concat(path, ": ", why));
}

// A part's file, open until the end: that tells other writers that its owner lives.
class PartFile {
 public:
  static Result<PartFile> create(uring::IoBackend& io, std::string path, std::uint64_t bytes) {
    STEP("write: create part");
    auto id = io.open(path, uring::OpenMode::kCreateDirect);
    if (!id) return std::move(id).error();
    PartFile file(io, *id, bytes);
    if (int e = STEP_ERROR("write: allocate part"); e != 0) {
      return os_error(concat("allocate ", path), e);
    }
    auto allocated = io.allocate(*id, round_up(bytes, kBlockBytes));
    if (!allocated) return std::move(allocated).error();
    return file;
  }
  PartFile(PartFile&& other) noexcept
      : io_(std::exchange(other.io_, nullptr)), id_(other.id_), bytes_(other.bytes_) {}
  PartFile& operator=(PartFile&& other) noexcept {
    PartFile taken(std::move(other));
    std::swap(io_, taken.io_);
    std::swap(id_, taken.id_);
    std::swap(bytes_, taken.bytes_);
    return *this;
  }
  ~PartFile() {
    if (io_ != nullptr) io_->close(id_);
  }

  uring::FileId id() const noexcept { return id_; }
  // O_DIRECT wrote whole blocks; the file ends with the last tensor's last byte.
  Status make_durable() {
    STEP("write: cut part to its length");
    auto cut = io_->truncate(id_, bytes_);
    if (!cut) return cut;
    if (int e = STEP_ERROR("write: fsync part"); e != 0) return os_error("fsync part", e);
    return io_->sync(id_);
  }

 private:
  PartFile(uring::IoBackend& io, uring::FileId id, std::uint64_t bytes)
      : io_(&io), id_(id), bytes_(bytes) {}

  uring::IoBackend* io_;
  uring::FileId id_;
  std::uint64_t bytes_;
};

Status sync_parent(uring::IoBackend& io, const std::string& path) {
  const std::string parent = catalog::parent_of(path);
  if (int e = STEP_ERROR("write: fsync parent directory"); e != 0) {
    return os_error(concat("fsync ", parent), e);
  }
  return io.sync_directory(parent);
}

// --- A whole model -------------------------------------------------------------------------------

// How the new directory takes the name.
enum class Takeover : std::uint8_t { kNew, kEmptyDirectory, kExchange };

Result<Takeover> look_at_target(uring::IoBackend& io, const std::string& path) {
  auto status = io.status(path);
  if (!status && status.error().code() == Code::kNotFound) return Takeover::kNew;
  if (!status) return std::move(status).error();
  if (status->kind != uring::FileKind::kDirectory) {
    return invalid(path, "is there already and is no whole model");
  }
  auto text = catalog::read_small_file(io, concat(path, '/', format::kManifestName),
                                       format::kManifestBytesMax);
  if (!text && catalog::says_nothing(text.error())) return std::move(text).error();
  if (text) {
    auto manifest = format::decode_manifest(*text);
    if (!manifest && catalog::says_nothing(manifest.error())) return std::move(manifest).error();
    if (manifest && manifest->sequence == 0) return Takeover::kExchange;
    return invalid(path, "holds a checkpoint that is no whole model; choose another path");
  }
  auto entries = io.list_directory(path);
  if (!entries) return std::move(entries).error();
  if (entries->empty()) return Takeover::kEmptyDirectory;
  return invalid(path, "is a directory with other files in it; choose another path");
}

// What the manifest says before the parts are known.
format::Manifest manifest_of(const WriteRequest& request) {
  format::Manifest manifest;
  manifest.run_id = request.run_id;
  manifest.sequence = 0;  // No checkpoint of a run has it: the mark of a whole model.
  manifest.wall_ns = request.wall_ns;
  manifest.stillframe_version = STILLFRAME_VERSION;
  manifest.framework = request.framework;
  manifest.python_version = request.python_version;
  manifest.has_pickle = request.has_pickle;
  return manifest;
}

// Fills the temporary directory; `files` keeps its parts open.
Status write_directory(uring::IoBackend& io, const CaptureSources& sources,
                       const WriteRequest& request, const std::string& directory,
                       std::vector<PartFile>& files) {
  auto staging = catalog::allocate_aligned(PartWriter::kStagingBytes);
  if (!staging) return std::move(staging).error();
  const Layout& layout = sources.layout();
  format::Manifest manifest = manifest_of(request);
  std::vector<std::vector<std::uint64_t>> hashes;
  for (std::size_t i = 0; i < layout.parts.size(); ++i) {
    const LayoutPart& part = layout.parts[i];
    const std::string name = format::part_file_name(part.image.name, 0, 1);
    auto file = PartFile::create(io, concat(directory, '/', name), part.image.bytes);
    if (!file) return std::move(file).error();
    files.push_back(*std::move(file));
    PartWriter writer(io, files.back().id(), part, sources.of_part(i), staging->bytes());
    auto written = writer.write(0, part.extent_count);
    if (!written) return written;
    auto durable = files.back().make_durable();
    if (!durable) return durable;
    manifest.parts.push_back(
        {.file = name, .bytes = part.image.bytes, .root = format::root_of(writer.hashes())});
    hashes.push_back(std::move(writer.hashes()));
  }

  return catalog::write_records(io, directory, hashes, {&request.state_json, 1}, manifest);
}

uring::RenameMode mode_of(Takeover takeover) noexcept {
  switch (takeover) {
    case Takeover::kNew: return uring::RenameMode::kNoReplace;
    case Takeover::kEmptyDirectory: return uring::RenameMode::kReplace;
    case Takeover::kExchange: return uring::RenameMode::kExchange;
  }
  return uring::RenameMode::kNoReplace;
}

// Whatever comes of it, nobody needs what has the temporary name afterwards: after an exchange that
// is the old model, after an error the new one, else there is nothing.
Status publish_directory(uring::IoBackend& io, const std::string& directory,
                         const std::string& path, Takeover takeover) {
  STEP("write: rename to the final name");
  auto done = io.rename(directory, path, mode_of(takeover));
  if (done) {
    done = or_out_of_memory([&] { return sync_parent(io, path); });
    if (!done) {
      // An unpromised model must not turn up beside the error that its owner was given.
      const auto undone =
          io.rename(path, directory,
                    takeover == Takeover::kExchange ? uring::RenameMode::kExchange
                                                    : uring::RenameMode::kNoReplace);
      if (!undone) return done;
    }
  }
  STEP("write: remove what the temporary name holds");
  (void)or_out_of_memory([&] {
    catalog::remove_files(io, directory);
    return ok();
  });
  return done;
}

Status check_model_request(const WriteRequest& request) {
  const std::string name = catalog::last_component(request.path);
  if (name.empty() || name == "." || name == ".." || name == "/") {
    return invalid(request.path, "is no name for a whole model");
  }
  if (format::parse_checkpoint_directory_name(name)) {
    return invalid(request.path, "is a name for a run's checkpoint; choose another one");
  }
  if (request.state_json.size() > format::kStateBytesMax) {
    return invalid(request.path, concat("the state has ", request.state_json.size(),
                                        " bytes, at most ", format::kStateBytesMax));
  }
  return ok();
}

// --- One file ------------------------------------------------------------------------------------

// The layout of a part whose metadata has room for the hashes of all its extents. Their number
// decides the header's length, and that the number: it only grows, and settles at once or soon.
Result<std::shared_ptr<const Layout>> layout_with_hashes(const sf_part& part) {
  if (part.metadata == nullptr && part.metadata_count != 0) {
    return Error(Code::kInvalidArgument, "the file has a metadata count without an array");
  }
  std::vector<const char*> metadata(part.metadata, part.metadata + 2 * part.metadata_count);
  sf_part with_hashes = part;
  with_hashes.name = "file";
  std::uint64_t extent_count = 1;
  for (;;) {
    const std::string digits = format::blank_file_hashes(extent_count);
    std::vector<const char*> words = metadata;
    words.push_back(format::kFileHashesKey.data());
    words.push_back(digits.c_str());
    with_hashes.metadata = words.data();
    with_hashes.metadata_count = part.metadata_count + 1;
    auto layout = make_layout({&with_hashes, 1});
    if (!layout) return layout;
    const LayoutPart& made = (*layout)->parts.front();
    if (!made.image.metadata.contains(std::string(format::kFileStateKey))) {
      return Error(Code::kInvalidArgument,
                   concat("the metadata of a file must have ", format::kFileStateKey));
    }
    if (made.extent_count == extent_count) return layout;
    extent_count = made.extent_count;
  }
}

// The data first; the header, which holds the hashes of all, last.
Status write_contents(uring::IoBackend& io, const CaptureSources& sources, const PartFile& file) {
  auto staging = catalog::allocate_aligned(PartWriter::kStagingBytes);
  if (!staging) return std::move(staging).error();
  const LayoutPart& part = sources.layout().parts.front();
  std::string header = part.image.header;
  std::vector<kernels::Source> of_part(sources.of_part(0).begin(), sources.of_part(0).end());
  of_part.front().data = reinterpret_cast<const std::byte*>(header.data());

  PartWriter writer(io, file.id(), part, of_part, staging->bytes());
  const auto head_extents = static_cast<std::uint32_t>(format::extent_count(header.size()));
  auto written = writer.write(head_extents, part.extent_count);
  if (!written) return written;
  writer.hash(0, head_extents);
  format::fill_file_hashes(format::find_file_hashes(header), writer.hashes());
  return writer.write(0, head_extents);
}

Status check_file_target(uring::IoBackend& io, const std::string& path) {
  auto status = io.status(path);
  if (!status && status.error().code() == Code::kNotFound) return ok();
  if (!status) return std::move(status).error();
  if (status->kind != uring::FileKind::kRegular) return invalid(path, "is no regular file");
  return ok();
}

// Only what the host can read.
Status fill(CaptureSources& sources, std::span<const sf_source> given) {
  for (const sf_source& source : given) {
    if (source.memory == SF_MEMORY_HOST) continue;
    return Error(Code::kInvalidArgument,
                 "write: a tensor is not in the host's memory; copy it there before");
  }
  return sources.fill(given);
}

}  // namespace

Status write_model(uring::IoBackend& io, std::span<const sf_part> parts,
                   std::span<const sf_source> given, const WriteRequest& request) {
  auto checked = check_model_request(request);
  if (!checked) return checked;
  auto layout = make_layout(parts);
  if (!layout) return std::move(layout).error();
  CaptureSources sources(*layout);
  auto filled = fill(sources, given);
  if (!filled) return filled;
  const auto takeover = look_at_target(io, request.path);
  if (!takeover) return takeover.error();
  const std::string parent = catalog::parent_of(request.path);
  auto made = catalog::make_directories(io, parent);
  if (!made) return made;

  remove_stale_temporaries(io, parent);
  const std::string directory = temporary_path(parent, request.nonce);
  STEP("write: make temporary directory");
  made = io.make_directory(directory);
  if (!made) return made;
  std::vector<PartFile> files;
  auto done =
      or_out_of_memory([&] { return write_directory(io, sources, request, directory, files); });
  if (done) return publish_directory(io, directory, request.path, *takeover);
  catalog::remove_files(io, directory);
  return done;
}

Status write_file(uring::IoBackend& io, const sf_part& part, std::span<const sf_source> given,
                  const WriteRequest& request) {
  auto checked = check_file_target(io, request.path);
  if (!checked) return checked;
  auto layout = layout_with_hashes(part);
  if (!layout) return std::move(layout).error();
  CaptureSources sources(*layout);
  auto filled = fill(sources, given);
  if (!filled) return filled;

  const std::string parent = catalog::parent_of(request.path);
  remove_stale_temporaries(io, parent);
  const std::string temporary = temporary_path(parent, request.nonce);
  std::optional<PartFile> file;  // Open until it has its name, so that nobody takes it for stale.
  auto done = or_out_of_memory([&]() -> Status {
    auto created = PartFile::create(io, temporary, (*layout)->bytes);
    if (!created) return std::move(created).error();
    file.emplace(*std::move(created));
    auto written = write_contents(io, sources, *file);
    if (!written) return written;
    return file->make_durable();
  });
  if (done) {
    STEP("write: rename to the final name");
    done = io.rename(temporary, request.path, uring::RenameMode::kReplace);
  }
  if (!done) {
    (void)io.unlink(temporary);
    return done;
  }
  return sync_parent(io, request.path);
}

}  // namespace stillframe::client
