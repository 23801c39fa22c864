#pragma once

#include <string>

#include "base/result.h"
#include "base/unique_fd.h"

namespace stillframe::catalog {

// The one writer of a run: an exclusive OFD lock on RUN/.stillframe/lock, let go with the object.
// The file holds the owner's pid and instance nonce as text, for the error message of the next one.
class RunLock {
 public:
  // Does not wait. kUnavailable: another process holds it; the message names it.
  static Result<RunLock> acquire(const std::string& run_path, std::uint64_t instance_nonce);

  // False: the run's directory was removed, or another one is in its place.
  bool is_in_place() const;

 private:
  RunLock(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}
  UniqueFd fd_;
  std::string path_;
};

// What a run directory's file system promises (DUR-19, DUR-21).
struct FilesystemVerdict {
  enum class Kind : std::uint8_t {
    kDurable,  // Local ext4, XFS, btrfs and the like.
    kWarned,   // overlay, FUSE, tmpfs: a power cut may lose what was called durable.
    kRefused,  // Network file systems, unless forced.
  };
  Kind kind = Kind::kDurable;
  std::string name;  // "nfs", "overlay"
};
// Judges the nearest existing parent of `path` by statfs(2).
Result<FilesystemVerdict> judge_filesystem(const std::string& path);
FilesystemVerdict judge_filesystem_magic(std::uint64_t magic);  // For tests without such a mount.

}  // namespace stillframe::catalog
