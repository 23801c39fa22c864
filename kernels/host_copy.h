#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"

// Moves tensors into and out of the image of a part, hashing what it moves. One thread calls a
// function for one extent; different extents of one image may run on different threads at once.
// Nothing here allocates, locks or starts a thread, except choose_kernel() and runnable_kernels().
namespace stillframe::kernels {

// How a unit of 32 KiB is put into memory. Which one is fastest depends on the CPU (MEM-1).
enum class CopyForm : unsigned char {
  kMemcpy,       // The C library's memcpy: ordinary stores at this size.
  kSequential,   // Non-temporal stores in address order.
  kInterleaved,  // Non-temporal stores to 8 pages of 4 KiB in turn.
};

enum class Isa : unsigned char { kPlain, kAvx2, kAvx512 };

struct CopyKernel {
  CopyForm form = CopyForm::kMemcpy;
  Isa isa = Isa::kPlain;
  bool operator==(const CopyKernel&) const = default;
};

// "interleaved avx512", for status and for benchmarks.
std::string_view name(CopyKernel kernel) noexcept;

// Every kernel that this build contains and this CPU runs, plain ones first. Never empty.
std::vector<CopyKernel> runnable_kernels();

// Of the kernels that are never slow, the one with the widest vectors: for those who copy beside a
// drive, where measuring would take longer than it gains.
CopyKernel widest_sequential_kernel();

// The kernel that copies and hashes fastest here, measured for about `budget_ns` by whole extents
// of the two ranges in turn. Both are faulted in beforehand, of the same size, at least 1 MiB,
// better larger than the caches; `scratch_target` starts on a page and is overwritten. Where the
// clock cannot tell (it stands still, or the ranges are too small), the sequential kernel with the
// widest vectors.
inline constexpr std::int64_t kChooseBudgetNs = 20'000'000;
CopyKernel choose_kernel(const Clock& clock, ConstBytes scratch_source, Bytes scratch_target,
                         std::int64_t budget_ns = kChooseBudgetNs);

// The memory of a tensor that is not contiguous. Its bytes in the image are its elements in logical
// row-major order. At most kMaxRank dimensions, as in torch and numpy; stride_bytes has as many
// numbers as shape and may be 0 or negative. Element 0 is at the data pointer.
inline constexpr std::size_t kMaxRank = 64;
struct Strides {
  std::uint32_t element_bytes = 0;
  std::vector<std::uint64_t> shape;
  std::vector<std::int64_t> stride_bytes;
};

// One tensor, or the header, as the run of bytes [image_offset, image_offset + bytes) of an image.
// Views: they own neither the data nor the strides. Without strides the data is contiguous; with
// them `bytes` is the product of the shape times element_bytes.
struct Source {
  const std::byte* data = nullptr;
  std::uint64_t image_offset = 0;
  std::uint64_t bytes = 0;
  const Strides* strides = nullptr;
};

struct Target {
  std::byte* data = nullptr;
  std::uint64_t image_offset = 0;
  std::uint64_t bytes = 0;
  const Strides* strides = nullptr;
};

// Copies one extent of an image from its sources and returns the extent's hash (base/hash.h).
//
// `sources` are sorted by image_offset and cover [0, image_bytes) without gaps; empty ones are
// allowed anywhere. `first_source` is the index of a source that starts at or before
// `extent_begin`: 0 is always right, a closer one saves a few steps of the search. `extent_target`
// is the extent's place in the slot: it starts on a page and holds the extent rounded up to 4 KiB,
// of which the bytes after the image are zeroed.
//
// A source may be its own place in the slot, bit for bit; it may not overlap the slot otherwise.
// The hash is taken in the same visit as the copy, 32 KiB at a time, but a source that another
// thread changes within that visit can leave stored bytes that differ from the hash; the daemon's
// check of the stored bytes then fails the save (SNAP-11).
//
// On return all stores are ordered before any later store of this thread (MEM-3), so that a release
// store may publish the extent.
std::uint64_t capture_extent(CopyKernel kernel, std::span<const Source> sources,
                             std::size_t first_source, std::uint64_t extent_begin,
                             std::uint64_t image_bytes, Bytes extent_target) noexcept;

// Copies the bytes of one extent of an image to the targets that want them, and says whether the
// extent's hash is `expected_hash`.
//
// The copy runs beside the check, not after it: when this returns false, targets hold unverified
// bytes of the extent and the caller must not let them be used. `extent` has 1 byte to 1 MiB and
// starts on a page; the bytes after it are not read. `targets` are sorted by image_offset and do
// not overlap; bytes between them are checked and dropped. `first_target` is the index of a target
// that starts at or before `extent_begin`, or 0. A target may be its own place in the slot.
// Stores are ordered as by capture_extent().
[[nodiscard]] bool restore_extent(CopyKernel kernel, ConstBytes extent, std::uint64_t extent_begin,
                                  std::uint64_t expected_hash, std::span<const Target> targets,
                                  std::size_t first_target) noexcept;

// Whether `stored` equals the bytes of `source` from `offset_in_source` on. The range lies within
// the source.
[[nodiscard]] bool matches(const Source& source, std::uint64_t offset_in_source,
                           ConstBytes stored) noexcept;

}  // namespace stillframe::kernels
