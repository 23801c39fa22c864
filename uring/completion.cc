#include "uring/completion.h"

#include <ctime>

#include "base/bytes.h"
#include "base/os_error.h"
#include "base/out_of_memory.h"
#include "base/text.h"

namespace stillframe::uring {

namespace {

std::string_view verb(IoRequest::Kind kind) noexcept {
  switch (kind) {
    case IoRequest::Kind::kRead: return "read";
    case IoRequest::Kind::kWrite: return "write";
    case IoRequest::Kind::kSync: return "fsync";
  }
  return "request of unknown kind";
}

std::string describe(const Operation& operation) {
  const std::string_view what = verb(operation.request->kind);
  if (operation.request->kind == IoRequest::Kind::kSync) return concat(what, " ", operation.path);
  return concat(what, " ", operation.rest_bytes(), " bytes at offset ", operation.offset(), " of ",
                operation.path);
}

Next queue_after_pause(Operation& operation, int number) {
  if (operation.retry_count >= kRetryCountMax) {
    fail(operation, number);
    return Next::kFinished;
  }
  ++operation.retry_count;
  return Next::kQueueAfterPause;
}

Error refused(const IoRequest& request, const FileFacts& file, std::string_view reason) {
  return Error(Code::kInvalidArgument,
               concat(verb(request.kind), " ", request.bytes, " bytes at offset ", request.offset,
                      " of ", file.path, ": ", reason));
}

}  // namespace

Status check_request(const IoRequest& request, const FileFacts& file) {
  if (request.kind == IoRequest::Kind::kSync) return ok();
  if (!is_direct(file.mode)) return refused(request, file, "the file is open for buffered I/O");
  const auto address = reinterpret_cast<std::uintptr_t>(request.data);
  if (request.offset % kBlockBytes != 0 || request.bytes % kBlockBytes != 0 ||
      address % kBlockBytes != 0) {
    return refused(request, file, "offset, bytes and memory must be multiples of 4096");
  }
  const auto end = checked_add(request.offset, request.bytes);
  if (!end || *end > std::uint64_t{INT64_MAX}) {
    return refused(request, file, "the range ends beyond 2^63");
  }
  if (request.kind == IoRequest::Kind::kRead) return ok();
  if (!is_writable(file.mode)) return refused(request, file, "the file is open for reading");
  if (*end > file.bytes) {
    return refused(request, file, concat("the file has ", file.bytes, "; allocate() it first"));
  }
  return ok();
}

Operation begin(IoRequest& request, const FileFacts& file, int fd) {
  request.moved_bytes = 0;
  request.error.reset();
  return {.request = &request, .fd = fd, .path = file.path, .file_bytes = file.bytes};
}

Next complete(Operation& operation, int result) {
  IoRequest& request = *operation.request;
  const bool is_sync = request.kind == IoRequest::Kind::kSync;
  // Not an fsync: whatever its first answer was, the second may hide it (DUR-2).
  if (result < 0 && is_transient(-result) && !is_sync) {
    return queue_after_pause(operation, -result);
  }
  if (result < 0) {
    fail(operation, -result);
    return Next::kFinished;
  }
  if (is_sync) return Next::kFinished;

  const auto moved_bytes = static_cast<std::size_t>(result);
  const bool is_read = request.kind == IoRequest::Kind::kRead;
  const bool at_end =
      is_read && (moved_bytes == 0 || operation.offset() + moved_bytes == operation.file_bytes);
  if (moved_bytes >= operation.rest_bytes() || at_end) {
    request.moved_bytes += moved_bytes;
    return Next::kFinished;
  }
  // Short. O_DIRECT needs an aligned rest, so keep whole blocks; keeping none would loop for ever.
  const std::size_t kept_bytes = round_down(moved_bytes, kBlockBytes);
  if (kept_bytes == 0) {
    request.error = Error(Code::kUnavailable,
                          concat(describe(operation), ": no progress, moved ", moved_bytes));
    return Next::kFinished;
  }
  request.moved_bytes += kept_bytes;
  operation.retry_count = 0;
  return Next::kQueueAgain;
}

void fail(Operation& operation, int number) noexcept {
  Status failed =
      or_out_of_memory([&]() -> Status { return os_error(describe(operation), number); });
  operation.request->error = std::move(failed).error();
}

void pause_before_retry(std::uint64_t retry_count) {
  constexpr long kFirstPauseNs = 100'000;
  const timespec pause{.tv_sec = 0, .tv_nsec = kFirstPauseNs << (retry_count - 1)};
  (void)::nanosleep(&pause, nullptr);
}

}  // namespace stillframe::uring
