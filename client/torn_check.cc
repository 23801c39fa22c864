#include "client/torn_check.h"

#include <algorithm>

namespace stillframe::client {

namespace {

std::uint64_t block_count(std::uint64_t bytes) {
  return bytes / kBlockBytes + (bytes % kBlockBytes != 0 ? 1 : 0);
}

// A bijection that leaves no pattern between neighbours (the finalizer of SplitMix64).
std::uint64_t scramble(std::uint64_t value) noexcept {
  value += 0x9E3779B97F4A7C15U;
  value = (value ^ (value >> 30U)) * 0xBF58476D1CE4E5B9U;
  value = (value ^ (value >> 27U)) * 0x94D049BB133111EBU;
  return value ^ (value >> 31U);
}

bool block_matches(const CaptureSources& sources, TensorPlace place, std::uint64_t block,
                   ConstBytes slot, const TornCheck::Packed* packed) {
  const kernels::Source& source = sources.source(place);
  const std::uint64_t offset = block * kBlockBytes;
  const std::uint64_t bytes = std::min<std::uint64_t>(kBlockBytes, source.bytes - offset);
  if (packed != nullptr) {
    const std::vector<bool>& part = (*packed)[place.part];
    const std::uint64_t begin = source.image_offset + offset;
    if (part[begin / kExtentBytes] || part[(begin + bytes - 1) / kExtentBytes]) return true;
  }
  const std::uint64_t slot_offset =
      sources.layout().parts[place.part].slot_offset + source.image_offset + offset;
  return kernels::matches(source, offset, slot.subspan(slot_offset, bytes));
}

}  // namespace

std::optional<std::string> TornCheck::find_torn(const CaptureSources& sources, ConstBytes slot,
                                                Extent extent, const Packed* packed) {
  const auto lazy = sources.lazy();
  if (lazy.empty()) return std::nullopt;
  const auto name = [&sources](TensorPlace place) {
    return sources.layout().tensor(place).spec.name;
  };

  std::uint64_t total_count = 0;
  if (extent == Extent::kSample) {
    for (const TensorPlace place : lazy) {
      total_count += block_count(sources.source(place).bytes);
      if (total_count > kSampleCountMax) break;
    }
  }
  if (extent == Extent::kFull || total_count <= kSampleCountMax) {
    for (const TensorPlace place : lazy) {
      const std::uint64_t count = block_count(sources.source(place).bytes);
      for (std::uint64_t block = 0; block < count; ++block) {
        if (!block_matches(sources, place, block, slot, packed)) return name(place);
      }
    }
    return std::nullopt;
  }

  for (std::uint64_t i = 0; i < kSampleCountMax; ++i, ++turn_) {
    const TensorPlace place = lazy[turn_ % lazy.size()];
    const std::uint64_t block = scramble(turn_) % block_count(sources.source(place).bytes);
    if (!block_matches(sources, place, block, slot, packed)) return name(place);
  }
  return std::nullopt;
}

}  // namespace stillframe::client
