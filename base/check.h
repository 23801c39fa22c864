#pragma once

#include <cstdio>
#include <cstdlib>

namespace stillframe {

// Ends the process when `condition` is false, in every build type. For our own bugs only: what can
// happen on a healthy build (a full disk, a dead peer, hostile bytes) is a Result.
//
// Inside the trainer's process (client/), use it only where going on could corrupt the trainer's
// memory; everything else there is an Error with Code::kInternal.
//
// Builtins instead of std::source_location, which clang 14 (it compiles the fuzz targets) cannot
// have from libstdc++ 12.
inline void check(bool condition, const char* meaning, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (condition) [[likely]] {
    return;
  }
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, meaning);
  // abort(), not exit(): no destructor may run on state that has just been proved wrong.
  std::abort();
}

}  // namespace stillframe
