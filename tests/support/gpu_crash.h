#pragma once

#include <sys/types.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

namespace stillframe::testing {

// gpu_crash_trainer (tests/gpu/crash_trainer.cc), which lies beside this program, as a child.
class GpuCrashTrainer {
 public:
  struct Setting {
    std::string run_path;
    std::string socket_path;
    std::int64_t first_step = 0;
    std::string lane;
    std::string driver_folder;  // Searched first.
    bool breaks = false;        // Its own GPU.
  };
  explicit GpuCrashTrainer(Setting setting);
  ~GpuCrashTrainer();  // SIGKILL and reap.
  GpuCrashTrainer(const GpuCrashTrainer&) = delete;
  GpuCrashTrainer& operator=(const GpuCrashTrainer&) = delete;

  // What it says next; nullopt: it has ended.
  struct Said {
    std::string word;
    std::int64_t step = -1;
  };
  std::optional<Said> listen();
  void kill_now();
  // Waits until it ends by itself: its exit status, or 128 + the signal that ended it.
  int wait();

 private:
  pid_t pid_ = -1;
  std::FILE* lines_ = nullptr;
};

}  // namespace stillframe::testing
