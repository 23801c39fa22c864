#pragma once

#include <cstdint>

namespace stillframe {

// Where nonces come from. A test passes a seeded one and prints the seed.
class Rng {
 public:
  virtual ~Rng() = default;
  virtual std::uint64_t next() noexcept = 0;
};

// The kernel's generator, getrandom(2).
class SystemRng final : public Rng {
 public:
  std::uint64_t next() noexcept override;
};

}  // namespace stillframe
