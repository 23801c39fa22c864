#pragma once

// A checkpoint that a tool makes and no trainer: an import. The same steps in the same order as a
// save (docs/ARCHITECTURE.md section 4), without a daemon and without a snapshot, so in as little
// memory as the staging has.

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "catalog/part_copy.h"
#include "catalog/run.h"
#include "format/safetensors.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

struct NewCheckpoint {
  std::int64_t step = 0;
  std::int64_t wall_ns = 0;
  std::map<std::string, double> metrics = {};
  std::string framework = {};
  std::string python_version = {};
  std::vector<format::PartSpec> parts = {};
  std::string state_json = {};
};

// Which bytes are wanted: of tensor `tensor` of part `part`, from `offset` on.
struct TensorSlice {
  std::size_t part = 0;
  std::string_view tensor;
  std::uint64_t offset = 0;
};
// Fills `target` with them.
using FillTensor = std::function<Status(const TensorSlice& slice, Bytes target)>;

// What can be said without touching the run: names, sizes, metrics. kInvalidArgument names it.
Status check_new_checkpoint(const NewCheckpoint& wanted);

// Commits it as the run's newest. The caller holds the run's lock, and made the run
// (create_run()); `nonce` is its own. `staging` holds at least two blocks of kReadBlockBytes.
// kResourceExhausted: the disk is full. An error of `fill` is this call's; the temporary directory
// is removed and the run is as it was.
Result<Checkpoint> commit_new_checkpoint(uring::IoBackend& io, const std::string& run_path,
                                         std::uint64_t nonce, const NewCheckpoint& wanted,
                                         const FillTensor& fill, Bytes staging,
                                         const Progress& progress);

}  // namespace stillframe::catalog
