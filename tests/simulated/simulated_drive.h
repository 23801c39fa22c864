#pragma once

// A drive in memory that loses power, fails and rots on command. drive_image.h states its fault
// model; this file is how a test commands it.
//
//   auto drive = SimulatedDrive::create({.seed = seed});
//   drive->cut_power_at(n);
//   { SimulatedBackend io(drive); ... the code under test, until it fails ... }
//   drive->power_cycle();
//   SimulatedBackend io(drive);  // What is left?

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "tests/simulated/drive_image.h"
#include "tests/simulated/seeded_rng.h"
#include "uring/io_backend.h"

namespace stillframe::simulated {

enum class OperationKind : std::uint8_t {
  // These change the drive: they are counted, and power can be cut at each.
  kCreate,  // open() in a mode that creates.
  kWrite,   // One piece of a request, or write_all().
  kSync,    // fsync of a file, by sync() or by a request.
  kAllocate,
  kTruncate,
  kRename,
  kUnlink,
  kMakeDirectory,
  kRemoveDirectory,
  kSyncDirectory,
  kMakeSymlink,
  // These do not.
  kOpen,
  kRead,  // One piece of a request, or read_all().
  kList,
  kStatus,
};

std::string_view name(OperationKind kind) noexcept;
constexpr bool is_mutating(OperationKind kind) noexcept { return kind < OperationKind::kOpen; }

struct DriveOptions {
  std::uint64_t seed = 0;
  std::uint64_t capacity_bytes = std::uint64_t{1} << 40;
  // Requests move in several short pieces now and then, and meet EAGAIN.
  bool short_transfers = true;
};

// An `error` that is none: a write is answered as done and never reaches the drive.
constexpr int kLostWrite = -1;

// Makes operations fail with `error`, an errno or kLostWrite: the `nth` one that matches, counted
// from fail(); and all later ones too if `for_ever`.
struct Fault {
  std::optional<OperationKind> kind = {};  // Unset: every mutating operation matches.
  std::uint64_t nth = 1;
  int error = 5;  // EIO
  bool for_ever = false;
  std::string path_contains = {};  // Empty: every path matches.
};

// One operation, in the order in which they took effect.
struct TraceEntry {
  OperationKind kind = OperationKind::kOpen;
  std::string path = {};    // As the file was opened; of a rename the source.
  std::string target = {};  // Of a rename.
  InodeNumber inode = 0;    // Stays a file's through renames.
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  int error = 0;  // 0: it was done.

  std::string text() const;  // "write run/model #7 4096+8192: 0"
};

// Outlives its backends: both they and the test own it. Any thread may call.
class SimulatedDrive {
 public:
  static std::shared_ptr<SimulatedDrive> create(DriveOptions options);

  // After `operation_count` mutating operations of the drive's whole life, everything fails with
  // kUnavailable, "power is off". The operation that finds it off may still have reached the drive,
  // as far as nobody was told.
  void cut_power_at(std::uint64_t operation_count);
  void cut_power();
  bool is_power_off() const;
  // Mutating operations so far, failed ones included, those without power not.
  std::uint64_t operation_count() const;

  // Applies the crash model, power cut or not, and is ready for a new backend; old backends fail
  // with kUnavailable for ever. Faults and a cut to come are forgotten; the trace and the count are
  // kept.
  void power_cycle();
  // The same on a copy, with another seed: many crashes of one moment. The copy has no trace.
  std::shared_ptr<SimulatedDrive> crashed_copy(std::uint64_t seed) const;

  void fail(Fault fault);
  void clear_faults();
  // How many operations the faults of fail() have met.
  std::uint64_t fault_count() const;
  // Of the file at `path`, in both images. check()s that it is there.
  void flip_bit(std::string_view path, std::uint64_t bit_index);
  // As if another process had the file open or mapped. Ends with a power cycle.
  void set_open_elsewhere(std::string_view path, bool is_open);
  void set_capacity(std::uint64_t bytes);

  std::vector<TraceEntry> trace() const;
  std::string trace_text() const;  // One entry a line.
  void clear_trace();
  // How often a file was fsynced again after its fsync had failed: more than 0 breaks DUR-2.
  std::uint64_t syncs_after_failed_sync() const;

 private:
  friend class SimulatedBackend;

  explicit SimulatedDrive(DriveOptions options) : options_(options), rng_(options.seed) {}

  // The next three with mutex_ held.
  //
  // Does `effect` unless a fault or the missing power prevents it, counts and traces. Returns 0, an
  // errno, or kPowerOff.
  // Lying: nothing reaches the drive, and the answer is as if it had.
  enum class Power : std::uint8_t { kOn, kFailing, kLying };
  using Effect = std::function<int(Power power)>;
  int run(TraceEntry entry, const Effect& effect);
  int matching_fault(const TraceEntry& entry);
  // No errno: the power is off, or was since this backend was made.
  static constexpr int kPowerOff = 10'000;

  DriveOptions options_;
  mutable std::mutex mutex_;
  SeededRng rng_;
  DriveImage image_;
  std::uint64_t generation_ = 0;  // Power cycles so far.
  std::uint64_t operation_count_ = 0;
  std::optional<std::uint64_t> cut_at_;
  bool is_off_ = false;
  struct ArmedFault {
    Fault fault;
    std::uint64_t match_count = 0;
  };
  std::vector<ArmedFault> faults_;
  std::uint64_t fault_count_ = 0;
  std::vector<TraceEntry> trace_;
};

}  // namespace stillframe::simulated
