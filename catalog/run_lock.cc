#include "catalog/run_lock.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>
#include <utility>

#include "base/hash.h"
#include "base/os_error.h"
#include "base/text.h"
#include "catalog/run_files.h"
#include "format/names.h"

namespace stillframe::catalog {

namespace {

constexpr std::size_t kOwnerBytesMax = 64;  // "4194304 0123456789abcdef\n"

std::string read_owner(int fd) {
  char text[kOwnerBytesMax];
  const ssize_t bytes = ::pread(fd, text, sizeof text, 0);
  const std::string_view line(text, bytes > 0 ? static_cast<std::size_t>(bytes) : 0);
  const std::string_view pid = line.substr(0, line.find(' '));
  if (pid.empty() || pid.find_first_not_of("0123456789") != std::string_view::npos) {
    return "another process";
  }
  return concat("process ", pid);
}

// Whether the locked file is still the one that others will find under the name.
bool is_in_place(int fd, const std::string& path) {
  struct stat held = {};
  struct stat named = {};
  return ::fstat(fd, &held) == 0 && ::lstat(path.c_str(), &named) == 0 &&
         held.st_dev == named.st_dev && held.st_ino == named.st_ino;
}

}  // namespace

Result<RunLock> RunLock::acquire(const std::string& run_path, std::uint64_t instance_nonce) {
  const std::string path = concat(private_path(run_path), '/', format::kLockName);
  // NONBLOCK: a FIFO planted under the name must not stop us.
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600));
  if (!fd) return os_error(concat("open ", path), errno);
  struct stat status = {};
  if (::fstat(fd.get(), &status) != 0) return os_error(concat("stat ", path), errno);
  if (!S_ISREG(status.st_mode)) {
    return Error(Code::kInvalidArgument, concat(path, " is not a regular file"));
  }

  // An OFD lock belongs to the open file, not to the process: closing some other descriptor of the
  // same file does not drop it, and it ends with the last descriptor, however the process dies.
  struct flock range = {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  if (::fcntl(fd.get(), F_OFD_SETLK, &range) != 0) {
    const int number = errno;
    if (number != EAGAIN && number != EACCES) return os_error(concat("lock ", path), number);
    return Error(Code::kUnavailable,
                 concat("run ", run_path, " is being written by ", read_owner(fd.get())), number);
  }
  if (!catalog::is_in_place(fd.get(), path)) {
    return Error(Code::kUnavailable, concat(path, " was replaced while it was being locked"));
  }

  const std::string owner = concat(::getpid(), ' ', to_hex(instance_nonce), '\n');
  if (::ftruncate(fd.get(), 0) != 0 ||
      ::pwrite(fd.get(), owner.data(), owner.size(), 0) != static_cast<ssize_t>(owner.size())) {
    // The lock holds without the text, which only words the next one's error message. On a full
    // disk the owner must still get in, to make room.
  }
  return RunLock(std::move(fd), path);
}

bool RunLock::is_in_place() const { return catalog::is_in_place(fd_.get(), path_); }

}  // namespace stillframe::catalog
