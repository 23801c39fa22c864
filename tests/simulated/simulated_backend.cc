#include "tests/simulated/simulated_backend.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "base/os_error.h"
#include "base/text.h"

namespace stillframe::simulated {

namespace {

using uring::FileFacts;
using uring::FileId;
using uring::FileKind;
using uring::FileStatus;
using uring::IoRequest;
using uring::Next;
using uring::OpenMode;
using uring::Operation;

FileStatus status_of(const Inode& inode) {
  return {.kind = inode.kind,
          .bytes = inode.bytes.size(),
          .link_count = inode.link_count,
          .owner_uid = 0};
}

bool creates(OpenMode mode) {
  return mode == OpenMode::kCreateDirect || mode == OpenMode::kCreateBuffered;
}

Error power_error(std::string_view doing) {
  return Error(Code::kUnavailable, concat(doing, ": power is off"));
}

Error not_open(FileId file) {
  return Error(Code::kInvalidArgument, concat("file ", file.value, " is not open"));
}

Error wrong_mode(const FileFacts& facts) {
  return Error(Code::kInvalidArgument,
               concat(facts.path, ": open for O_DIRECT, and one file has one mode"));
}

}  // namespace

SimulatedBackend::SimulatedBackend(std::shared_ptr<SimulatedDrive> drive)
    : drive_(std::move(drive)) {
  const auto lock = lock_drive();
  generation_ = drive_->generation_;
}

SimulatedBackend::~SimulatedBackend() {
  while (!files_.empty()) close(FileId{.value = files_.begin()->first});
}

int SimulatedBackend::run(TraceEntry entry, const SimulatedDrive::Effect& effect) {
  if (drive_->generation_ != generation_) return SimulatedDrive::kPowerOff;
  return drive_->run(std::move(entry), effect);
}

Status SimulatedBackend::answer(int number, std::string_view doing) const {
  if (number == 0) return ok();
  if (number == SimulatedDrive::kPowerOff) return power_error(doing);
  return os_error(doing, number);
}

const SimulatedBackend::OpenFile* SimulatedBackend::find(FileId file) const {
  const auto found = files_.find(file.value);
  return found == files_.end() ? nullptr : &found->second;
}

// --- Requests -----------------------------------------------------------------------------------

Status SimulatedBackend::submit(IoRequest& request) {
  if (in_flight() >= kInFlightMax) {
    return Error(Code::kResourceExhausted, concat("io: ", in_flight(), " requests in flight of ",
                                                  kInFlightMax, "; wait for some"));
  }
  const OpenFile* const file = find(request.file);
  if (file == nullptr) return not_open(request.file);
  const auto lock = lock_drive();
  if (drive_->is_off_ || drive_->generation_ != generation_) return power_error("submit");
  FileFacts facts = file->facts;
  facts.bytes = drive_->image_.at(file->inode).bytes.size();
  auto checked = uring::check_request(request, facts);
  if (!checked) return checked;
  pending_.push_back(uring::begin(request, facts, request.file.value));
  return ok();
}

std::size_t SimulatedBackend::in_flight() const noexcept {
  return pending_.size() + finished_.size();
}

std::span<IoRequest* const> SimulatedBackend::wait(int timeout_ms) {
  handed_out_.clear();
  while (finished_.empty() && !pending_.empty()) step();
  std::unique_lock lock(wake_mutex_);
  if (finished_.empty()) {
    const auto ready = [this] { return woken_; };
    if (timeout_ms < 0) {
      woken_condition_.wait(lock, ready);
    } else {
      (void)woken_condition_.wait_for(lock, std::chrono::milliseconds(timeout_ms), ready);
    }
  }
  woken_ = false;
  handed_out_.swap(finished_);
  return handed_out_;
}

void SimulatedBackend::wake() noexcept {
  {
    const std::lock_guard lock(wake_mutex_);
    woken_ = true;
  }
  woken_condition_.notify_one();
}

// Lets a few random requests move a piece each.
void SimulatedBackend::step() {
  const auto lock = lock_drive();
  do {
    const auto chosen =
        pending_.begin() + static_cast<std::ptrdiff_t>(drive_->rng_.below(pending_.size()));
    const int result = take_piece(*chosen);
    Next next = Next::kFinished;
    if (result == -SimulatedDrive::kPowerOff) {
      chosen->request->error = power_error(chosen->path);
    } else {
      next = uring::complete(*chosen, result);
    }
    if (next != Next::kFinished) continue;
    finished_.push_back(chosen->request);
    pending_.erase(chosen);
  } while (!pending_.empty() && drive_->rng_.below(2) == 0);
}

// As a completion tells it: bytes or a negative number.
int SimulatedBackend::take_piece(Operation& operation) {
  const OpenFile* const file = find(FileId{.value = operation.fd});
  if (file == nullptr) return -EBADF;
  const InodeNumber inode = file->inode;
  const bool is_ours = drive_->generation_ == generation_;
  if (drive_->is_off_ && is_ours && operation.request->kind == IoRequest::Kind::kWrite) {
    // It was in flight when the power went: the crash model chooses what of it there is.
    (void)move_piece(operation, inode);
  }
  const bool is_sync = operation.request->kind == IoRequest::Kind::kSync;
  if (!is_sync && is_ours && drive_->options_.short_transfers && drive_->rng_.below(64) == 0 &&
      operation.retry_count < uring::kRetryCountMax) {
    return -EAGAIN;
  }
  TraceEntry entry{.path = operation.path,
                   .inode = inode,
                   .offset = operation.offset(),
                   .bytes = operation.call_bytes()};
  int result = 0;
  switch (operation.request->kind) {
    case IoRequest::Kind::kRead: entry.kind = OperationKind::kRead; break;
    case IoRequest::Kind::kWrite: entry.kind = OperationKind::kWrite; break;
    case IoRequest::Kind::kSync: entry.kind = OperationKind::kSync; break;
  }
  const int number = run(std::move(entry), [&](SimulatedDrive::Power power) {
    if (power == SimulatedDrive::Power::kLying) {
      result = static_cast<int>(operation.call_bytes());
    } else if (!is_sync) {
      result = move_piece(operation, inode);
    } else if (power == SimulatedDrive::Power::kOn) {
      drive_->image_.sync(inode);
    }
    return 0;
  });
  return number == 0 ? result : -number;
}

// Moves all, or some blocks and perhaps a fraction of the next, which complete() must not count.
int SimulatedBackend::move_piece(const Operation& operation, InodeNumber inode) {
  std::size_t bytes = operation.call_bytes();
  if (drive_->options_.short_transfers && bytes > kBlockBytes && drive_->rng_.below(8) == 0) {
    bytes = kBlockBytes + drive_->rng_.below(bytes - kBlockBytes);
  }
  DriveImage& image = drive_->image_;
  if (operation.request->kind == IoRequest::Kind::kWrite) {
    image.write(inode, operation.offset(), {operation.data(), bytes});
    return static_cast<int>(bytes);
  }
  const std::vector<std::byte>& source = image.at(inode).bytes;
  if (operation.offset() >= source.size()) return 0;
  bytes = std::min<std::size_t>(bytes, source.size() - operation.offset());
  std::memcpy(operation.data(), source.data() + operation.offset(), bytes);
  return static_cast<int>(bytes);
}

Status SimulatedBackend::register_memory(Bytes) {
  ++registration_count_;
  return ok();
}

// --- Files --------------------------------------------------------------------------------------

Result<FileId> SimulatedBackend::open(const std::string& path, OpenMode mode) {
  const auto lock = lock_drive();
  DriveImage& image = drive_->image_;
  const Place place = image.find(path);
  InodeNumber inode = place.inode;
  const OperationKind kind = creates(mode) ? OperationKind::kCreate : OperationKind::kOpen;
  const int number = run({.kind = kind, .path = path, .inode = inode}, [&](SimulatedDrive::Power) {
    if (place.error != 0) return place.error;
    if (creates(mode)) {
      if (inode != 0) return EEXIST;
      inode = image.create(place, FileKind::kRegular);
      return 0;
    }
    if (inode == 0) return ENOENT;
    if (image.at(inode).kind == FileKind::kSymlink) return ELOOP;
    if (image.at(inode).kind != FileKind::kRegular) return EISDIR;
    return image.at(inode).leased ? EWOULDBLOCK : 0;
  });
  const std::string doing = concat("open ", path);
  if (number == EWOULDBLOCK) {
    return Error(Code::kUnavailable, concat(doing, ": in use under a lease"), number);
  }
  auto done = answer(number, doing);
  if (!done) return std::move(done).error();
  ++image.at(inode).open_count;
  const FileId id{.value = next_id_++};
  files_[id.value] = {.inode = inode, .facts = {.path = path, .mode = mode}};
  return id;
}

void SimulatedBackend::close(FileId file) noexcept {
  const auto lock = lock_drive();
  const auto found = files_.find(file.value);
  if (found == files_.end()) return;
  const InodeNumber inode = found->second.inode;
  files_.erase(found);
  // After a power cycle the drive knows of no open files.
  if (drive_->generation_ != generation_) return;
  --drive_->image_.at(inode).open_count;
  drive_->image_.at(inode).leased = false;
}

Result<FileStatus> SimulatedBackend::file_status(FileId file) {
  const OpenFile* const open = find(file);
  if (open == nullptr) return not_open(file);
  const auto lock = lock_drive();
  FileStatus found;
  auto done = answer(run({.kind = OperationKind::kStatus, .path = open->facts.path},
                         [&](SimulatedDrive::Power) {
                           found = status_of(drive_->image_.at(open->inode));
                           return 0;
                         }),
                     concat("stat ", open->facts.path));
  if (!done) return std::move(done).error();
  return found;
}

Status SimulatedBackend::write_all(FileId file, std::string_view bytes) {
  const OpenFile* const open = find(file);
  if (open == nullptr) return not_open(file);
  if (uring::is_direct(open->facts.mode)) return wrong_mode(open->facts);
  const auto lock = lock_drive();
  DriveImage& image = drive_->image_;
  const TraceEntry entry{.kind = OperationKind::kWrite,
                         .path = open->facts.path,
                         .inode = open->inode,
                         .bytes = bytes.size()};
  const int number = run(entry, [&](SimulatedDrive::Power power) {
    if (!uring::is_writable(open->facts.mode)) return EBADF;
    if (power == SimulatedDrive::Power::kLying) return 0;
    if (image.used_bytes() + round_up(bytes.size(), kBlockBytes) >
        drive_->options_.capacity_bytes) {
      return ENOSPC;
    }
    image.write(open->inode, 0, std::as_bytes(std::span(bytes)));
    return 0;
  });
  return answer(number, concat("write ", open->facts.path));
}

Result<std::string> SimulatedBackend::read_all(FileId file, std::uint64_t bytes_max) {
  const OpenFile* const open = find(file);
  if (open == nullptr) return not_open(file);
  if (uring::is_direct(open->facts.mode)) return wrong_mode(open->facts);
  const auto lock = lock_drive();
  std::string bytes;
  auto done =
      answer(run({.kind = OperationKind::kRead, .path = open->facts.path, .inode = open->inode},
                 [&](SimulatedDrive::Power) {
                   const auto& source = drive_->image_.at(open->inode).bytes;
                   bytes.assign(reinterpret_cast<const char*>(source.data()), source.size());
                   return 0;
                 }),
             concat("read ", open->facts.path));
  if (!done) return std::move(done).error();
  if (bytes.size() > bytes_max) {
    return Error(Code::kDataLoss, concat("read ", open->facts.path, ": has ", bytes.size(),
                                         " bytes, at most ", bytes_max, " were expected"));
  }
  return bytes;
}

Status SimulatedBackend::allocate(FileId file, std::uint64_t bytes) {
  return resize(OperationKind::kAllocate, file, bytes);
}

Status SimulatedBackend::truncate(FileId file, std::uint64_t bytes) {
  return resize(OperationKind::kTruncate, file, bytes);
}

Status SimulatedBackend::resize(OperationKind kind, FileId file, std::uint64_t bytes) {
  const OpenFile* const open = find(file);
  if (open == nullptr) return not_open(file);
  const auto lock = lock_drive();
  DriveImage& image = drive_->image_;
  const TraceEntry entry{
      .kind = kind, .path = open->facts.path, .inode = open->inode, .bytes = bytes};
  const int number = run(entry, [&](SimulatedDrive::Power) {
    if (!uring::is_writable(open->facts.mode)) return EBADF;
    const std::uint64_t own_bytes = round_up(image.at(open->inode).bytes.size(), kBlockBytes);
    const std::uint64_t other_bytes = image.used_bytes() - own_bytes;
    if (other_bytes + round_up(bytes, kBlockBytes) > drive_->options_.capacity_bytes) {
      return ENOSPC;
    }
    image.resize(open->inode, bytes);
    return 0;
  });
  return answer(number, concat(simulated::name(kind), " ", open->facts.path, " to ", bytes));
}

Status SimulatedBackend::sync(FileId file) {
  const OpenFile* const open = find(file);
  if (open == nullptr) return not_open(file);
  const auto lock = lock_drive();
  const int number =
      run({.kind = OperationKind::kSync, .path = open->facts.path, .inode = open->inode},
          [&](SimulatedDrive::Power power) {
            if (power == SimulatedDrive::Power::kOn) drive_->image_.sync(open->inode);
            return 0;
          });
  return answer(number, concat("fsync ", open->facts.path));
}

Result<bool> SimulatedBackend::take_for_writing(FileId file) {
  const OpenFile* const open = find(file);
  if (open == nullptr) return not_open(file);
  const auto lock = lock_drive();
  bool is_taken = false;
  auto done = answer(run({.kind = OperationKind::kStatus, .path = open->facts.path},
                         [&](SimulatedDrive::Power) {
                           Inode& inode = drive_->image_.at(open->inode);
                           is_taken = inode.link_count == 1 && inode.open_count == 1 &&
                                      !inode.open_elsewhere;
                           inode.leased = is_taken;
                           return 0;
                         }),
                     concat("lease ", open->facts.path));
  if (!done) return std::move(done).error();
  return is_taken;
}

// --- Names --------------------------------------------------------------------------------------

Status SimulatedBackend::change_name(OperationKind kind, const std::string& path,
                                     const std::function<int(const Place& place)>& change) {
  const auto lock = lock_drive();
  const Place place = drive_->image_.find(path);
  const TraceEntry entry{.kind = kind, .path = path, .inode = place.inode};
  const int number = run(
      entry, [&](SimulatedDrive::Power) { return place.error != 0 ? place.error : change(place); });
  return answer(number, concat(simulated::name(kind), " ", path));
}

Result<FileStatus> SimulatedBackend::status(const std::string& path) {
  FileStatus found;
  auto done = change_name(OperationKind::kStatus, path, [&](const Place& place) {
    if (place.inode == 0) return ENOENT;
    found = status_of(drive_->image_.at(place.inode));
    return 0;
  });
  if (!done) return std::move(done).error();
  return found;
}

Status SimulatedBackend::rename(const std::string& source, const std::string& target,
                                uring::RenameMode mode) {
  const auto lock = lock_drive();
  DriveImage& image = drive_->image_;
  const Place from = image.find(source);
  const Place to = image.find(target);
  const TraceEntry entry{
      .kind = OperationKind::kRename, .path = source, .target = target, .inode = from.inode};
  const int number = run(entry, [&](SimulatedDrive::Power) {
    if (from.error != 0) return from.error;
    return to.error != 0 ? to.error : image.rename(from, to, mode);
  });
  return answer(number, concat("rename ", source, " to ", target));
}

Status SimulatedBackend::unlink(const std::string& path) {
  return change_name(OperationKind::kUnlink, path, [&](const Place& place) {
    if (place.inode == 0) return ENOENT;
    if (drive_->image_.at(place.inode).kind == FileKind::kDirectory) return EISDIR;
    drive_->image_.set_name(place.directory, place.name, 0);
    return 0;
  });
}

Status SimulatedBackend::make_directory(const std::string& path) {
  return change_name(OperationKind::kMakeDirectory, path, [&](const Place& place) {
    if (place.inode != 0) return EEXIST;
    (void)drive_->image_.create(place, FileKind::kDirectory);
    return 0;
  });
}

Status SimulatedBackend::remove_directory(const std::string& path) {
  return change_name(OperationKind::kRemoveDirectory, path, [&](const Place& place) {
    if (place.inode == 0) return ENOENT;
    if (drive_->image_.at(place.inode).kind != FileKind::kDirectory) return ENOTDIR;
    if (!drive_->image_.is_empty_directory(place.inode)) return ENOTEMPTY;
    if (place.inode == kRootInode) return EBUSY;
    drive_->image_.set_name(place.directory, place.name, 0);
    return 0;
  });
}

Status SimulatedBackend::sync_directory(const std::string& path) {
  const auto lock = lock_drive();
  DriveImage& image = drive_->image_;
  const Place place = image.find(path);
  const TraceEntry entry{.kind = OperationKind::kSyncDirectory, .path = path, .inode = place.inode};
  const int number = run(entry, [&](SimulatedDrive::Power power) {
    if (place.error != 0) return place.error;
    if (place.inode == 0) return ENOENT;
    if (image.at(place.inode).kind != FileKind::kDirectory) return ENOTDIR;
    if (power == SimulatedDrive::Power::kOn) image.sync_directory(place.inode);
    return 0;
  });
  return answer(number, concat("fsync directory ", path));
}

Result<std::vector<uring::DirectoryEntry>> SimulatedBackend::list_directory(
    const std::string& path) {
  std::vector<uring::DirectoryEntry> entries;
  auto done = change_name(OperationKind::kList, path, [&](const Place& place) {
    if (place.inode == 0) return ENOENT;
    const Inode& directory = drive_->image_.at(place.inode);
    if (directory.kind != FileKind::kDirectory) return ENOTDIR;
    for (const auto& [entry_name, states] : directory.names) {
      if (states.back() == 0) continue;
      entries.push_back({.name = entry_name, .kind = drive_->image_.at(states.back()).kind});
    }
    return 0;
  });
  if (!done) return std::move(done).error();
  // In no order, as on a drive.
  const auto lock = lock_drive();
  for (std::size_t i = entries.size(); i > 1; --i) {
    std::swap(entries[i - 1], entries[drive_->rng_.below(i)]);
  }
  return entries;
}

Status SimulatedBackend::make_symlink(const std::string& target, const std::string& path) {
  return change_name(OperationKind::kMakeSymlink, path, [&](const Place& place) {
    if (place.inode != 0) return EEXIST;
    const InodeNumber inode = drive_->image_.create(place, FileKind::kSymlink);
    const ConstBytes text = std::as_bytes(std::span(target));
    drive_->image_.at(inode).bytes.assign(text.begin(), text.end());
    return 0;
  });
}

Result<uring::SpaceStatus> SimulatedBackend::space(const std::string& path) {
  uring::SpaceStatus found;
  auto done = change_name(OperationKind::kStatus, path, [&](const Place& place) {
    if (place.inode == 0) return ENOENT;
    const std::uint64_t used_bytes = drive_->image_.used_bytes();
    const std::uint64_t capacity_bytes = drive_->options_.capacity_bytes;
    found = {.free_bytes = capacity_bytes - std::min(used_bytes, capacity_bytes),
             .total_bytes = capacity_bytes};
    return 0;
  });
  if (!done) return std::move(done).error();
  return found;
}

}  // namespace stillframe::simulated
