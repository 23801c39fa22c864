#pragma once

// An IoBackend on a SimulatedDrive.

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tests/simulated/simulated_drive.h"
#include "uring/completion.h"

namespace stillframe::simulated {

// Requests take effect inside wait(), in random order and in pieces, none before it: a request in
// flight at a power cut may have moved all, some or nothing. Paths start at the drive's root,
// absolute or not. The directory "/" is there, nothing else.
//
// Belongs to one thread, except wake().
class SimulatedBackend final : public uring::IoBackend {
 public:
  explicit SimulatedBackend(std::shared_ptr<SimulatedDrive> drive);
  ~SimulatedBackend() override;

  std::string_view name() const noexcept override { return "simulated"; }
  std::size_t open_file_count() const noexcept { return files_.size(); }

  Status submit(uring::IoRequest& request) override;
  std::size_t in_flight() const noexcept override;
  std::size_t in_flight_max() const noexcept override { return kInFlightMax; }
  std::span<uring::IoRequest* const> wait(int timeout_ms) override;
  void wake() noexcept override;

  Status register_memory(Bytes) override;
  void unregister_memory(Bytes) noexcept override {}
  std::uint64_t registration_count() const noexcept override { return registration_count_; }

  Result<uring::FileId> open(const std::string& path, uring::OpenMode mode) override;
  void close(uring::FileId file) noexcept override;
  Result<uring::FileStatus> file_status(uring::FileId file) override;
  Status write_all(uring::FileId file, std::string_view bytes) override;
  Result<std::string> read_all(uring::FileId file, std::uint64_t bytes_max) override;
  Status allocate(uring::FileId file, std::uint64_t bytes) override;
  Status truncate(uring::FileId file, std::uint64_t bytes) override;
  Status sync(uring::FileId file) override;
  Result<bool> take_for_writing(uring::FileId file) override;

  Result<uring::FileStatus> status(const std::string& path) override;
  Status rename(const std::string& source, const std::string& target,
                uring::RenameMode mode) override;
  Status unlink(const std::string& path) override;
  Status make_directory(const std::string& path) override;
  Status remove_directory(const std::string& path) override;
  Status sync_directory(const std::string& path) override;
  Result<std::vector<uring::DirectoryEntry>> list_directory(const std::string& path) override;
  Status make_symlink(const std::string& target, const std::string& path) override;
  Result<uring::SpaceStatus> space(const std::string& path) override;

 private:
  static constexpr std::size_t kInFlightMax = 64;

  struct OpenFile {
    InodeNumber inode = 0;
    uring::FileFacts facts;
  };

  const OpenFile* find(uring::FileId file) const;
  // The drive's lock, for the length of one operation.
  std::unique_lock<std::mutex> lock_drive() const { return std::unique_lock(drive_->mutex_); }
  // SimulatedDrive::run() with its lock held, for this backend's generation.
  int run(TraceEntry entry, const SimulatedDrive::Effect& effect);
  Status answer(int number, std::string_view doing) const;
  // A change to one name.
  Status change_name(OperationKind kind, const std::string& path,
                     const std::function<int(const Place& place)>& change);
  int take_piece(uring::Operation& operation);
  int move_piece(const uring::Operation& operation, InodeNumber inode);
  void step();
  Status resize(OperationKind kind, uring::FileId file, std::uint64_t bytes);

  std::shared_ptr<SimulatedDrive> drive_;
  std::uint64_t generation_ = 0;
  std::map<int, OpenFile> files_;
  int next_id_ = 0;
  std::uint64_t registration_count_ = 0;

  std::vector<uring::Operation> pending_;
  std::vector<uring::IoRequest*> finished_;    // Not yet handed out.
  std::vector<uring::IoRequest*> handed_out_;  // By the last wait().

  std::mutex wake_mutex_;
  std::condition_variable woken_condition_;
  bool woken_ = false;  // Under wake_mutex_.
};

}  // namespace stillframe::simulated
