#pragma once

// The one rule by which a request is taken, goes on and ends, for every backend: checkpoint engines
// go wrong in the completion path more than anywhere else.

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/result.h"
#include "uring/io_backend.h"

namespace stillframe::uring {

// An open file as the rule needs to know it.
struct FileFacts {
  std::string path;  // As it was opened, for messages.
  OpenMode mode = OpenMode::kReadBuffered;
  std::uint64_t bytes = 0;  // Its length when it was opened or last changed through the backend.
};

constexpr bool is_direct(OpenMode mode) noexcept {
  switch (mode) {
    case OpenMode::kReadDirect:
    case OpenMode::kWriteDirect:
    case OpenMode::kCreateDirect: return true;
    case OpenMode::kReadBuffered:
    case OpenMode::kCreateBuffered: return false;
  }
  return false;
}

constexpr bool is_writable(OpenMode mode) noexcept {
  return mode != OpenMode::kReadDirect && mode != OpenMode::kReadBuffered;
}

// A request on its way. Copies what it needs of the file, so that it stands alone in another
// thread.
struct Operation {
  IoRequest* request = nullptr;
  int fd = -1;
  std::string path;
  std::uint64_t file_bytes = 0;  // Where a read may end early.
  std::uint64_t retry_count = 0;

  std::byte* data() const noexcept { return request->data + request->moved_bytes; }
  std::uint64_t offset() const noexcept { return request->offset + request->moved_bytes; }
  // What one system call is asked for: the kernel moves at most 2 GiB less a page at once.
  std::size_t rest_bytes() const noexcept { return request->bytes - request->moved_bytes; }
  std::size_t call_bytes() const noexcept {
    constexpr std::size_t kCallBytesMax = std::size_t{1} << 30;
    return rest_bytes() < kCallBytesMax ? rest_bytes() : kCallBytesMax;
  }
};

// Refuses with kInvalidArgument, before anything happens, what would be slow or wrong: reads and
// writes on a buffered file (URING-3), writes beyond the file's end (URING-4), unaligned ones
// (URING-5), writes to a file opened for reading.
Status check_request(const IoRequest& request, const FileFacts& file);

// Clears the request's results.
Operation begin(IoRequest& request, const FileFacts& file, int fd);

enum class Next : std::uint8_t {
  kFinished,         // The request's results are set.
  kQueueAgain,       // Ask for the rest: data(), offset(), call_bytes() have moved on.
  kQueueAfterPause,  // The same again, after pause_before_retry().
};

// `result` is a CQE's: bytes, or a negative errno. The only place that reads one.
[[nodiscard]] Next complete(Operation& operation, int result);

// Gives up a request that could not be handed to the kernel.
void fail(Operation& operation, int number) noexcept;

// How often one call or request is tried again for EAGAIN, EINTR or EBUSY before it fails, with
// pauses of 0.1 ms, 0.2 ms, ... 25.6 ms: about 50 ms together (URING-13).
inline constexpr std::uint64_t kRetryCountMax = 9;
constexpr bool is_transient(int number) noexcept {
  return number == EAGAIN || number == EINTR || number == EBUSY;
}
// Backoff, not a wait for an event: the kernel was out of something and names no event for its
// return.
void pause_before_retry(std::uint64_t retry_count);

}  // namespace stillframe::uring
