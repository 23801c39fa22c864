#include "catalog/run_files.h"

#include <charconv>
#include <utility>

#include "base/os_error.h"
#include "base/step.h"
#include "base/text.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

std::string_view without_trailing_slashes(std::string_view path) {
  while (path.size() > 1 && path.back() == '/') path.remove_suffix(1);
  return path;
}

}  // namespace

std::string private_path(const std::string& run_path) {
  return concat(run_path, '/', format::kPrivateDirectory);
}

std::string spool_path(const std::string& run_path) {
  return concat(private_path(run_path), '/', format::kSpoolDirectory);
}

std::string tags_path(const std::string& run_path) {
  return concat(private_path(run_path), '/', format::kTagsDirectory);
}

std::string last_component(std::string_view path) {
  path = without_trailing_slashes(path);
  return std::string(path.substr(path.rfind('/') + 1));  // npos + 1 is 0.
}

std::string parent_of(std::string_view path) {
  path = without_trailing_slashes(path);
  const std::size_t slash = path.rfind('/');
  if (slash == std::string_view::npos) return ".";
  if (slash == 0) return "/";
  return std::string(without_trailing_slashes(path.substr(0, slash)));
}

Result<uring::FileStatus> directory_status(uring::IoBackend& io, const std::string& path) {
  auto status = io.status(path);
  if (status && status->kind == uring::FileKind::kSymlink) status = io.status(concat(path, "/."));
  if (status && status->kind != uring::FileKind::kDirectory) {
    return Error(Code::kInvalidArgument, concat(path, " is not a directory"));
  }
  return status;
}

Result<std::string> read_small_file(uring::IoBackend& io, const std::string& path,
                                    std::uint64_t bytes_max) {
  auto file = io.open(path, uring::OpenMode::kReadBuffered);
  if (!file) return std::move(file).error();
  auto bytes = io.read_all(*file, bytes_max);
  io.close(*file);
  return bytes;
}

void remove_files(uring::IoBackend& io, const std::string& directory) {
  // By listing, not by what was meant to be there: a half-made file must go too.
  auto entries = io.list_directory(directory);
  if (!entries) return;
  for (const uring::DirectoryEntry& entry : *entries) {
    (void)io.unlink(concat(directory, '/', entry.name));
  }
  (void)io.remove_directory(directory);
}

Status write_small_file(uring::IoBackend& io, const std::string& path, std::string_view bytes) {
  STEP("file: create");
  auto file = io.open(path, uring::OpenMode::kCreateBuffered);
  if (!file) return std::move(file).error();
  STEP("file: write");
  auto done = io.write_all(*file, bytes);
  if (done) {
    if (int e = STEP_ERROR("file: sync"); e != 0) {
      done = os_error(concat("fsync ", path), e);
    } else {
      done = io.sync(*file);
    }
  }
  io.close(*file);
  return done;
}

Status replace_file(uring::IoBackend& io, const std::string& directory, std::string_view name,
                    std::string_view bytes) {
  const std::string path = concat(directory, '/', name);
  const std::string unfinished = concat(path, kUnfinishedMark);
  auto done = unlink_if_there(io, unfinished);
  if (!done) return done;
  done = write_small_file(io, unfinished, bytes);
  if (!done) return done;
  STEP("file: rename");
  done = io.rename(unfinished, path, uring::RenameMode::kReplace);
  if (!done) return done;
  if (int e = STEP_ERROR("file: sync directory"); e != 0) {
    return os_error(concat("fsync ", directory), e);
  }
  return io.sync_directory(directory);
}

Status unlink_if_there(uring::IoBackend& io, const std::string& path) {
  auto unlinked = io.unlink(path);
  if (!unlinked && unlinked.error().code() == Code::kNotFound) return ok();
  return unlinked;
}

std::string sequence_text(std::uint64_t sequence) { return concat(sequence, '\n'); }

std::optional<std::uint64_t> parse_sequence_text(std::string_view text) {
  if (text.empty() || text.back() != '\n') return std::nullopt;
  text.remove_suffix(1);
  std::uint64_t sequence = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), sequence);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  if (sequence > kSequenceMax) return std::nullopt;
  return sequence;
}

Result<std::uint64_t> read_sequence_floor(uring::IoBackend& io, const std::string& run_path) {
  const std::string path = concat(private_path(run_path), '/', kSequenceFloorName);
  auto text = read_small_file(io, path, kBlockBytes);
  if (!text && text.error().code() == Code::kNotFound) return std::uint64_t{0};
  if (!text) return std::move(text).error();
  const auto sequence = parse_sequence_text(*text);
  if (!sequence) {
    return Error(Code::kDataLoss,
                 concat(path,
                        " is damaged; write the highest sequence that this run ever used "
                        "into it"));
  }
  return *sequence;
}

Status raise_sequence_floor(uring::IoBackend& io, const std::string& run_path,
                            std::uint64_t sequence) {
  auto floor = read_sequence_floor(io, run_path);
  if (!floor) return std::move(floor).error();
  if (*floor >= sequence) return ok();
  STEP("C12 record sequence floor");
  return replace_file(io, private_path(run_path), kSequenceFloorName, sequence_text(sequence));
}

}  // namespace stillframe::catalog
