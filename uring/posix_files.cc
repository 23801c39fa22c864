#include "uring/posix_files.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <memory>
#include <utility>

#include "base/os_error.h"
#include "base/text.h"

namespace stillframe::uring {

namespace {

constexpr mode_t kFileMode = 0600;
constexpr mode_t kDirectoryMode = 0700;

unsigned rename_flags(RenameMode mode) noexcept {
  switch (mode) {
    case RenameMode::kNoReplace: return RENAME_NOREPLACE;
    case RenameMode::kReplace: return 0;
    case RenameMode::kExchange: return RENAME_EXCHANGE;
  }
  return RENAME_NOREPLACE;
}

FileKind kind_of(mode_t mode) noexcept {
  if (S_ISREG(mode)) return FileKind::kRegular;
  if (S_ISDIR(mode)) return FileKind::kDirectory;
  if (S_ISLNK(mode)) return FileKind::kSymlink;
  return FileKind::kOther;
}

FileStatus from_stat(const struct stat& stat) noexcept {
  return {.kind = kind_of(stat.st_mode),
          .bytes = static_cast<std::uint64_t>(stat.st_size),
          .link_count = stat.st_nlink,
          .owner_uid = stat.st_uid};
}

// Repeats `call` while a signal interrupts it; 0 or the errno.
template <class Call>
int until_uninterrupted(Call call) noexcept {
  while (call() != 0) {
    if (errno != EINTR) return errno;
  }
  return 0;
}

int open_flags(OpenMode mode) noexcept {
  // O_NONBLOCK: a FIFO planted under the name must not hold us up; taken off again by set_flags().
  constexpr int kAlways = O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOCTTY;
  switch (mode) {
    case OpenMode::kReadDirect:
    case OpenMode::kReadBuffered: return kAlways | O_RDONLY;
    case OpenMode::kWriteDirect: return kAlways | O_RDWR;
    case OpenMode::kCreateDirect:
    case OpenMode::kCreateBuffered: return kAlways | O_RDWR | O_CREAT | O_EXCL;
  }
  return kAlways | O_RDONLY;
}

// Blocking again, for io_uring answers EAGAIN on an O_NONBLOCK file where the file system cannot
// promise not to block; and O_DIRECT where the mode asks for it. That comes after open() because a
// file system without O_DIRECT refuses an O_CREAT|O_DIRECT open when the file is already there.
// Returns whether O_DIRECT was wanted and refused.
bool set_flags(int fd, OpenMode mode) noexcept {
  const int flags = ::fcntl(fd, F_GETFL) & ~O_NONBLOCK;
  if (!is_direct(mode)) {
    (void)::fcntl(fd, F_SETFL, flags);
    return false;
  }
  if (::fcntl(fd, F_SETFL, flags | O_DIRECT) == 0) return false;
  (void)::fcntl(fd, F_SETFL, flags);
  return true;
}

Result<UniqueFd> open_directory(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return os_error(concat("open directory ", path), errno);
  return fd;
}

Result<FileKind> entry_kind(int directory, const dirent& entry, const std::string& path) {
  switch (entry.d_type) {
    case DT_REG: return FileKind::kRegular;
    case DT_DIR: return FileKind::kDirectory;
    case DT_LNK: return FileKind::kSymlink;
    case DT_UNKNOWN: break;  // This file system keeps no types in its directories.
    default: return FileKind::kOther;
  }
  struct stat stat {};
  if (::fstatat(directory, entry.d_name, &stat, AT_SYMLINK_NOFOLLOW) != 0) {
    return os_error(concat("stat ", path, "/", entry.d_name), errno);
  }
  return kind_of(stat.st_mode);
}

}  // namespace

Result<FileId> PosixFiles::open(const std::string& path, OpenMode mode) {
  UniqueFd fd(::open(path.c_str(), open_flags(mode), kFileMode));
  if (!fd && errno == EWOULDBLOCK) {
    // Somebody's lease, such as that of take_for_writing(), which ends when they close the file.
    return Error(Code::kUnavailable, concat("open ", path, ": in use under a lease"), EWOULDBLOCK);
  }
  if (!fd) return os_error(concat("open ", path), errno);
  struct stat stat {};
  if (::fstat(fd.get(), &stat) != 0) return os_error(concat("stat ", path), errno);
  if (!S_ISREG(stat.st_mode)) {
    return Error(Code::kInvalidArgument, concat("open ", path, ": not a regular file"));
  }
  OpenFile file;
  file.cached = set_flags(fd.get(), mode);
  file.fd = std::move(fd);
  file.facts = {.path = path, .mode = mode, .bytes = static_cast<std::uint64_t>(stat.st_size)};
  const FileId id{.value = next_id_++};
  files_.emplace(id.value, std::move(file));
  return id;
}

void PosixFiles::close(FileId file) noexcept {
  const auto found = files_.find(file.value);
  if (found == files_.end()) return;
  // The end of the descriptor is not always that of the lease: the kernel may hold the file a
  // little longer, for a request that it has answered, and refuses those who open it meanwhile.
  const OpenFile& open = found->second;
  if (open.has_lease) (void)::fcntl(open.fd.get(), F_SETLEASE, F_UNLCK);
  files_.erase(found);
}

Result<PosixFiles::OpenFile*> PosixFiles::find(FileId file) {
  const auto found = files_.find(file.value);
  if (found == files_.end()) {
    return Error(Code::kInvalidArgument, concat("file ", file.value, " is not open"));
  }
  return &found->second;
}

Result<PosixFiles::OpenFile*> PosixFiles::find_buffered(FileId file) {
  auto found = find(file);
  if (found && is_direct((*found)->facts.mode)) {
    return Error(Code::kInvalidArgument,
                 concat((*found)->facts.path, ": open for O_DIRECT, and one file has one mode"));
  }
  return found;
}

Result<FileStatus> PosixFiles::file_status(FileId file) {
  auto found = find(file);
  if (!found) return std::move(found).error();
  struct stat stat {};
  if (::fstat((*found)->fd.get(), &stat) != 0) {
    return os_error(concat("stat ", (*found)->facts.path), errno);
  }
  return from_stat(stat);
}

Status PosixFiles::write_all(FileId file, std::string_view bytes) {
  auto found = find_buffered(file);
  if (!found) return std::move(found).error();
  std::size_t moved_bytes = 0;
  while (moved_bytes < bytes.size()) {
    const ssize_t moved = ::pwrite((*found)->fd.get(), bytes.data() + moved_bytes,
                                   bytes.size() - moved_bytes, static_cast<off_t>(moved_bytes));
    if (moved < 0 && errno == EINTR) continue;
    // A full disk answers the rest of a short write with ENOSPC; nothing at all would loop for
    // ever.
    if (moved <= 0) {
      return os_error(concat("write ", (*found)->facts.path), moved < 0 ? errno : EIO);
    }
    moved_bytes += static_cast<std::size_t>(moved);
  }
  if ((*found)->facts.bytes < moved_bytes) (*found)->facts.bytes = moved_bytes;
  return ok();
}

Result<std::string> PosixFiles::read_all(FileId file, std::uint64_t bytes_max) {
  auto found = find_buffered(file);
  if (!found) return std::move(found).error();
  const std::string& path = (*found)->facts.path;
  auto status = file_status(file);
  if (!status) return std::move(status).error();
  if (status->bytes > bytes_max) {
    return Error(Code::kDataLoss, concat("read ", path, ": has ", status->bytes, " bytes, at most ",
                                         bytes_max, " were expected"));
  }
  std::string bytes(status->bytes, '\0');
  std::size_t moved_bytes = 0;
  while (moved_bytes < bytes.size()) {
    const ssize_t moved = ::pread((*found)->fd.get(), bytes.data() + moved_bytes,
                                  bytes.size() - moved_bytes, static_cast<off_t>(moved_bytes));
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0) return os_error(concat("read ", path), errno);
    if (moved == 0) break;  // Somebody cut it meanwhile; its checksum will tell.
    moved_bytes += static_cast<std::size_t>(moved);
  }
  bytes.resize(moved_bytes);
  return bytes;
}

