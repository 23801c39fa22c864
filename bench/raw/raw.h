#pragma once

#include <cstddef>
#include <string>

#include "bench/raw/memory.h"

// The machine's own speed, measured without the project's code. Each returns seconds, has no
// warm-up of its own, and ends the process when the system refuses.
namespace raw {

// One memcpy() call of `bytes`, or one per thread for its share.
double copy_seconds(std::byte* target, const std::byte* source, std::size_t bytes,
                    std::size_t thread_count = 1);

enum class FileState {
  kReused,  // Its blocks were all written before; made so, outside the time, if need be.
  kFresh,   // Unlinked and created before, outside the time; fallocate() counts.
};

struct WriteSeconds {
  double taken = 0;    // Until the drive has taken every byte.
  double durable = 0;  // Until fdatasync() has returned as well.
};

// io_uring, O_DIRECT, 4 MiB x depth 4, then fdatasync(). The size of `memory` is a multiple of
// 4096.
WriteSeconds write_phases(const std::string& path, const Memory& memory, FileState state);
// The same: until durable.
double write_seconds(const std::string& path, const Memory& memory, FileState state);

// The same downwards, after dropping the file's cached pages. The file holds memory.bytes().
double read_seconds(const std::string& path, Memory& memory);

// 1 MiB of `memory` to a new file in `directory`, fsync, rename over the last one, fsync of the
// directory. The file is left there as raw_commit.
double commit_seconds(const std::string& directory, const Memory& memory);

}  // namespace raw
