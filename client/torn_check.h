#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "base/bytes.h"
#include "client/capture_sources.h"

namespace stillframe::client {

// Looks whether lazy tensors changed while they were captured: compares blocks of 4 KiB of them
// with the snapshot. A difference proves a torn capture; no difference proves nothing unless all
// was compared. Session thread.
class TornCheck {
 public:
  static constexpr std::uint64_t kSampleCountMax = 256;  // About 0.3 ms.

  enum class Extent : std::uint8_t {
    kSample,  // At most kSampleCountMax blocks, others at each save, so that all have their turn.
    kFull,    // Every block.
  };
  // The name of a tensor that differs; nullopt when none was found.
  std::optional<std::string> find_torn(const CaptureSources& sources, ConstBytes slot,
                                       Extent extent);

 private:
  std::uint64_t turn_ = 0;  // Samples taken so far, over all saves.
};

}  // namespace stillframe::client
