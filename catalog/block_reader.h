#pragma once

// Reads parts from disk in 1 MiB blocks, several in flight, in whatever order they complete. The
// one reading loop of restore, verify and copying out.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "catalog/run.h"
#include "format/safetensors.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// 8 x 1 MiB: the bytes in flight that keep a drive busy, in blocks so small that all of them stay
// in the last-level cache between the drive's store and the hash (adr/0007).
inline constexpr std::size_t kReadBlockBytes = std::size_t{1} << 20;
inline constexpr std::size_t kReadDepth = 8;

// Everything in this header needs the backend for itself while it runs: no other request in flight.

// An opened checkpoint: every part's file open (O_DIRECT, regular, not a link), its length equal to
// the manifest's, header decoded, sums checked. Keeps the files open, so that a retired part is not
// recycled under the reader.
struct OpenPart {
  uring::FileId file;
  std::string file_name;
  std::uint64_t bytes = 0;
  format::PartImage image;  // Header and places of tensors.
  // Empty only for a file that stands alone and has none: nothing of it can be checked.
  std::vector<std::uint64_t> extent_hashes;
};

class OpenCheckpoint {
 public:
  // kDataLoss names the file, and for a header the extent, that does not match.
  static Result<OpenCheckpoint> open(uring::IoBackend& io, const Checkpoint& checkpoint);
  // Opens what can be opened, for verify_checkpoint(): parts that cannot are left out and described
  // in `damage`, and no header is read, so each part's `image` is empty.
  static Result<OpenCheckpoint> open_damaged(uring::IoBackend& io, const Checkpoint& checkpoint,
                                             std::vector<std::string>& damage);
  // A safetensors file that stands alone (docs/FORMAT.md section 9), as a checkpoint of one part
  // and no state. One with hashes in its header has them checked as far as the header goes;
  // kDataLoss: it is damaged, or no safetensors file. One without is taken for a stranger's.
  static Result<OpenCheckpoint> open_file(uring::IoBackend& io, const std::string& path);
  OpenCheckpoint(OpenCheckpoint&&) noexcept;
  OpenCheckpoint& operator=(OpenCheckpoint&&) noexcept;
  ~OpenCheckpoint();  // Closes the files.

  const std::vector<OpenPart>& parts() const noexcept { return parts_; }
  const Checkpoint& checkpoint() const noexcept { return checkpoint_; }
  // The bytes of state.json of that rank, verified. kDataLoss when they do not match. kNotFound:
  // the checkpoint has no such rank.
  Result<std::string> read_state(std::uint32_t rank) const;

 private:
  OpenCheckpoint(uring::IoBackend& io, Checkpoint checkpoint);
  uring::IoBackend* io_;
  Checkpoint checkpoint_;
  std::vector<OpenPart> parts_;
};

// One block that came from the drive: an extent of one part, not yet checked against its hash.
struct ReadBlock {
  std::size_t part = 0;
  std::uint64_t offset = 0;  // In the part; a multiple of kExtentBytes.
  Bytes bytes;               // In the staging memory; ends with the part.
};

// Which blocks of which part are wanted: a part's index and a range of its extents.
struct ExtentRange {
  std::size_t part = 0;
  std::uint64_t first_extent = 0;
  std::uint64_t extent_count = 0;
};

// Belongs to the thread of `io`. `staging` is split into blocks of kReadBlockBytes (at least one),
// must be aligned to kBlockBytes and outlive the reader. recycle() may be called only on that
// thread too.
class BlockReader {
 public:
  BlockReader(uring::IoBackend& io, const OpenCheckpoint& checkpoint,
              std::vector<ExtentRange> wanted, Bytes staging);
  ~BlockReader();  // Waits for reads in flight.

  // Waits for a block; nullopt once all wanted blocks were handed out. With every staging block
  // lent out, recycle() one first (kInternal otherwise). kUnavailable: the drive failed; kDataLoss:
  // the file ends early.
  Result<std::optional<ReadBlock>> next();
  // True when next() would have to wait for the caller to recycle a block.
  bool starved() const noexcept;
  void recycle(const ReadBlock& block);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Reads every extent of every part and compares hashes, state.json and the manifest included, and
// looks for parts that the manifest does not list. Returns all damage found, each as text
// "model.safetensors extent 17 (offset 17825792, 1048576 bytes): hash differs". kUnavailable: the
// drive failed a read.
Result<std::vector<std::string>> verify_checkpoint(uring::IoBackend& io,
                                                   const Checkpoint& checkpoint, Bytes staging);

// Copies the parts (verified while they are copied) and the small files to a new directory,
// fsynced. What differs from its hash is an error and leaves no directory. Until it is complete the
// directory is named `target_path` with ".partial" behind it; one that a crash left there is
// kInvalidArgument.
Status copy_out(uring::IoBackend& io, const Checkpoint& checkpoint, const std::string& target_path,
                Bytes staging);

}  // namespace stillframe::catalog
