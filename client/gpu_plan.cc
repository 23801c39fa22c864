#include "client/gpu_plan.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/bytes.h"
#include "client/capture_sources.h"

namespace stillframe::client {

namespace {

constexpr int kHost = -1;
// Of what lies in the staging and among the early copies: one access of the kernels.
constexpr std::uint64_t kAlignment = 16;

// By part and source, which of the GPU's tensors it is.
using TensorOfSource = std::vector<std::vector<const GpuTensor*>>;

TensorOfSource by_source(const Layout& layout, std::span<const GpuTensor> tensors) {
  TensorOfSource found;
  for (const LayoutPart& part : layout.parts) found.emplace_back(part.image.tensors.size() + 1);
  for (const GpuTensor& tensor : tensors) {
    const TensorPlace place = layout.tensors[tensor.index];
    found[place.part][place.source] = &tensor;
  }
  return found;
}

// Where a source's bytes lie in the image.
struct Run {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

Run run_of(const LayoutPart& part, std::size_t source) {
  if (source == 0) return {0, part.image.header.size()};
  const format::PlacedTensor& tensor = part.image.tensors[source - 1];
  return {tensor.offset, tensor.offset + tensor.bytes};
}

bool is_packed(const GpuTensor* tensor) {
  return tensor != nullptr && tensor->stride_bytes.empty();
}

// The GPU whose extent each is: that of the first tensor in it which a kernel takes.
std::vector<int> owners_of(const LayoutPart& part, const std::vector<const GpuTensor*>& tensors) {
  std::vector<int> owners(part.extent_count, kHost);
  for (std::size_t source = 1; source < tensors.size(); ++source) {
    if (!is_packed(tensors[source])) continue;
    const Run run = run_of(part, source);
    for (std::uint64_t extent = run.begin / kExtentBytes; extent * kExtentBytes < run.end;
         ++extent) {
      if (owners[extent] == kHost) owners[extent] = tensors[source]->ordinal;
    }
  }
  return owners;
}

class Planner {
 public:
  Planner(const Layout& layout, std::span<const GpuTensor> tensors, std::uint32_t max_chunk_extents)
      : layout_(layout), max_chunk_extents_(max_chunk_extents), tensors_(tensors) {}

  GpuPlan run() {
    fetch_strided();
    const TensorOfSource by_part = by_source(layout_, tensors_);
    for (std::uint32_t part = 0; part < layout_.parts.size(); ++part) {
      const std::vector<int> owners = owners_of(layout_.parts[part], by_part[part]);
      add_pieces(part, owners, by_part[part]);
      add_chunks(part, owners);
    }
    for (auto& [ordinal, share] : shares_) plan_.shares.push_back(std::move(share));
    return std::move(plan_);
  }

 private:
  std::uint64_t take_staging(std::uint64_t bytes) {
    const std::uint64_t offset = plan_.staging_bytes;
    plan_.staging_bytes += round_up(bytes, kAlignment);
    return offset;
  }

  // Of a GPU that only has something fetched from it, a share without chunks.
  GpuPlan::Share& share_of(int ordinal) {
    GpuPlan::Share& share = shares_[ordinal];
    share.ordinal = ordinal;
    return share;
  }

  // Whole, from the lowest address of any element to the end of the highest.
  void fetch_strided() {
    for (const GpuTensor& tensor : tensors_) {
      if (tensor.stride_bytes.empty()) continue;
      const TensorPlace place = layout_.tensors[tensor.index];
      const format::TensorSpec& spec = layout_.tensor(place).spec;
      std::uint64_t below = 0;
      std::uint64_t above = format::element_bytes(spec.dtype);
      for (std::size_t i = 0; i < spec.shape.size(); ++i) {
        const std::int64_t stride = tensor.stride_bytes[i];
        const std::uint64_t steps = spec.shape[i] - 1;  // It is not empty.
        if (stride < 0) {
          below += steps * static_cast<std::uint64_t>(-stride);
        } else {
          above += steps * static_cast<std::uint64_t>(stride);
        }
      }
      (void)share_of(tensor.ordinal);
      const std::uint64_t offset = take_staging(below + above);
      plan_.fetches.push_back({.ordinal = tensor.ordinal,
                               .data = tensor.data - below,
                               .bytes = below + above,
                               .staging_offset = offset});
      plan_.fetched.push_back({.tensor = tensor.index, .staging_offset = offset + below});
    }
  }

