#include "catalog/spool.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "catalog/run_files.h"

namespace stillframe::catalog {

namespace {

std::uint64_t spool_number(std::string_view name) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  if (error != std::errc() || end != name.data() + name.size()) return 0;
  return number;
}

struct SpoolFile {
  std::string path;
  uring::FileStatus status;

  bool is_recyclable() const noexcept {
    return status.kind == uring::FileKind::kRegular && status.link_count == 1;
  }
};

// Directories in the spool are not ours and left out.
Result<std::vector<SpoolFile>> list_spool(uring::IoBackend& io, const std::string& path) {
  std::vector<SpoolFile> files;
  auto entries = io.list_directory(path);
  if (!entries && entries.error().code() == Code::kNotFound) return files;
  if (!entries) return std::move(entries).error();
  for (const uring::DirectoryEntry& entry : *entries) {
    std::string file_path = concat(path, '/', entry.name);
    auto status = io.status(file_path);
    if (!status && status.error().code() == Code::kNotFound) continue;
    if (!status) return std::move(status).error();
    if (status->kind == uring::FileKind::kDirectory) continue;
    files.push_back({.path = std::move(file_path), .status = *status});
  }
  return files;
}

Status unlink_unfit(uring::IoBackend& io, const std::string& path) {
  STEP("C3 unlink unfit spool file");
  return unlink_if_there(io, path);
}

// Best first: the smallest that is large enough, then the others from the largest down.
void order_by_fit(std::vector<SpoolFile>& files, std::uint64_t wanted_bytes) {
  std::sort(files.begin(), files.end(), [wanted_bytes](const SpoolFile& a, const SpoolFile& b) {
    const bool a_is_enough = a.status.bytes >= wanted_bytes;
    const bool b_is_enough = b.status.bytes >= wanted_bytes;
    if (a_is_enough != b_is_enough) return a_is_enough;
    if (a.status.bytes != b.status.bytes) {
      return (a.status.bytes < b.status.bytes) == a_is_enough;
    }
    return a.path < b.path;
  });
}

// Opens the file, if it is nobody else's.
Result<std::optional<uring::FileId>> open_for_recycling(uring::IoBackend& io,
                                                        const SpoolFile& candidate) {
  if (!candidate.is_recyclable()) return std::optional<uring::FileId>();
  auto file = io.open(candidate.path, uring::OpenMode::kWriteDirect);
  if (!file) {
    // A file that may not be opened, or that somebody holds a lease on, is unfit; a drive or a
    // process in trouble is another matter.
    const bool is_unfit =
        file.error().code() == Code::kInvalidArgument || file.error().native() == EWOULDBLOCK;
    if (is_unfit) return std::optional<uring::FileId>();
    return std::move(file).error();
  }
  auto is_ours = io.take_for_writing(*file);
  if (!is_ours || !*is_ours) {
    io.close(*file);
    if (!is_ours) return std::move(is_ours).error();
    return std::optional<uring::FileId>();
  }
  return std::optional(*file);
}

}  // namespace

Spool::Spool(uring::IoBackend& io, const std::string& run_path, const SpoolLimits& limits)
    : io_(io), path_(spool_path(run_path)), limits_(limits) {}

Status Spool::count() {
  auto files = list_spool(io_, path_);
  if (!files) return std::move(files).error();
  for (const SpoolFile& file : *files) {
    ++file_count_;
    bytes_ += file.status.bytes;
    next_number_ = std::max(next_number_, spool_number(last_component(file.path)) + 1);
  }
  is_counted_ = true;
  return ok();
}

Result<bool> Spool::take_in(const std::string& path) {
  if (limits_.file_count_max == 0 || limits_.bytes_max == 0) return false;
  auto status = io_.status(path);
  if (!status) return std::move(status).error();
  if (status->kind != uring::FileKind::kRegular || status->link_count != 1) return false;
  if (!is_counted_) {
    auto counted = count();
    if (!counted) return std::move(counted).error();
  }
  if (file_count_ >= limits_.file_count_max || bytes_ > limits_.bytes_max ||
      status->bytes > limits_.bytes_max - bytes_) {
    return false;
  }
  STEP("C13 move part to spool");
  auto moved = io_.rename(path, concat(path_, '/', next_number_), uring::RenameMode::kNoReplace);
  if (!moved) return std::move(moved).error();
  ++next_number_;
  ++file_count_;
  bytes_ += status->bytes;
  has_moved_ = true;
  return true;
}

Status Spool::sync() {
  if (!has_moved_) return ok();
  if (int e = STEP_ERROR("C13 sync spool"); e != 0) return os_error(concat("fsync ", path_), e);
  return io_.sync_directory(path_);
}

Result<std::optional<uring::FileId>> take_from_spool(uring::IoBackend& io,
                                                     const std::string& run_path,
                                                     std::uint64_t bytes,
                                                     const std::string& target_path) {
  auto files = list_spool(io, spool_path(run_path));
  if (!files) return std::move(files).error();
  // Retired parts have their exact length, the request may have whole blocks: the same blocks fit.
  constexpr std::uint64_t kBytesMax = UINT64_MAX - kBlockBytes;
  for (SpoolFile& file : *files) {
    file.status.bytes = round_up(std::min(file.status.bytes, kBytesMax), kBlockBytes);
  }
  order_by_fit(*files, round_up(std::min(bytes, kBytesMax), kBlockBytes));

  for (const SpoolFile& candidate : *files) {
    auto file = open_for_recycling(io, candidate);
    if (!file) return file;
    if (!*file) {
      auto unlinked = unlink_unfit(io, candidate.path);
      if (!unlinked) return std::move(unlinked).error();
      continue;
    }
    STEP("C3 move part from spool");
    auto moved = io.rename(candidate.path, target_path, uring::RenameMode::kNoReplace);
    if (!moved) {
      io.close(**file);
      return std::move(moved).error();
    }
    return file;
  }
  return std::optional<uring::FileId>();
}

Result<std::uint64_t> empty_spool(uring::IoBackend& io, const std::string& run_path) {
  auto files = list_spool(io, spool_path(run_path));
  if (!files) return std::move(files).error();
  std::uint64_t freed_bytes = 0;
  for (const SpoolFile& file : *files) {
    STEP("C1 unlink spool file");
    auto unlinked = unlink_if_there(io, file.path);
    if (!unlinked) return std::move(unlinked).error();
    if (file.is_recyclable()) freed_bytes += file.status.bytes;
  }
  if (!files->empty()) {
    STEP("C1 sync emptied spool");
    auto synced = io.sync_directory(spool_path(run_path));
    if (!synced) return std::move(synced).error();
  }
  return freed_bytes;
}

}  // namespace stillframe::catalog
