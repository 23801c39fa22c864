#pragma once

// The kernel's cgroup freezer: a process in it does not run, and unlike one that got SIGSTOP it and
// its parent are told nothing. Version 2 or 1, whichever this machine has. Needs root.

#include <sys/types.h>

#include <string>

namespace stillframe::testing {

class Freezer {
 public:
  Freezer();
  ~Freezer();  // Thaws. The processes in it must have ended or been reaped by then, or it stays.
  Freezer(const Freezer&) = delete;
  Freezer& operator=(const Freezer&) = delete;

  // Empty, or why there is none on this machine.
  const std::string& missing() const noexcept { return missing_; }
  // Moves it in, and waits until it is frozen. True: done.
  bool freeze(pid_t pid);
  bool thaw();

 private:
  bool write(const std::string& file, const std::string& text) const;
  bool is_frozen() const;

  std::string group_;  // Its directory.
  bool is_version_1_ = false;
  std::string missing_;
};

}  // namespace stillframe::testing