  void add_pieces(std::uint32_t part_index, const std::vector<int>& owners,
                  const std::vector<const GpuTensor*>& tensors) {
    const LayoutPart& part = layout_.parts[part_index];
    for (std::uint32_t source = 0; source < tensors.size(); ++source) {
      const Run run = run_of(part, source);
      const GpuTensor* const tensor = is_packed(tensors[source]) ? tensors[source] : nullptr;
      bool is_added = false;
      // Extents of one owner at a time.
      for (std::uint64_t begin = run.begin; begin < run.end;) {
        const int owner = owners[begin / kExtentBytes];
        std::uint64_t end = begin;
        while (end < run.end && owners[end / kExtentBytes] == owner) {
          end = std::min(run.end, round_down(end, kExtentBytes) + kExtentBytes);
        }
        if (tensor != nullptr && tensor->ordinal == owner) {
          // One piece for all of them.
          if (!is_added) add_tensor(part_index, *tensor, run);
          is_added = true;
        } else if (owner != kHost) {
          add_staged(part_index, owner, source, tensor, run.begin, {begin, end});
        }
        begin = end;
      }
    }
  }

  void add_piece(std::uint32_t part, int ordinal, const GpuPlan::Piece& piece) {
    std::vector<GpuPlan::PartPieces>& parts = share_of(ordinal).parts;
    if (parts.empty() || parts.back().part != part) parts.push_back({.part = part, .pieces = {}});
    parts.back().pieces.push_back(piece);
  }

  void add_tensor(std::uint32_t part, const GpuTensor& tensor, Run run) {
    const std::uint64_t bytes = run.end - run.begin;
    GpuPlan::Piece piece{.origin = GpuPlan::Origin::kTensor,
                         .where = tensor.data,
                         .image_offset = run.begin,
                         .bytes = bytes};
    if (tensor.is_early) {
      GpuPlan::Share& share = share_of(tensor.ordinal);
      piece.origin = GpuPlan::Origin::kEarly;
      piece.where = share.early_bytes;
      share.early.push_back(
          {.data = tensor.data, .bytes = bytes, .early_offset = share.early_bytes});
      share.early_bytes += round_up(bytes, kAlignment);
    }
    add_piece(part, tensor.ordinal, piece);
  }

  // Bytes of a source that the owner of their extents cannot reach by itself.
  void add_staged(std::uint32_t part, int owner, std::uint32_t source, const GpuTensor* tensor,
                  std::uint64_t source_begin, Run run) {
    const std::uint64_t bytes = run.end - run.begin;
    const std::uint64_t offset = take_staging(bytes);
    if (tensor != nullptr) {
      (void)share_of(tensor->ordinal);
      plan_.fetches.push_back({.ordinal = tensor->ordinal,
                               .data = tensor->data + (run.begin - source_begin),
                               .bytes = bytes,
                               .staging_offset = offset});
    } else {
      plan_.host_runs.push_back({.part = part,
                                 .source = source,
                                 .offset = run.begin - source_begin,
                                 .bytes = bytes,
                                 .staging_offset = offset});
    }
    add_piece(part, owner,
              {.origin = GpuPlan::Origin::kStaging,
               .where = offset,
               .image_offset = run.begin,
               .bytes = bytes});
  }

  void add_chunks(std::uint32_t part, const std::vector<int>& owners) {
    std::vector<bool>& packed = plan_.is_packed.emplace_back(owners.size(), false);
    for (std::uint32_t begin = 0; begin < owners.size();) {
      std::uint32_t end = begin + 1;
      while (end < owners.size() && owners[end] == owners[begin] &&
             end - begin < max_chunk_extents_) {
        ++end;
      }
      if (owners[begin] != kHost) {
        std::fill(packed.begin() + begin, packed.begin() + end, true);
        GpuPlan::Share& share = share_of(owners[begin]);
        share.chunks.push_back({.part = part,
                                .first_extent = begin,
                                .extent_count = end - begin,
                                .first_hash = share.extent_count});
        share.extent_count += end - begin;
      }
      begin = end;
    }
  }

  const Layout& layout_;
  const std::uint32_t max_chunk_extents_;
  std::span<const GpuTensor> tensors_;
  std::map<int, GpuPlan::Share> shares_;
  GpuPlan plan_;
};

}  // namespace

GpuPlan make_gpu_plan(const Layout& layout, std::span<const GpuTensor> tensors,
                      std::uint32_t max_chunk_extents) {
  return Planner(layout, tensors, max_chunk_extents).run();
}

}  // namespace stillframe::client
