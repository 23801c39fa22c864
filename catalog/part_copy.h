#pragma once

// Copies bytes of a part to another file: the one copying loop of restore and of the exports.

#include <cstdint>
#include <functional>
#include <string>

#include "base/bytes.h"
#include "base/result.h"
#include "catalog/block_reader.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// Called with the bytes that were written since the last call.
using Progress = std::function<void(std::uint64_t bytes)>;

struct PartRange {
  std::uint64_t begin = 0;  // In the part; `end` is behind the last byte.
  std::uint64_t end = 0;
  // What the target holds instead of the part's bytes before `begin`. Its length and `begin` are
  // equal modulo kBlockBytes, so that no byte has to be moved in memory.
  std::string head = {};
};

// Writes `head` and then the bytes of the range to `target`, which is open for O_DIRECT writing and
// long enough for whole blocks. Several blocks in flight, each as fast as its own read and write;
// every extent that the range touches is checked against its hash before a byte of it is written.
// kDataLoss names the extent. The caller cuts the target to its length and syncs it.
Status copy_range(uring::IoBackend& io, const OpenPart& part, uring::FileId target,
                  const PartRange& range, Bytes staging, const Progress& progress = {});

}  // namespace stillframe::catalog
