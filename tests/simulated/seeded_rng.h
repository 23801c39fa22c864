#pragma once

// Random numbers that a seed repeats. A test prints its seed.

#include <cstdint>

#include "base/rng.h"

namespace stillframe::simulated {

// SplitMix64: every seed, zero included, gives a full-period sequence.
class SeededRng final : public Rng {
 public:
  explicit SeededRng(std::uint64_t seed) noexcept : state_(seed) {}

  std::uint64_t next() noexcept override {
    state_ += 0x9E3779B97F4A7C15;
    std::uint64_t mixed = state_;
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB;
    return mixed ^ (mixed >> 31);
  }
  // From 0 to `bound` - 1.
  std::uint64_t below(std::uint64_t bound) noexcept { return next() % bound; }

 private:
  std::uint64_t state_;
};

}  // namespace stillframe::simulated
