// The entry that libFuzzer calls; compiled once per target, which FUZZ_TARGET names.

#include <cstddef>
#include <cstdint>
#include <span>

#include "tests/fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes);

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  (void)stillframe::fuzz::FUZZ_TARGET(std::as_bytes(std::span(data, bytes)));
  return 0;
}
