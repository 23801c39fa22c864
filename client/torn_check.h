#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "client/block_sampler.h"
#include "client/capture_sources.h"

namespace stillframe::client {

// Looks whether lazy tensors changed while they were captured: compares blocks of 4 KiB of them
// with the snapshot. A difference proves a torn capture; no difference proves nothing unless all
// was compared. Session thread.
class TornCheck {
 public:
  enum class Extent : std::uint8_t {
    kSample,  // Those of a BlockSampler: about 0.3 ms.
    kFull,    // Every block.
  };
  // By part and extent: those whose bytes were taken at once, and which may not be in the slot yet.
  using Packed = std::vector<std::vector<bool>>;
  // The name of a tensor that differs; nullopt when none was found. nullptr: none.
  std::optional<std::string> find_torn(const CaptureSources& sources, ConstBytes slot,
                                       Extent extent, const Packed* packed = nullptr);

 private:
  BlockSampler sampler_;
};

}  // namespace stillframe::client