Status PosixFiles::allocate(FileId file, std::uint64_t bytes) {
  auto found = find(file);
  if (!found) return std::move(found).error();
  OpenFile& open = **found;
  auto status = file_status(file);
  if (!status) return std::move(status).error();
  const auto length = static_cast<off_t>(bytes);
  if (status->bytes > bytes || bytes == 0) {
    auto cut = truncate(file, bytes);
    if (!cut || bytes == 0) return cut;
  }
  int number = until_uninterrupted([&] { return ::fallocate(open.fd.get(), 0, 0, length); });
  if (number == EOPNOTSUPP) {
    // Such a file system cannot promise the room; a full disk then shows at the writes.
    number = until_uninterrupted([&] { return ::ftruncate(open.fd.get(), length); });
  }
  if (number != 0) {
    return os_error(concat("allocate ", bytes, " bytes for ", open.facts.path), number);
  }
  open.facts.bytes = bytes;
  return ok();
}

Status PosixFiles::truncate(FileId file, std::uint64_t bytes) {
  auto found = find(file);
  if (!found) return std::move(found).error();
  OpenFile& open = **found;
  const int number =
      until_uninterrupted([&] { return ::ftruncate(open.fd.get(), static_cast<off_t>(bytes)); });
  if (number != 0) return os_error(concat("truncate ", open.facts.path, " to ", bytes), number);
  open.facts.bytes = bytes;
  return ok();
}

