#pragma once

// Another backend, until it dies: after a given number of changes every call fails, as if the
// process had been killed there. What the drive holds then is what a SIGKILL leaves.

#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

class DyingBackend final : public uring::IoBackend {
 public:
  explicit DyingBackend(uring::IoBackend& io) : io_(io) {}

  // Dies just before the n-th change from now; 1 is the first.
  void die_before(std::size_t change) {
    changes_left_ = change - 1;
    is_mortal_ = true;
  }
  bool is_dead() const { return is_dead_; }
  // Every change that was let through, as "rename a b".
  const std::vector<std::string>& trace() const { return trace_; }
  void clear_trace() { trace_.clear(); }

  std::string_view name() const noexcept override { return io_.name(); }
  Status submit(uring::IoRequest& request) override {
    if (is_dead_) return dead();
    if (request.kind != uring::IoRequest::Kind::kRead && !lives("submit", "")) return dead();
    return io_.submit(request);
  }
  std::size_t in_flight() const noexcept override { return io_.in_flight(); }
  std::size_t in_flight_max() const noexcept override { return io_.in_flight_max(); }
  std::span<uring::IoRequest* const> wait(int timeout_ms) override { return io_.wait(timeout_ms); }
  void wake() noexcept override { io_.wake(); }
  Status register_memory(Bytes memory) override { return io_.register_memory(memory); }
  void unregister_memory(Bytes memory) noexcept override { io_.unregister_memory(memory); }
  std::uint64_t registration_count() const noexcept override { return io_.registration_count(); }

  Result<uring::FileId> open(const std::string& path, uring::OpenMode mode) override {
    const bool is_change =
        mode == uring::OpenMode::kCreateDirect || mode == uring::OpenMode::kCreateBuffered;
    if (is_dead_ || (is_change && !lives("create", path))) return dead();
    return io_.open(path, mode);
  }
  void close(uring::FileId file) noexcept override { io_.close(file); }
  Result<uring::FileStatus> file_status(uring::FileId file) override {
    if (is_dead_) return dead();
    return io_.file_status(file);
  }
  Status write_all(uring::FileId file, std::string_view bytes) override {
    return lives("write", "") ? io_.write_all(file, bytes) : dead();
  }
  Result<std::string> read_all(uring::FileId file, std::uint64_t bytes_max) override {
    if (is_dead_) return dead();
    return io_.read_all(file, bytes_max);
  }
  Status allocate(uring::FileId file, std::uint64_t bytes) override {
    return lives("allocate", "") ? io_.allocate(file, bytes) : dead();
  }
  Status truncate(uring::FileId file, std::uint64_t bytes) override {
    return lives("truncate", "") ? io_.truncate(file, bytes) : dead();
  }
  Status sync(uring::FileId file) override { return lives("sync", "") ? io_.sync(file) : dead(); }
  Result<bool> take_for_writing(uring::FileId file) override {
    if (is_dead_) return dead();
    return io_.take_for_writing(file);
  }
  Result<uring::FileStatus> status(const std::string& path) override {
    if (is_dead_) return dead();
    return io_.status(path);
  }
  Status rename(const std::string& source, const std::string& target,
                uring::RenameMode mode) override {
    return lives("rename", source + " " + target) ? io_.rename(source, target, mode) : dead();
  }
  Status unlink(const std::string& path) override {
    return lives("unlink", path) ? io_.unlink(path) : dead();
  }
  Status make_directory(const std::string& path) override {
    return lives("mkdir", path) ? io_.make_directory(path) : dead();
  }
  Status remove_directory(const std::string& path) override {
    return lives("rmdir", path) ? io_.remove_directory(path) : dead();
  }
  Status sync_directory(const std::string& path) override {
    return lives("sync", path) ? io_.sync_directory(path) : dead();
  }
  Result<std::vector<uring::DirectoryEntry>> list_directory(const std::string& path) override {
    if (is_dead_) return dead();
    return io_.list_directory(path);
  }
  Status make_symlink(const std::string& target, const std::string& path) override {
    return lives("symlink", path) ? io_.make_symlink(target, path) : dead();
  }
  Result<uring::SpaceStatus> space(const std::string& path) override {
    if (is_dead_) return dead();
    return io_.space(path);
  }

 private:
  static Error dead() { return Error(Code::kUnavailable, "the process is dead"); }

  bool lives(const std::string& verb, const std::string& object) {
    if (is_mortal_ && changes_left_ == 0) is_dead_ = true;
    if (is_dead_) return false;
    if (is_mortal_) --changes_left_;
    trace_.push_back(verb + " " + object);
    return true;
  }

  uring::IoBackend& io_;
  std::size_t changes_left_ = 0;
  bool is_mortal_ = false;
  bool is_dead_ = false;
  std::vector<std::string> trace_;
};

}  // namespace stillframe::catalog
