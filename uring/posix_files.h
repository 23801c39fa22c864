#pragma once

// Files and names by plain system calls: what the backends `uring` and `threads` have in common.

#include <string>
#include <unordered_map>
#include <vector>

#include "base/unique_fd.h"
#include "uring/completion.h"
#include "uring/io_backend.h"

namespace stillframe::uring {

// Belongs to one thread, like every IoBackend.
class PosixFiles : public IoBackend {
 public:
  Result<FileId> open(const std::string& path, OpenMode mode) override;
  void close(FileId file) noexcept override;
  Result<FileStatus> file_status(FileId file) override;

  Status write_all(FileId file, std::string_view bytes) override;
  Result<std::string> read_all(FileId file, std::uint64_t bytes_max) override;

  Status allocate(FileId file, std::uint64_t bytes) override;
  Status truncate(FileId file, std::uint64_t bytes) override;
  Status sync(FileId file) override;
  Result<bool> take_for_writing(FileId file) override;

  Result<FileStatus> status(const std::string& path) override;
  Status rename(const std::string& source, const std::string& target, RenameMode mode) override;
  Status unlink(const std::string& path) override;
  Status make_directory(const std::string& path) override;
  Status remove_directory(const std::string& path) override;
  Status sync_directory(const std::string& path) override;
  Result<std::vector<DirectoryEntry>> list_directory(const std::string& path) override;
  Status make_symlink(const std::string& target, const std::string& path) override;
  Result<SpaceStatus> space(const std::string& path) override;

 protected:
  struct OpenFile {
    UniqueFd fd;
    FileFacts facts;
    // The file system refuses O_DIRECT (some FUSE and overlay mounts, tmpfs before Linux 6.6): the
    // descriptor goes through the page cache instead, slower and otherwise the same.
    bool cached = false;
    bool has_lease = false;  // By take_for_writing(), until it is closed.
  };

  // kInvalidArgument: closed, or never opened.
  Result<OpenFile*> find(FileId file);

 private:
  Result<OpenFile*> find_buffered(FileId file);

  std::unordered_map<int, OpenFile> files_;
  // Numbers are not used again, so a closed FileId never names another file.
  int next_id_ = 0;
};

// One pread, pwrite or fsync: bytes or a negative errno, as complete() takes it.
int call(const Operation& operation) noexcept;
// Calls until the request is finished.
void run_to_end(Operation& operation);

}  // namespace stillframe::uring