Status PosixFiles::sync(FileId file) {
  auto found = find(file);
  if (!found) return std::move(found).error();
  if (::fsync((*found)->fd.get()) != 0) {
    return os_error(concat("fsync ", (*found)->facts.path), errno);
  }
  return ok();
}

Result<bool> PosixFiles::take_for_writing(FileId file) {
  auto found = find(file);
  if (!found) return std::move(found).error();
  const int fd = (*found)->fd.get();
  const std::string& path = (*found)->facts.path;
  // The kernel tells the holder of a lease by SIGIO that somebody else wants the file, and SIGIO
  // ends a process by default. SIGURG is ignored by default, and after the lease is there F_SETOWN
  // takes us off the list altogether; see fcntl(2), "Leases".
  if (::fcntl(fd, F_SETSIG, SIGURG) != 0) return os_error(concat("set signal of ", path), errno);
  if (::fcntl(fd, F_SETLEASE, F_WRLCK) != 0) {
    // EAGAIN: open or mapped elsewhere. EACCES: another user's file. EINVAL: this file system has
    // no leases, so nobody can say who else is there.
    if (errno == EAGAIN || errno == EBUSY || errno == EACCES || errno == EINVAL) return false;
    return os_error(concat("lease ", path), errno);
  }
  (void)::fcntl(fd, F_SETOWN, 0);
  // Counted under the lease: a new link needs no open file, but one that was there before shows.
  auto status = file_status(file);
  if (!status) return std::move(status).error();
  if (status->link_count == 1) {
    (*found)->has_lease = true;
    return true;
  }
  (void)::fcntl(fd, F_SETLEASE, F_UNLCK);
  return false;
}

Result<FileStatus> PosixFiles::status(const std::string& path) {
  struct stat stat {};
  if (::lstat(path.c_str(), &stat) != 0) return os_error(concat("stat ", path), errno);
  return from_stat(stat);
}

