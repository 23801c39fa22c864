#pragma once

// A file system of its own on a loop device, that a test may pull the plug of. Needs root.

#include <cstdint>
#include <string>

#include "tests/support/trainer.h"

namespace stillframe::testing {

class LoopFilesystem {
 public:
  // `kind`: "ext4" or "xfs". The drive takes only `device_bytes_max` bytes and then fails,
  // though it is larger by its own account; 0: all.
  explicit LoopFilesystem(std::string kind, std::uint64_t device_bytes_max = 0);
  ~LoopFilesystem();  // Unmounts.
  LoopFilesystem(const LoopFilesystem&) = delete;
  LoopFilesystem& operator=(const LoopFilesystem&) = delete;

  // Empty, or why there is none on this machine.
  const std::string& missing() const noexcept { return missing_; }
  std::string path(const std::string& name) const { return mount_point_ + "/" + name; }

  // Power loss: nothing more reaches the drive, not even the journal's tail. True: done.
  bool shut_down();
  // After shut_down(), once no process has files there open: what the next start finds.
  bool mount_again();
  // Every write waits until thaw().
  bool freeze();
  bool thaw();

 private:
  bool mount();

  ScratchDirectory scratch_;
  const std::string kind_;
  const std::string backing_;  // Where the image lies: a tmpfs of its own if the drive is to fail.
  const std::string image_;
  const std::string mount_point_;
  std::string missing_;
  bool is_mounted_ = false;
  bool is_backing_mounted_ = false;
};

}  // namespace stillframe::testing
