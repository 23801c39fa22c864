#include "kernels/host_copy.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "base/check.h"
#include "base/hash.h"
#include "kernels/copy_kernel.h"
#include "kernels/strided.h"
#include "kernels/unit.h"

namespace stillframe::kernels {

namespace {

// Non-temporal stores pass the store buffer: a release store alone does not order them (MEM-3).
void order_stores() noexcept {
#if defined(__SSE2__)
  _mm_sfence();
#else
  std::atomic_thread_fence(std::memory_order_release);
#endif
}

// The index of the last piece that starts at or before `offset`, searched from `first` on; 0 when
// none does.
template <class Piece>
std::size_t find_piece(std::span<const Piece> pieces, std::size_t first,
                       std::uint64_t offset) noexcept {
  if (first >= pieces.size() || pieces[first].image_offset > offset) first = 0;
  const auto after = std::upper_bound(
      pieces.begin() + static_cast<std::ptrdiff_t>(first), pieces.end(), offset,
      [](std::uint64_t wanted, const Piece& piece) { return wanted < piece.image_offset; });
  const auto index = static_cast<std::size_t>(after - pieces.begin());
  return index == 0 ? 0 : index - 1;
}

template <class Piece>
std::uint64_t end_of(const Piece& piece) noexcept {
  return piece.image_offset + piece.bytes;
}

bool overlap(const std::byte* a, const std::byte* b, std::size_t bytes) noexcept {
  const auto first = reinterpret_cast<std::uintptr_t>(a);
  const auto second = reinterpret_cast<std::uintptr_t>(b);
  return first < second + bytes && second < first + bytes;
}

// Fills `run`, the image's bytes from `begin` on, from `sources[at]` and those after it.
void gather_bytes(std::span<const Source> sources, std::size_t at, std::uint64_t begin,
                  Bytes run) noexcept {
  std::size_t done_bytes = 0;
  for (; done_bytes < run.size(); ++at) {
    check(at < sources.size(), "the sources cover the image");
    const Source& source = sources[at];
    const std::uint64_t offset = begin + done_bytes - source.image_offset;
    if (offset >= source.bytes) continue;
    const std::size_t piece_bytes = static_cast<std::size_t>(
        std::min<std::uint64_t>(source.bytes - offset, run.size() - done_bytes));
    if (source.strides == nullptr) {
      std::memcpy(run.data() + done_bytes, source.data + offset, piece_bytes);
    } else {
      gather(*source.strides, source.data, offset, run.subspan(done_bytes, piece_bytes));
    }
    done_bytes += piece_bytes;
  }
}

// The last leaf may be short.
void hash_leaves(const UnitKernels& unit_kernels, ConstBytes run, std::uint64_t* leaves) noexcept {
  const std::size_t whole_count = run.size() / kLeafBytes;
  unit_kernels.hash(run.data(), whole_count, leaves);
  const ConstBytes rest = run.subspan(whole_count * kLeafBytes);
  if (rest.empty()) return;
  std::array<std::byte, kLeafBytes> last{};
  std::memcpy(last.data(), rest.data(), rest.size());
  unit_kernels.hash(last.data(), 1, leaves + whole_count);
}

// Gives `run`, the image's bytes from `begin` on, to `targets[at]` and those after it.
void scatter_bytes(UnitKernels::Copy copy, ConstBytes run, std::uint64_t begin,
                   std::span<const Target> targets, std::size_t at) noexcept {
  const std::uint64_t end = begin + run.size();
  for (; at < targets.size() && targets[at].image_offset < end; ++at) {
    const Target& target = targets[at];
    const std::uint64_t from = std::max(begin, target.image_offset);
    const std::uint64_t to = std::min(end, end_of(target));
    if (from >= to) continue;
    const ConstBytes piece =
        run.subspan(static_cast<std::size_t>(from - begin), static_cast<std::size_t>(to - from));
    const std::uint64_t offset = from - target.image_offset;
    if (target.strides != nullptr) {
      scatter(*target.strides, target.data, offset, piece);
    } else if (target.data + offset != piece.data()) {
      copy(target.data + offset, piece.data(), piece.size());
    }
  }
}

// How many bytes of `piece` from `begin` on can be moved in one go: whole leaves that are
// contiguous there, at most a unit, at most `rest_bytes`; 0 when not even one.
template <class Piece>
std::size_t contiguous_bytes(const Piece& piece, std::uint64_t begin,
                             std::size_t rest_bytes) noexcept {
  if (piece.strides != nullptr || piece.image_offset > begin) return 0;
  const std::uint64_t piece_bytes = end_of(piece) - begin;
  const std::uint64_t bytes =
      std::min({piece_bytes, std::uint64_t{rest_bytes}, std::uint64_t{kUnitBytes}});
  return static_cast<std::size_t>(round_down(bytes, kLeafBytes));
}

}  // namespace

std::uint64_t capture_extent(CopyKernel kernel, std::span<const Source> sources,
                             std::size_t first_source, std::uint64_t extent_begin,
                             std::uint64_t image_bytes, Bytes extent_target) noexcept {
  check(extent_begin < image_bytes && !sources.empty(), "the extent lies within the image");
  const auto extent_bytes =
      static_cast<std::size_t>(std::min<std::uint64_t>(kExtentBytes, image_bytes - extent_begin));
  check(extent_target.size() >= round_up(extent_bytes, kLeafBytes), "the extent fits its place");

  const UnitKernels& unit_kernels = unit_kernels_of(kernel.isa);
  const auto copy_and_hash = unit_kernels.copy_and_hash[static_cast<std::size_t>(kernel.form)];
  LeafHashes leaves{};
  std::size_t at = find_piece(sources, first_source, extent_begin);
  for (std::size_t done_bytes = 0; done_bytes < extent_bytes;) {
    const std::uint64_t begin = extent_begin + done_bytes;
    const std::size_t rest_bytes = extent_bytes - done_bytes;
    std::byte* const target = extent_target.data() + done_bytes;
    std::uint64_t* const run_leaves = &leaves[done_bytes / kLeafBytes];
    while (at + 1 < sources.size() && end_of(sources[at]) <= begin) ++at;

    const std::size_t run_bytes = contiguous_bytes(sources[at], begin, rest_bytes);
    const std::byte* const source =
        run_bytes != 0 ? sources[at].data + (begin - sources[at].image_offset) : nullptr;
    if (run_bytes != 0 && source == target) {
      unit_kernels.hash(target, run_bytes / kLeafBytes, run_leaves);
      done_bytes += run_bytes;
    } else if (run_bytes != 0 && !overlap(source, target, run_bytes)) {
      copy_and_hash(target, source, run_bytes / kLeafBytes, run_leaves);
      done_bytes += run_bytes;
    } else {
      // The scratch also holds still what other threads may change: here the hash is always that of
      // the stored bytes. A leaf at a time keeps it in the first-level cache; strided sources take
      // more, because finding the place in them costs divisions.
      alignas(kLineBytes) std::array<std::byte, kUnitBytes> scratch;
      const bool strided = sources[at].strides != nullptr;
      const std::size_t bytes = std::min(rest_bytes, strided ? kUnitBytes : kLeafBytes);
      const std::size_t leaf_count = (bytes + kLeafBytes - 1) / kLeafBytes;
      gather_bytes(sources, at, begin, {scratch.data(), bytes});
      std::memset(scratch.data() + bytes, 0, leaf_count * kLeafBytes - bytes);
      copy_and_hash(target, scratch.data(), leaf_count, run_leaves);
      done_bytes += bytes;
    }
  }
  order_stores();
  return hash_extent_of(leaves);
}

bool restore_extent(CopyKernel kernel, ConstBytes extent, std::uint64_t extent_begin,
                    std::uint64_t expected_hash, std::span<const Target> targets,
                    std::size_t first_target) noexcept {
  check(!extent.empty() && extent.size() <= kExtentBytes, "an extent has 1 byte to 1 MiB");
  const UnitKernels& unit_kernels = unit_kernels_of(kernel.isa);
  const auto form = static_cast<std::size_t>(kernel.form);
  LeafHashes leaves{};
  std::size_t at = find_piece(targets, first_target, extent_begin);
  for (ConstBytes rest = extent; !rest.empty();) {
    const std::size_t done_bytes = extent.size() - rest.size();
    const std::uint64_t begin = extent_begin + done_bytes;
    std::uint64_t* const run_leaves = &leaves[done_bytes / kLeafBytes];
    while (at < targets.size() && end_of(targets[at]) <= begin) ++at;

    std::size_t run_bytes =
        at < targets.size() ? contiguous_bytes(targets[at], begin, rest.size()) : 0;
    std::byte* const target =
        run_bytes != 0 ? targets[at].data + (begin - targets[at].image_offset) : nullptr;
    if (run_bytes != 0 && !overlap(target, rest.data(), run_bytes)) {
      unit_kernels.copy_and_hash[form](target, rest.data(), run_bytes / kLeafBytes, run_leaves);
    } else {
      const bool strided = at < targets.size() && targets[at].strides != nullptr;
      run_bytes = std::min(rest.size(), strided ? kUnitBytes : kLeafBytes);
      hash_leaves(unit_kernels, rest.first(run_bytes), run_leaves);
      scatter_bytes(unit_kernels.copy[form], rest.first(run_bytes), begin, targets, at);
    }
    rest = rest.subspan(run_bytes);
  }
  order_stores();
  return hash_extent_of(leaves) == expected_hash;
}

bool matches(const Source& source, std::uint64_t offset_in_source, ConstBytes stored) noexcept {
  check(offset_in_source <= source.bytes && stored.size() <= source.bytes - offset_in_source,
        "the range lies within the source");
  if (stored.empty()) return true;
  if (source.strides == nullptr) {
    return std::memcmp(source.data + offset_in_source, stored.data(), stored.size()) == 0;
  }
  std::array<std::byte, kLeafBytes> block;
  while (!stored.empty()) {
    const Bytes packed(block.data(), std::min(block.size(), stored.size()));
    gather(*source.strides, source.data, offset_in_source, packed);
    if (std::memcmp(packed.data(), stored.data(), packed.size()) != 0) return false;
    offset_in_source += packed.size();
    stored = stored.subspan(packed.size());
  }
  return true;
}

}  // namespace stillframe::kernels