Status PosixFiles::rename(const std::string& source, const std::string& target, RenameMode mode) {
  if (::renameat2(AT_FDCWD, source.c_str(), AT_FDCWD, target.c_str(), rename_flags(mode)) != 0) {
    return os_error(concat("rename ", source, " to ", target), errno);
  }
  return ok();
}

Status PosixFiles::unlink(const std::string& path) {
  if (::unlink(path.c_str()) != 0) return os_error(concat("unlink ", path), errno);
  return ok();
}

Status PosixFiles::make_directory(const std::string& path) {
  if (::mkdir(path.c_str(), kDirectoryMode) != 0) {
    return os_error(concat("make directory ", path), errno);
  }
  return ok();
}

Status PosixFiles::remove_directory(const std::string& path) {
  if (::rmdir(path.c_str()) != 0) return os_error(concat("remove directory ", path), errno);
  return ok();
}

Status PosixFiles::sync_directory(const std::string& path) {
  auto fd = open_directory(path);
  if (!fd) return std::move(fd).error();
  if (::fsync(fd->get()) != 0) return os_error(concat("fsync directory ", path), errno);
  return ok();
}

Result<std::vector<DirectoryEntry>> PosixFiles::list_directory(const std::string& path) {
  auto fd = open_directory(path);
  if (!fd) return std::move(fd).error();
  DIR* const stream = ::fdopendir(fd->get());
  if (stream == nullptr) return os_error(concat("list ", path), errno);
  const int directory = fd->release();  // The stream's now.
  struct Closer {
    void operator()(DIR* open) const noexcept { (void)::closedir(open); }
  };
  const std::unique_ptr<DIR, Closer> owner(stream);

  std::vector<DirectoryEntry> entries;
  for (;;) {
    errno = 0;  // The only way to tell the end from an error; see readdir(3).
    const dirent* const entry = ::readdir(stream);
    if (entry == nullptr && errno != 0) return os_error(concat("list ", path), errno);
    if (entry == nullptr) return entries;
    const std::string_view name = entry->d_name;
    if (name == "." || name == "..") continue;
    auto kind = entry_kind(directory, *entry, path);
    if (!kind && kind.error().code() == Code::kNotFound) continue;  // Gone since readdir().
    if (!kind) return std::move(kind).error();
    entries.push_back({.name = std::string(name), .kind = *kind});
  }
}

Status PosixFiles::make_symlink(const std::string& target, const std::string& path) {
  if (::symlink(target.c_str(), path.c_str()) != 0) {
    return os_error(concat("make link ", path), errno);
  }
  return ok();
}

Result<SpaceStatus> PosixFiles::space(const std::string& path) {
  struct statvfs stat {};
  const int number = until_uninterrupted([&] { return ::statvfs(path.c_str(), &stat); });
  if (number != 0) return os_error(concat("statvfs ", path), number);
  return SpaceStatus{.free_bytes = std::uint64_t{stat.f_bavail} * stat.f_frsize,
                     .total_bytes = std::uint64_t{stat.f_blocks} * stat.f_frsize};
}

int call(const Operation& operation) noexcept {
  const auto offset = static_cast<off_t>(operation.offset());
  ssize_t result = 0;
  switch (operation.request->kind) {
    case IoRequest::Kind::kRead:
      result = ::pread(operation.fd, operation.data(), operation.call_bytes(), offset);
      break;
    case IoRequest::Kind::kWrite:
      result = ::pwrite(operation.fd, operation.data(), operation.call_bytes(), offset);
      break;
    case IoRequest::Kind::kSync: result = ::fsync(operation.fd); break;
  }
  return result < 0 ? -errno : static_cast<int>(result);
}

void run_to_end(Operation& operation) {
  for (;;) {
    switch (complete(operation, call(operation))) {
      case Next::kFinished: return;
      case Next::kQueueAgain: break;
      case Next::kQueueAfterPause: pause_before_retry(operation.retry_count); break;
    }
  }
}

}  // namespace stillframe::uring
