#include "daemon/snapshot_plan.h"

#include <limits>
#include <set>
#include <utility>

#include "base/hash.h"
#include "base/text.h"
#include "format/manifest.h"
#include "shm/messages.h"

namespace stillframe::daemon {

namespace {

constexpr std::size_t kPartCountMax = 64;

Result<format::PartSpec> part_from_wire(shm::wire::PartT&& part) {
  format::PartSpec spec{.name = std::move(part.name), .tensors = {}, .metadata = {}};
  spec.tensors.reserve(part.tensors.size());
  for (auto& tensor : part.tensors) {
    const auto dtype = format::dtype_from_number(tensor->dtype);
    if (!dtype) {
      return Error(Code::kInvalidArgument, concat("layout: tensor ", tensor->name,
                                                  " has the unknown dtype number ", tensor->dtype));
    }
    spec.tensors.push_back(
        {.name = std::move(tensor->name), .dtype = *dtype, .shape = std::move(tensor->shape)});
  }
  for (auto& entry : part.metadata) {
    spec.metadata.emplace(std::move(entry->key), std::move(entry->value));
  }
  return spec;
}

}  // namespace

Result<SnapshotPlan> plan_snapshot(ConstBytes layout_blob) {
  auto layout = shm::decode_layout(layout_blob);
  if (!layout) return std::move(layout).error();
  if (layout->parts.empty() || layout->parts.size() > kPartCountMax) {
    return Error(Code::kInvalidArgument, concat("layout: ", layout->parts.size(), " parts, 1 to ",
                                                kPartCountMax, " allowed"));
  }

  SnapshotPlan plan;
  plan.layout_id = hash64(layout_blob);
  std::set<std::string> names;
  std::vector<std::uint64_t> image_bytes;
  for (auto& wire_part : layout->parts) {
    auto spec = part_from_wire(std::move(*wire_part));
    if (!spec) return std::move(spec).error();
    auto image = format::place(*spec);
    if (!image) return std::move(image).error();
    if (!names.insert(image->name).second) {
      return Error(Code::kInvalidArgument, concat("layout: part ", image->name, " occurs twice"));
    }
    const std::uint64_t count = format::extent_count(image->bytes);
    if (count > std::numeric_limits<std::uint32_t>::max()) {
      return Error(Code::kInvalidArgument, concat("layout: part ", image->name, " is too large"));
    }
    plan.extent_counts.push_back(static_cast<std::uint32_t>(count));
    plan.extent_count += count;
    plan.bytes += image->bytes;
    image_bytes.push_back(image->bytes);
    plan.parts.push_back(*std::move(image));
  }
  auto slot = shm::plan_slot(image_bytes);
  if (!slot) return std::move(slot).error();
  plan.part_offsets = std::move(slot->part_offsets);
  plan.slot_bytes = slot->slot_bytes;
  return plan;
}

}  // namespace stillframe::daemon
