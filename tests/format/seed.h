#pragma once

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>

namespace stillframe::format {

// A generator whose seed is printed, and which STILLFRAME_SEED makes repeat a run.
inline std::mt19937_64 seeded_generator() {
  const char* const wish = std::getenv("STILLFRAME_SEED");
  const std::uint64_t seed =
      wish != nullptr ? std::strtoull(wish, nullptr, 10) : std::uint64_t{std::random_device()()};
  std::cout << "STILLFRAME_SEED=" << seed << '\n';
  return std::mt19937_64(seed);
}

// From 0 to `below` - 1.
inline std::uint64_t pick(std::mt19937_64& random, std::uint64_t below) { return random() % below; }

}  // namespace stillframe::format
