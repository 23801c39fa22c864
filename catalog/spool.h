#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "base/result.h"
#include "catalog/change.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// RUN/.stillframe/spool while one victim's parts move in. A spool file's name is a number of its
// own.
class Spool {
 public:
  Spool(uring::IoBackend& io, const std::string& run_path, const SpoolLimits& limits);

  // Moves the part at `path` in. False: it does not fit the limits or has other names (DUR-7); it
  // is still where it was.
  Result<bool> take_in(const std::string& path);
  // Makes the moves durable.
  Status sync();

 private:
  Status count();

  uring::IoBackend& io_;
  std::string path_;
  SpoolLimits limits_;
  bool is_counted_ = false;
  bool has_moved_ = false;
  std::size_t file_count_ = 0;
  std::uint64_t bytes_ = 0;
  std::uint64_t next_number_ = 1;
};

}  // namespace stillframe::catalog
