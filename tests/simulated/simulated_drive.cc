#include "tests/simulated/simulated_drive.h"

#include <cerrno>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/text.h"

namespace stillframe::simulated {

std::string_view name(OperationKind kind) noexcept {
  switch (kind) {
    case OperationKind::kCreate: return "create";
    case OperationKind::kWrite: return "write";
    case OperationKind::kSync: return "fsync";
    case OperationKind::kAllocate: return "allocate";
    case OperationKind::kTruncate: return "truncate";
    case OperationKind::kRename: return "rename";
    case OperationKind::kUnlink: return "unlink";
    case OperationKind::kMakeDirectory: return "mkdir";
    case OperationKind::kRemoveDirectory: return "rmdir";
    case OperationKind::kSyncDirectory: return "fsync directory";
    case OperationKind::kMakeSymlink: return "symlink";
    case OperationKind::kOpen: return "open";
    case OperationKind::kRead: return "read";
    case OperationKind::kList: return "list";
    case OperationKind::kStatus: return "status";
  }
  return "operation of unknown kind";
}

std::string TraceEntry::text() const {
  std::string text = concat(name(kind), " ", path);
  if (!target.empty()) text += concat(" -> ", target);
  return text + concat(" #", inode, " ", offset, "+", bytes, ": ", error);
}

std::shared_ptr<SimulatedDrive> SimulatedDrive::create(DriveOptions options) {
  return std::shared_ptr<SimulatedDrive>(new SimulatedDrive(options));
}

int SimulatedDrive::run(TraceEntry entry, const Effect& effect) {
  if (is_off_) return kPowerOff;
  if (is_mutating(entry.kind)) {
    if (cut_at_ && operation_count_ >= *cut_at_) {
      is_off_ = true;
      // The operation was on its way: what it changes may or may not be there after the crash.
      (void)effect(Power::kFailing);
      return kPowerOff;
    }
    ++operation_count_;
  }
  entry.error = matching_fault(entry);
  if (entry.error != 0) ++fault_count_;
  if (entry.error == kLostWrite) {
    entry.error = effect(Power::kLying);
  } else if (entry.error == 0) {
    entry.error = effect(Power::kOn);
  } else if (entry.kind == OperationKind::kSync) {
    image_.fail_sync(entry.inode, rng_);
  }
  const int error = entry.error;
  trace_.push_back(std::move(entry));
  return error;
}

int SimulatedDrive::matching_fault(const TraceEntry& entry) {
  int error = 0;
  for (ArmedFault& armed : faults_) {
    const Fault& fault = armed.fault;
    if (fault.kind ? *fault.kind != entry.kind : !is_mutating(entry.kind)) continue;
    if (entry.path.find(fault.path_contains) == std::string::npos) continue;
    ++armed.match_count;
    if (armed.match_count == fault.nth || (fault.for_ever && armed.match_count > fault.nth)) {
      error = fault.error;
    }
  }
  return error;
}

void SimulatedDrive::cut_power_at(std::uint64_t operation_count) {
  const std::lock_guard lock(mutex_);
  cut_at_ = operation_count;
}

void SimulatedDrive::cut_power() {
  const std::lock_guard lock(mutex_);
  is_off_ = true;
}

bool SimulatedDrive::is_power_off() const {
  const std::lock_guard lock(mutex_);
  return is_off_;
}

std::uint64_t SimulatedDrive::operation_count() const {
  const std::lock_guard lock(mutex_);
  return operation_count_;
}

void SimulatedDrive::power_cycle() {
  const std::lock_guard lock(mutex_);
  image_.crash(rng_);
  ++generation_;
  cut_at_.reset();
  faults_.clear();
  is_off_ = false;
}

std::shared_ptr<SimulatedDrive> SimulatedDrive::crashed_copy(std::uint64_t seed) const {
  DriveOptions options = options_;
  options.seed = seed;
  auto copy = create(options);
  const std::lock_guard lock(mutex_);
  copy->image_ = image_;
  copy->image_.crash(copy->rng_);
  return copy;
}

void SimulatedDrive::fail(Fault fault) {
  const std::lock_guard lock(mutex_);
  faults_.push_back({.fault = std::move(fault)});
}

void SimulatedDrive::clear_faults() {
  const std::lock_guard lock(mutex_);
  faults_.clear();
}

std::uint64_t SimulatedDrive::fault_count() const {
  const std::lock_guard lock(mutex_);
  return fault_count_;
}

void SimulatedDrive::flip_bit(std::string_view path, std::uint64_t bit_index) {
  const std::lock_guard lock(mutex_);
  const Place place = image_.find(path);
  check(place.inode != 0, "flip_bit() names a file");
  Inode& file = image_.at(place.inode);
  check(bit_index / 8 < file.bytes.size(), "flip_bit() names a bit of the file");
  const auto mask = static_cast<std::byte>(1U << (bit_index % 8));
  file.bytes[bit_index / 8] ^= mask;
  if (bit_index / 8 < file.durable_bytes.size()) file.durable_bytes[bit_index / 8] ^= mask;
}

void SimulatedDrive::set_open_elsewhere(std::string_view path, bool is_open) {
  const std::lock_guard lock(mutex_);
  const Place place = image_.find(path);
  check(place.inode != 0, "set_open_elsewhere() names a file");
  image_.at(place.inode).open_elsewhere = is_open;
}

void SimulatedDrive::set_capacity(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  options_.capacity_bytes = bytes;
}

std::vector<TraceEntry> SimulatedDrive::trace() const {
  const std::lock_guard lock(mutex_);
  return trace_;
}

std::string SimulatedDrive::trace_text() const {
  std::string text;
  for (const TraceEntry& entry : trace()) text += entry.text() + "\n";
  return text;
}

void SimulatedDrive::clear_trace() {
  const std::lock_guard lock(mutex_);
  trace_.clear();
}

std::uint64_t SimulatedDrive::syncs_after_failed_sync() const {
  std::uint64_t count = 0;
  std::set<InodeNumber> failed;
  for (const TraceEntry& entry : trace()) {
    if (entry.kind != OperationKind::kSync) continue;
    if (failed.contains(entry.inode)) ++count;
    if (entry.error != 0) failed.insert(entry.inode);
  }
  return count;
}

}  // namespace stillframe::simulated
