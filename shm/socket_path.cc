#include "shm/socket_path.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "base/os_error.h"
#include "base/text.h"
#include "base/unique_fd.h"
#include "shm/messages.h"

namespace stillframe::shm {

namespace {

// A job manager may hand down the login node's XDG_RUNTIME_DIR, which does not exist on this one,
// and su leaves another user's: neither is ours to use.
bool is_own_directory(const std::string& path) {
  struct stat status = {};
  return ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode) &&
         status.st_uid == ::geteuid();
}

std::string directory_path() {
  const char* const runtime = std::getenv("XDG_RUNTIME_DIR");
  if (runtime != nullptr && runtime[0] == '/' && is_own_directory(runtime)) {
    return concat(runtime, "/stillframe");
  }
  return concat(::geteuid() == 0 ? "/run" : "/tmp", "/stillframe-", ::geteuid());
}

std::string file_name(std::string_view ending) {
  return concat("stillframed-p", kProtocolVersion, "-", STILLFRAME_BUILD_ID, ending);
}

}  // namespace

Result<std::string> private_socket_directory() {
  std::string path = directory_path();
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return os_error(concat("mkdir ", path), errno);
  }
  // Anybody may have made that name in /tmp before us, so look at what it is: through a descriptor,
  // which cannot be exchanged meanwhile.
  const UniqueFd directory(
      ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (!directory) {
    return Error(Code::kInvalidArgument, concat(path, ": not a directory that we can open"), errno);
  }
  struct stat status = {};
  if (::fstat(directory.get(), &status) != 0) return os_error(concat("fstat ", path), errno);
  if (status.st_uid != ::geteuid()) {
    return Error(Code::kInvalidArgument,
                 concat(path, ": belongs to user ", status.st_uid, ", not ", ::geteuid()));
  }
  if ((status.st_mode & 0077U) != 0) {
    return Error(Code::kInvalidArgument, concat(path, ": open to other users; chmod 700 it"));
  }
  return path;
}

std::string socket_file_name() { return file_name(".sock"); }
std::string lock_file_name() { return file_name(".lock"); }
std::string log_file_name() { return file_name(".log"); }

Result<SocketCandidates> socket_candidates() {
  SocketCandidates candidates;
  if (const char* const wish = std::getenv(kSocketVariable); wish != nullptr && wish[0] != '\0') {
    candidates.paths.emplace_back(wish);
    return candidates;
  }
  struct stat status = {};
  if (::stat(kSystemSocket, &status) == 0 && S_ISSOCK(status.st_mode)) {
    candidates.paths.emplace_back(kSystemSocket);
  }
  auto directory = private_socket_directory();
  if (directory) {
    candidates.paths.push_back(concat(*directory, "/", socket_file_name()));
    candidates.may_start = true;
  } else if (candidates.paths.empty()) {
    return std::move(directory).error();
  }
  return candidates;
}

}  // namespace stillframe::shm
