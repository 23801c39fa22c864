#include "client/torn_check.h"

#include <algorithm>

namespace stillframe::client {

namespace {

bool block_matches(const CaptureSources& sources, TensorPlace place, std::uint64_t offset,
                   std::uint64_t bytes, ConstBytes slot, const TornCheck::Packed* packed) {
  const kernels::Source& source = sources.source(place);
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

  if (extent == Extent::kFull) {
    for (const TensorPlace place : lazy) {
      const std::uint64_t end = sources.source(place).bytes;
      for (std::uint64_t offset = 0; offset < end; offset += kBlockBytes) {
        const std::uint64_t bytes = std::min<std::uint64_t>(kBlockBytes, end - offset);
        if (!block_matches(sources, place, offset, bytes, slot, packed)) return name(place);
      }
    }
    return std::nullopt;
  }
  const auto chosen =
      sampler_.choose(lazy.size(), [&](std::size_t i) { return sources.source(lazy[i]).bytes; });
  for (const BlockSampler::Block& block : chosen) {
    const TensorPlace place = lazy[block.tensor];
    if (!block_matches(sources, place, block.offset, block.bytes, slot, packed)) return name(place);
  }
  return std::nullopt;
}

}  // namespace stillframe::client
