#pragma once

// Files through io_uring: the default. Linux 5.11 or newer; newer features are used where they are.

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/unique_fd.h"
#include "uring/completion.h"
#include "uring/posix_files.h"

struct io_uring;

namespace stillframe::uring {

// Requests are handed to the kernel one by one as they are submitted: at 4 MiB each, a system call
// for each costs nothing, and the drive starts while the caller prepares the next.
//
// Files are not registered: what that saves is not measurable at this size, and the kernel lets go
// of a registered file some time after close(), so that nobody could take a lease on it meanwhile.
//
// Belongs to the thread that created it (SINGLE_ISSUER), its end included.
class UringBackend final : public PosixFiles {
 public:
  // The kernel's words when it refuses a ring or lacks an operation: "io_uring_queue_init: ...".
  static Result<std::unique_ptr<UringBackend>> create();

  UringBackend(const UringBackend&) = delete;
  UringBackend& operator=(const UringBackend&) = delete;
  // Waits for requests in flight: the kernel still writes to their memory.
  ~UringBackend() override;

  std::string_view name() const noexcept override { return "uring"; }

  Status submit(IoRequest& request) override;
  std::size_t in_flight() const noexcept override { return in_flight_; }
  std::size_t in_flight_max() const noexcept override { return kInFlightMax; }
  std::span<IoRequest* const> wait(int timeout_ms) override;
  void wake() noexcept override;

  Status register_memory(Bytes memory) override;
  void unregister_memory(Bytes memory) noexcept override;
  std::uint64_t registration_count() const noexcept override { return registration_count_; }

  // What the kernel granted: "SINGLE_ISSUER | DEFER_TASKRUN" or nothing.
  unsigned setup_flags() const noexcept { return setup_flags_; }

 private:
  static constexpr std::size_t kInFlightMax = 64;

  // At most 1 GiB of pinned memory under one index of the ring's buffer table.
  struct Piece {
    int index = 0;
    Bytes memory;
  };

  struct RingDeleter {
    void operator()(io_uring* ring) const noexcept;
  };

  UringBackend(std::unique_ptr<io_uring, RingDeleter> ring, unsigned setup_flags, UniqueFd wake_fd);

  int start(std::size_t slot) noexcept;
  int push() noexcept;
  bool arm_wake() noexcept;
  void take_wake() noexcept;
  void reap();
  void go_on(std::size_t slot, int result);
  void finish(std::size_t slot);
  const Piece* piece_around(const std::byte* data, std::size_t bytes) const noexcept;
  int free_index() const noexcept;
  int update_buffer(int index, Bytes memory) noexcept;

  std::unique_ptr<io_uring, RingDeleter> ring_;
  unsigned setup_flags_ = 0;
  UniqueFd wake_fd_;
  bool wake_armed_ = false;
  bool woken_ = false;

  std::array<Operation, kInFlightMax> operations_;
  std::vector<std::size_t> free_slots_;
  std::size_t in_flight_ = 0;             // Until wait() has handed them out.
  std::vector<IoRequest*> finished_;      // Not yet handed out.
  std::vector<IoRequest*> handed_out_;    // By the last wait().
  std::vector<std::size_t> again_slots_;  // To be started again after all completions are consumed.

  bool has_buffer_table_ = false;
  std::vector<Piece> pieces_;
  std::uint64_t registration_count_ = 0;
};

}  // namespace stillframe::uring
