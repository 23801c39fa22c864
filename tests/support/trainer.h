#pragma once

// A small training process for tests: a run, a daemon of its own, a state whose every byte follows
// from the step. Speaks the public C ABI.

#include <sys/types.h>

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "client/libstillframe.h"

namespace stillframe::testing {

// A fresh directory below the build folder's disk, removed at the end.
class ScratchDirectory {
 public:
  ScratchDirectory();
  ~ScratchDirectory();
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  std::string path(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// stillframed in the foreground, as a child. The environment is ours plus `variables`.
class DaemonProcess {
 public:
  using Variables = std::map<std::string, std::string>;
  explicit DaemonProcess(std::string socket_path, const Variables& variables = {});
  ~DaemonProcess();  // SIGKILL and reap.
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  // Waits until it accepts connections; false when it ended first.
  bool wait_listening();
  bool is_alive();
  void kill_now();
  // SIGTERM, then its exit status; 128 + the signal that killed it before; -1 when it was reaped.
  int stop();
  pid_t pid() const noexcept { return pid_; }

 private:
  pid_t pid_ = -1;
  std::string socket_path_;
};

// The state of `step`: tensors of odd sizes, empty and 0-d ones included, in one to three parts.
class State {
 public:
  explicit State(std::size_t part_count = 2);
  void fill(std::int64_t step);
  bool holds(std::int64_t step) const;
  void clear();

  const std::vector<sf_part>& parts() const noexcept { return parts_; }
  std::vector<sf_source> sources(bool lazy) const;
  std::vector<sf_target> targets();

 private:
  struct Tensor {
    std::string name;
    std::vector<std::uint64_t> shape;
    std::vector<std::uint8_t> bytes;
    std::size_t part = 0;
  };
  static std::uint8_t byte_at(std::int64_t step, std::size_t tensor, std::size_t offset);

  std::vector<Tensor> tensors_;
  std::vector<std::vector<sf_tensor>> tensors_by_part_;
  std::vector<sf_part> parts_;
};

// One attached session over a State. Every call gives the code; `error` keeps the last message.
class Trainer {
 public:
  Trainer(std::string run_path, std::string socket_path, std::uint32_t keep_last,
          std::size_t part_count = 2);
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  int attach();  // And registers the layout.
  int change_parts(std::size_t count);
  // Eager; waits for a slot for at most `busy_timeout_ms`.
  int save(std::int64_t step, std::uint64_t* ticket, std::uint32_t busy_timeout_ms = 10'000);
  // save() of a state that was filled before.
  int begin_save(std::int64_t step, std::uint64_t* ticket, std::uint32_t busy_timeout_ms);
  int save_durable(std::int64_t step);
  int close();
  sf_session* session() noexcept { return session_; }
  State& state() noexcept { return state_; }
  const sf_error& error() const noexcept { return error_; }

 private:
  std::string run_path_;
  std::string socket_path_;
  std::uint32_t keep_last_;
  State state_;
  sf_session* session_ = nullptr;
  sf_error error_{};
};

// What a run directory holds, judged by reading every byte.
struct Verdict {
  std::vector<std::int64_t> steps;      // Of the restorable checkpoints, oldest first.
  std::set<std::int64_t> pinned;        // Steps of those that carry a tag.
  std::vector<std::string> complaints;  // Damage, wrong bytes.
  // Temporary directories and half removed checkpoints, which the next recovery takes away.
  std::vector<std::string> leftovers;
};
Verdict judge(const std::string& run_path);

}  // namespace stillframe::testing
