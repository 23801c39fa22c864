#pragma once

// The one way to files. Everything that Stillframe promises about disks goes through an IoBackend,
// so that one simulated drive can lose power at any point of it (tests/simulated/).
//
// Three backends: `uring` (default), `threads` (pread and pwrite, for kernels and containers that
// refuse io_uring), `simulated` (tests).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"

namespace stillframe::uring {

// An open file of one backend. Small and copyable; close() ends it.
struct FileId {
  int value = -1;
  bool operator==(const FileId&) const = default;
};

enum class OpenMode : std::uint8_t {
  kReadDirect,      // O_DIRECT, an existing regular file; never follows a link.
  kReadBuffered,    // Through the page cache: manifests and other small files.
  kWriteDirect,     // O_DIRECT, an existing regular file, contents kept: a spool file.
  kCreateDirect,    // O_DIRECT, must not exist.
  kCreateBuffered,  // Must not exist: manifests and other small files.
};

enum class RenameMode : std::uint8_t {
  kNoReplace,  // kInvalidArgument with native() == EEXIST when the target exists.
  kReplace,
  kExchange,  // Both exist, and each takes the other's name at once.
};

enum class FileKind : std::uint8_t { kRegular, kDirectory, kSymlink, kOther };

struct FileStatus {
  FileKind kind = FileKind::kOther;
  std::uint64_t bytes = 0;
  std::uint64_t link_count = 0;
  std::uint32_t owner_uid = 0;
};

struct DirectoryEntry {
  std::string name;  // Without its folder; never "." or "..".
  FileKind kind = FileKind::kOther;
};

struct SpaceStatus {
  std::uint64_t free_bytes = 0;  // For us: f_bavail.
  std::uint64_t total_bytes = 0;
};

// One read, write or fsync in flight. The caller owns it and the memory at `data`, and leaves both
// alone from submit() until the request comes back from wait(). `offset`, `bytes` and `data` of a
// read or write are multiples of kBlockBytes.
struct IoRequest {
  enum class Kind : std::uint8_t { kRead, kWrite, kSync };

  Kind kind = Kind::kRead;
  FileId file;
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  std::uint64_t offset = 0;
  std::uint64_t tag = 0;  // The caller's; untouched.

  // Set when wait() returns it. A read that meets the end of the file finishes with fewer
  // `moved_bytes` and no error; a write without an error has moved all its bytes.
  std::size_t moved_bytes = 0;
  std::optional<Error> error;
};

// Belongs to one thread: the one that created it, except wake(), which any thread may call.
//
// Paths are absolute or relative to the working directory. Files are made with mode 0600,
// directories with 0700. No call retries an fsync.
class IoBackend {
 public:
  virtual ~IoBackend() = default;

  virtual std::string_view name() const noexcept = 0;  // "uring", "threads", "simulated"

  // --- Requests in flight
  // -------------------------------------------------------------------------

  // Takes a request. Short transfers are resubmitted inside until all bytes moved or an error came.
  // kResourceExhausted: more than in_flight_max() requests; take some from wait() first.
  virtual Status submit(IoRequest& request) = 0;
  virtual std::size_t in_flight() const noexcept = 0;
  virtual std::size_t in_flight_max() const noexcept = 0;  // 64

  // The requests that finished, at least one unless wake() was called or `timeout_ms` passed; then
  // empty. -1 waits without end. Wakes are not lost: one that came before the call ends it at once.
  // The span is valid until the next call.
  virtual std::span<IoRequest* const> wait(int timeout_ms) = 0;
  virtual void wake() noexcept = 0;

  // Pins `memory` for requests that lie wholly inside it. Saves CPU, changes nothing else, so
  // callers go on when it fails (memlock). Pieces of at most 1 GiB are made inside. Call once for
  // each slot, never for each save. Unregistering waits for nothing: no request may be in flight
  // there.
  virtual Status register_memory(Bytes memory) = 0;
  virtual void unregister_memory(Bytes memory) noexcept = 0;
  // How often register_memory() succeeded since creation; a test holds it at zero per save.
  virtual std::uint64_t registration_count() const noexcept = 0;

  // --- Files, one blocking call each
  // ---------------------------------------------------------------

  // Opens without following links and without blocking on a FIFO; anything but a regular file is
  // kInvalidArgument.
  virtual Result<FileId> open(const std::string& path, OpenMode mode) = 0;
  virtual void close(FileId file) noexcept = 0;
  virtual Result<FileStatus> file_status(FileId file) = 0;

  // Buffered modes only. Writes all of `bytes` at offset 0; reads the whole file, at most
  // `bytes_max` (kDataLoss when it is larger).
  virtual Status write_all(FileId file, std::string_view bytes) = 0;
  virtual Result<std::string> read_all(FileId file, std::uint64_t bytes_max) = 0;

  // Makes the file exactly `bytes` long with every block allocated, so that a full disk shows here.
  // kResourceExhausted: the disk is full.
  virtual Status allocate(FileId file, std::uint64_t bytes) = 0;
  virtual Status truncate(FileId file, std::uint64_t bytes) = 0;
  // fsync(2) now, for the buffered small files. An error is final for the file.
  virtual Status sync(FileId file) = 0;
  // True when nobody else has the file open or mapped and it has one name: a write lease
  // (F_SETLEASE) was granted. Only then may its blocks be overwritten (DUR-7). The lease is kept
  // until close().
  virtual Result<bool> take_for_writing(FileId file) = 0;

  // --- Names
  // ---------------------------------------------------------------------------------------

  virtual Result<FileStatus> status(const std::string& path) = 0;  // Of the name itself: lstat.
  virtual Status rename(const std::string& source, const std::string& target, RenameMode mode) = 0;
  virtual Status unlink(const std::string& path) = 0;
  virtual Status make_directory(const std::string& path) = 0;  // kInvalidArgument/EEXIST if there.
  virtual Status remove_directory(const std::string& path) = 0;
  virtual Status sync_directory(const std::string& path) = 0;
  virtual Result<std::vector<DirectoryEntry>> list_directory(const std::string& path) = 0;
  virtual Status make_symlink(const std::string& target, const std::string& path) = 0;
  virtual Result<SpaceStatus> space(const std::string& path) = 0;
};

struct BackendOptions {
  enum class Choice : std::uint8_t { kAutomatic, kUring, kThreads };
  Choice choice = Choice::kAutomatic;
};

struct CreatedBackend {
  std::unique_ptr<IoBackend> backend;
  // Why io_uring was not taken: "io_uring_queue_init: Operation not permitted". Empty otherwise.
  std::string fallback_reason;
};

// Call on the thread that will use it. kUnavailable: io_uring was demanded and is refused here.
Result<CreatedBackend> create_backend(BackendOptions options);

}  // namespace stillframe::uring
