#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "base/result.h"
#include "client/libstillframe.h"
#include "uring/io_backend.h"

namespace stillframe::client {

// What is put down besides the tensors.
struct WriteRequest {
  std::string path;
  std::uint64_t nonce = 0;  // Of the temporary name.
  // Of a whole model alone:
  std::string run_id;  // 32 hexadecimal digits.
  std::int64_t wall_ns = 0;
  std::string state_json;
  bool has_pickle = false;
  std::string framework;
  std::string python_version;
};

// Both make everything under a temporary name in the target's directory, fsync it and rename it, so
// that `path` is the old or the new one whatever happens, and durable on return. They block, on the
// thread of `io`, which has no other request in flight. After an error nothing is left of the new
// one, as far as the drive lets it. What killed processes left is removed by the next call.
//
// kInvalidArgument: the path cannot be a saved model's, or something else is there.
// kResourceExhausted: the disk is full. kDataLoss: a tensor changed while it was saved.

// A directory with the parts: a checkpoint that stands alone (docs/FORMAT.md section 1). Replaces a
// saved model or an empty directory; parents are made.
Status write_model(uring::IoBackend& io, std::span<const sf_part> parts,
                   std::span<const sf_source> sources, const WriteRequest& request);

// One safetensors file that carries its own hashes (docs/FORMAT.md section 9). Replaces any regular
// file. The part's name is not used.
Status write_file(uring::IoBackend& io, const sf_part& part, std::span<const sf_source> sources,
                  const WriteRequest& request);

}  // namespace stillframe::client
