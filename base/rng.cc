#include "base/rng.h"

#include <sys/random.h>

#include "base/check.h"

namespace stillframe {

std::uint64_t SystemRng::next() noexcept {
  std::uint64_t value = 0;
  // Up to 256 bytes come whole and without EINTR once the pool is initialised; see getrandom(2).
  check(::getrandom(&value, sizeof value, 0) == sizeof value, "getrandom gave no bytes");
  return value;
}

}  // namespace stillframe
