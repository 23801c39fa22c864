#include "tests/support/loop_filesystem.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <utility>

#include "base/unique_fd.h"

namespace stillframe::testing {

namespace {

// XFS_IOC_GOINGDOWN, which ext4 has under another name with the same number and the same flags
// (xfs_fs.h, ext4.h); neither header is for programs.
constexpr unsigned long kShutDown = _IOR('X', 125, std::uint32_t);
constexpr std::uint32_t kWithoutFlushingTheLog = 2;
constexpr off_t kImageBytes = off_t{400} << 20;  // XFS wants 300 MiB at least.

bool command(const std::string& words) {
  return std::system((words + " > /dev/null 2>&1 < /dev/null").c_str()) == 0;  // NOLINT
}

UniqueFd open_directory(const std::string& path) {
  return UniqueFd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

}  // namespace

LoopFilesystem::LoopFilesystem(std::string kind, std::uint64_t device_bytes_max)
    : kind_(std::move(kind)),
      backing_(scratch_.path("backing")),
      image_(backing_ + "/image"),
      mount_point_(scratch_.path("mount")) {
  if (::geteuid() != 0) {
    missing_ = "only root can mount";
    return;
  }
  if (::mkdir(backing_.c_str(), 0700) != 0 || ::mkdir(mount_point_.c_str(), 0700) != 0) {
    missing_ = "no directory can be made";
    return;
  }
  if (device_bytes_max != 0) {
    is_backing_mounted_ = command("mount -t tmpfs -o size=" + std::to_string(device_bytes_max) +
                                  " tmpfs " + backing_);
    if (!is_backing_mounted_) missing_ = "this machine mounts no tmpfs";
    if (!is_backing_mounted_) return;
  }
  const UniqueFd image(::open(image_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!image || ::ftruncate(image.get(), kImageBytes) != 0) {
    missing_ = "no image of 400 MiB can be made";
  } else if (!command("mkfs." + kind_ + " -q " + image_)) {
    missing_ = "there is no mkfs." + kind_;
  } else if (!mount()) {
    missing_ = "this machine mounts no loop device with " + kind_;
  }
}

LoopFilesystem::~LoopFilesystem() {
  if (is_mounted_ && !command("umount " + mount_point_)) (void)command("umount -l " + mount_point_);
  if (is_backing_mounted_) (void)command("umount -l " + backing_);
}

bool LoopFilesystem::mount() {
  is_mounted_ = command("mount -t " + kind_ + " -o loop " + image_ + " " + mount_point_);
  return is_mounted_;
}

bool LoopFilesystem::shut_down() {
  const UniqueFd directory = open_directory(mount_point_);
  std::uint32_t flags = kWithoutFlushingTheLog;
  return directory && ::ioctl(directory.get(), kShutDown, &flags) == 0;
}

bool LoopFilesystem::mount_again() {
  // The files of a killed process are closed a moment after it was reaped: io_uring's own last.
  for (int i = 0; i < 500; ++i) {
    if (command("umount " + mount_point_)) {
      is_mounted_ = false;
      return mount();
    }
    (void)::usleep(10'000);
  }
  return false;
}

bool LoopFilesystem::freeze() {
  const UniqueFd directory = open_directory(mount_point_);
  return directory && ::ioctl(directory.get(), FIFREEZE, 0) == 0;
}

bool LoopFilesystem::thaw() {
  const UniqueFd directory = open_directory(mount_point_);
  return directory && ::ioctl(directory.get(), FITHAW, 0) == 0;
}

}  // namespace stillframe::testing
