#include "kernels/host_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/hash.h"
#include "base/mapping.h"

// Every kernel against a naive reference: the image is built element by element, its extents are
// hashed by base/hash.h, and what the kernels store, return and restore must be the same.
namespace stillframe::kernels {
namespace {

using Random = std::mt19937_64;

// STILLFRAME_SEED repeats a run.
Random seeded_random() {
  const char* const wish = std::getenv("STILLFRAME_SEED");
  const std::uint64_t seed =
      wish != nullptr ? std::strtoull(wish, nullptr, 10) : std::uint64_t{std::random_device()()};
  std::cout << "STILLFRAME_SEED=" << seed << '\n';
  return Random(seed);
}

std::uint64_t below(Random& random, std::uint64_t bound) { return random() % bound; }

void fill(Random& random, Bytes bytes) {
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
}

// Page-aligned memory, all 0xa5 at first, so that a byte that was to be zeroed shows.
class Slot {
 public:
  explicit Slot(std::size_t bytes) : mapping_(map(bytes)) {
    std::memset(mapping_.bytes().data(), 0xa5, mapping_.bytes().size());
  }
  Bytes bytes() const { return mapping_.bytes(); }
  Bytes extent(std::uint64_t begin) const {
    return bytes().subspan(begin, std::min<std::size_t>(kExtentBytes, bytes().size() - begin));
  }

 private:
  static Mapping map(std::size_t bytes) {
    const std::size_t rounded = round_up(std::max<std::size_t>(bytes, 1), kLeafBytes);
    void* const address =
        ::mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(address != MAP_FAILED, "memory for a test");
    return Mapping(address, rounded);
  }
  Mapping mapping_;
};

// Tensors and the image that they make; the tensor at sources[i] lies in memory[i]. (An address
// alone does not tell: an empty tensor may lie where the memory of the next one begins.)
struct Layout {
  Layout() = default;
  // The sources point into the memory, which a move keeps and a copy would not.
  Layout(Layout&&) = default;
  Layout(const Layout&) = delete;

  std::deque<std::vector<std::byte>> memory;
  std::deque<Strides> strides;
  std::vector<Source> sources;
  std::vector<std::byte> image;

  void add_contiguous(Random& random, std::size_t bytes) {
    const std::size_t misalignment = below(random, 70);
    memory.emplace_back(bytes + misalignment);
    fill(random, memory.back());
    const std::byte* const data = memory.back().data() + misalignment;
    sources.push_back({.data = data, .image_offset = image.size(), .bytes = bytes});
    image.insert(image.end(), data, data + bytes);
  }

  // A tensor of `shape` whose dimensions lie in memory in the order of `outermost_first`, with
  // `gap_bytes` after each run of the innermost one.
  void add_strided(Random& random, std::uint32_t element_bytes, std::vector<std::uint64_t> shape,
                   const std::vector<std::size_t>& outermost_first, std::int64_t gap_bytes) {
    Strides made = {.element_bytes = element_bytes,
                    .shape = shape,
                    .stride_bytes = std::vector<std::int64_t>(shape.size())};
    std::int64_t stride = element_bytes;
    for (std::size_t i = outermost_first.size(); i-- > 0;) {
      const std::size_t dimension = outermost_first[i];
      made.stride_bytes[dimension] = stride;
      stride *= static_cast<std::int64_t>(shape[dimension]);
      if (i + 1 == outermost_first.size()) stride += gap_bytes;
    }
    add_view(random, std::move(made), static_cast<std::size_t>(stride), 0);
  }

  void add_view(Random& random, Strides made, std::size_t memory_bytes, std::size_t first_element) {
    memory.emplace_back(memory_bytes);
    fill(random, memory.back());
    std::uint64_t element_count = 1;
    for (const std::uint64_t length : made.shape) element_count *= length;
    const std::byte* const data = memory.back().data() + first_element;
    strides.push_back(std::move(made));
    const Strides& kept = strides.back();
    sources.push_back({.data = data,
                       .image_offset = image.size(),
                       .bytes = element_count * kept.element_bytes,
                       .strides = &kept});
    for (std::uint64_t element = 0; element < element_count; ++element) {
      std::uint64_t rest = element;
      const std::byte* at = data;
      for (std::size_t d = kept.shape.size(); d-- > 0;) {
        at += static_cast<std::int64_t>(rest % kept.shape[d]) * kept.stride_bytes[d];
        rest /= kept.shape[d];
      }
      image.insert(image.end(), at, at + kept.element_bytes);
    }
  }

  ConstBytes extent(std::uint64_t begin) const {
    return ConstBytes(image).subspan(begin, std::min(kExtentBytes, image.size() - begin));
  }
};

Layout random_layout(Random& random) {
  Layout layout;
  const std::uint64_t piece_count = 1 + below(random, 40);
  for (std::uint64_t i = 0; i < piece_count; ++i) {
    switch (below(random, 9)) {
      case 0: layout.add_contiguous(random, 0); break;
      case 1: layout.add_contiguous(random, 1); break;
      case 2: layout.add_contiguous(random, 511 + below(random, 8193 - 511 + 1)); break;
      case 3: layout.add_contiguous(random, below(random, 300'000)); break;
      case 4:
        for (int tiny = 0; tiny < 300; ++tiny) layout.add_contiguous(random, below(random, 40));
        break;
      case 5:  // channels_last: N C H W in memory as N H W C.
        layout.add_strided(random, 4,
                           {1 + below(random, 3), 1 + below(random, 40), 1 + below(random, 20),
                            1 + below(random, 20)},
                           {0, 2, 3, 1}, 0);
        break;
      case 6:  // Transposed.
        layout.add_strided(random, static_cast<std::uint32_t>(1U << below(random, 5)),
                           {1 + below(random, 90), 1 + below(random, 90)}, {1, 0}, 0);
        break;
      case 7:  // Rows cut out of wider rows, of elements of an odd size.
        layout.add_strided(random, static_cast<std::uint32_t>(1 + below(random, 24)),
                           {1 + below(random, 60), 1 + below(random, 60)}, {0, 1}, 13);
        break;
      case 8: layout.add_strided(random, 8, {}, {}, 0); break;  // A scalar.
    }
  }
  if (layout.image.empty()) layout.add_contiguous(random, 1);
  return layout;
}

// The layouts that a kernel can get wrong only at a size that luck may not draw.
std::vector<Layout> edge_layouts(Random& random) {
  std::vector<Layout> layouts;
  for (const std::size_t bytes :
       {std::size_t{1}, std::size_t{511}, std::size_t{4095}, std::size_t{4096}, std::size_t{4097},
        std::size_t{8193}, std::size_t{32767}, std::size_t{32768}, std::size_t{32769},
        kExtentBytes - 1, kExtentBytes, kExtentBytes + 1, 2 * kExtentBytes + 40'961}) {
    layouts.emplace_back().add_contiguous(random, bytes);
  }
  Layout& reversed = layouts.emplace_back();
  reversed.add_view(random,
                    {.element_bytes = 4, .shape = {3, 50'000}, .stride_bytes = {200'000, -4}},
                    600'000, 199'996);
  Layout& expanded = layouts.emplace_back();
  expanded.add_view(random, {.element_bytes = 2, .shape = {700, 301}, .stride_bytes = {0, 2}}, 602,
                    0);
  Layout& empties = layouts.emplace_back();
  for (int i = 0; i < 5; ++i) empties.add_contiguous(random, 0);
  empties.add_contiguous(random, 40'000);
  for (int i = 0; i < 5; ++i) empties.add_contiguous(random, 0);
  Layout& hollow = layouts.emplace_back();
  hollow.add_strided(random, 4, {3, 0, 5}, {0, 1, 2}, 0);
  hollow.add_contiguous(random, 5000);
  return layouts;
}

class HostCopy : public testing::TestWithParam<CopyKernel> {
 protected:
  std::vector<Layout> layouts() {
    std::vector<Layout> made = edge_layouts(random_);
    for (int i = 0; i < 60; ++i) made.push_back(random_layout(random_));
    return made;
  }

  Random random_ = seeded_random();
};

INSTANTIATE_TEST_SUITE_P(Every, HostCopy, testing::ValuesIn(runnable_kernels()),
                         [](const testing::TestParamInfo<CopyKernel>& kernel) {
                           std::string text(name(kernel.param));
                           std::replace(text.begin(), text.end(), ' ', '_');
                           return text;
                         });

TEST_P(HostCopy, captures_the_bytes_and_the_hashes_of_any_layout) {
  for (const Layout& layout : layouts()) {
    const Slot slot(layout.image.size());
    for (std::uint64_t begin = 0; begin < layout.image.size(); begin += kExtentBytes) {
      const std::uint64_t hash = capture_extent(GetParam(), layout.sources, 0, begin,
                                                layout.image.size(), slot.extent(begin));
      ASSERT_EQ(hash_extent(layout.extent(begin)), hash);
    }
    ASSERT_EQ(0, std::memcmp(slot.bytes().data(), layout.image.data(), layout.image.size()));
    for (const std::byte byte : slot.bytes().subspan(layout.image.size())) {
      ASSERT_EQ(std::byte{0}, byte) << "the tail of the last leaf";
    }
  }
}

TEST_P(HostCopy, takes_any_source_at_or_before_the_extent_as_the_first) {
  Layout layout;
  while (layout.image.size() < 2 * kExtentBytes)
    layout.add_contiguous(random_, below(random_, 999));
  const Slot slot(layout.image.size());
  std::size_t last = 0;
  while (last + 1 < layout.sources.size() &&
         layout.sources[last + 1].image_offset <= kExtentBytes) {
    ++last;
  }
  for (const std::size_t first : {std::size_t{0}, last / 2, last, layout.sources.size() - 1}) {
    ASSERT_EQ(hash_extent(layout.extent(kExtentBytes)),
              capture_extent(GetParam(), layout.sources, first, kExtentBytes, layout.image.size(),
                             slot.extent(kExtentBytes)));
  }
}

TEST_P(HostCopy, writes_nothing_outside_the_place_of_the_extent) {
  Layout layout;
  layout.add_contiguous(random_, 3 * kExtentBytes);
  const Slot slot(layout.image.size());
  (void)capture_extent(GetParam(), layout.sources, 0, kExtentBytes, layout.image.size(),
                       slot.extent(kExtentBytes));
  for (const std::uint64_t begin : {std::uint64_t{0}, std::uint64_t{2 * kExtentBytes}}) {
    const Bytes other = slot.extent(begin);
    ASSERT_TRUE(std::all_of(other.begin(), other.end(),
                            [](std::byte byte) { return byte == std::byte{0xa5}; }));
  }
}

TEST_P(HostCopy, a_source_may_be_its_own_place_in_the_slot) {
  for (Layout& layout : layouts()) {
    const Slot slot(layout.image.size());
    std::memcpy(slot.bytes().data(), layout.image.data(), layout.image.size());
    for (Source& source : layout.sources) {
      if (below(random_, 3) == 0) continue;
      source.data = slot.bytes().data() + source.image_offset;
      source.strides = nullptr;
    }
    for (std::uint64_t begin = 0; begin < layout.image.size(); begin += kExtentBytes) {
      ASSERT_EQ(hash_extent(layout.extent(begin)),
                capture_extent(GetParam(), layout.sources, 0, begin, layout.image.size(),
                               slot.extent(begin)));
    }
    ASSERT_EQ(0, std::memcmp(slot.bytes().data(), layout.image.data(), layout.image.size()));
  }
}

TEST_P(HostCopy, restores_the_targets_and_nothing_beside_them) {
  for (const Layout& layout : layouts()) {
    // Memory like the sources', all 0x5a; about a third of the tensors are wanted by nobody.
    std::deque<std::vector<std::byte>> memory;
    std::vector<Target> targets;
    std::vector<Source> restored;
    for (std::size_t i = 0; i < layout.sources.size(); ++i) {
      const Source& source = layout.sources[i];
      if (below(random_, 3) == 0) continue;
      const bool expanded = source.strides != nullptr && source.strides->shape.size() == 2 &&
                            source.strides->stride_bytes[0] == 0;
      if (expanded) continue;  // One element in many places cannot be a target.
      const std::vector<std::byte>& home = layout.memory[i];
      std::byte* const data =
          memory.emplace_back(home.size(), std::byte{0x5a}).data() + (source.data - home.data());
      targets.push_back({.data = data,
                         .image_offset = source.image_offset,
                         .bytes = source.bytes,
                         .strides = source.strides});
      restored.push_back(source);
      restored.back().data = data;
    }
    const Slot slot(layout.image.size());
    std::memcpy(slot.bytes().data(), layout.image.data(), layout.image.size());
    for (std::uint64_t begin = 0; begin < layout.image.size(); begin += kExtentBytes) {
      const ConstBytes extent =
          slot.extent(begin).first(std::min(kExtentBytes, layout.image.size() - begin));
      ASSERT_TRUE(restore_extent(GetParam(), extent, begin, hash_extent(extent), targets, 0));
    }
    std::uint64_t wanted_bytes = 0;
    for (const Source& source : restored) {
      wanted_bytes += source.bytes;
      ASSERT_TRUE(
          matches(source, 0, ConstBytes(layout.image).subspan(source.image_offset, source.bytes)));
    }
    // What the targets do not cover keeps its pattern: at most the odd restored byte looks like it.
    std::uint64_t pattern_bytes = 0;
    std::uint64_t all_bytes = 0;
    for (const auto& block : memory) {
      all_bytes += block.size();
      pattern_bytes +=
          static_cast<std::uint64_t>(std::count(block.begin(), block.end(), std::byte{0x5a}));
    }
    ASSERT_GE(pattern_bytes + wanted_bytes, all_bytes);
  }
}

TEST_P(HostCopy, refuses_an_extent_with_one_flipped_bit) {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{5000}, kExtentBytes}) {
    const Slot slot(bytes);
    const Bytes extent = slot.bytes().first(bytes);
    fill(random_, extent);
    std::vector<std::byte> memory(bytes);
    const Target target = {.data = memory.data(), .image_offset = 0, .bytes = bytes};
    const std::uint64_t hash = hash_extent(extent);
    ASSERT_TRUE(restore_extent(GetParam(), extent, 0, hash, {&target, 1}, 0));
    for (int i = 0; i < 100; ++i) {
      std::byte& victim = extent[below(random_, bytes)];
      const std::byte bit{static_cast<unsigned char>(1U << below(random_, 8))};
      victim ^= bit;
      ASSERT_FALSE(restore_extent(GetParam(), extent, 0, hash, {&target, 1}, 0));
      victim ^= bit;
    }
  }
}

TEST_P(HostCopy, finds_any_byte_that_differs_from_the_slot) {
  for (const Layout& layout : layouts()) {
    for (const Source& source : layout.sources) {
      if (source.bytes == 0) continue;
      const std::uint64_t offset = below(random_, source.bytes);
      const std::uint64_t bytes = 1 + below(random_, source.bytes - offset);
      std::vector<std::byte> stored(
          layout.image.begin() + static_cast<std::ptrdiff_t>(source.image_offset + offset),
          layout.image.begin() + static_cast<std::ptrdiff_t>(source.image_offset + offset + bytes));
      ASSERT_TRUE(matches(source, offset, stored));
      stored[below(random_, bytes)] ^= std::byte{1};
      ASSERT_FALSE(matches(source, offset, stored));
    }
  }
}

// MEM-3: the consumer may hash a slot as soon as it sees the flag. TSan cannot see non-temporal
// stores, so this counts wrong hashes instead.
TEST_P(HostCopy, a_published_extent_is_whole_for_another_thread) {
  constexpr std::uint64_t kTurns = 300;
  const Slot slot(kExtentBytes);
  std::vector<std::byte> memory(kExtentBytes);
  fill(random_, memory);
  std::atomic<std::uint64_t> published{0};
  std::atomic<std::uint64_t> consumed{0};
  std::atomic<std::uint64_t> published_hash{0};
  std::uint64_t wrong_count = 0;
  std::thread consumer([&] {
    for (std::uint64_t turn = 1; turn <= kTurns; ++turn) {
      while (published.load(std::memory_order_acquire) < turn) std::this_thread::yield();
      if (hash_extent(slot.bytes()) != published_hash.load(std::memory_order_relaxed)) {
        ++wrong_count;
      }
      consumed.store(turn, std::memory_order_release);
    }
  });
  const Source source = {.data = memory.data(), .image_offset = 0, .bytes = memory.size()};
  for (std::uint64_t turn = 1; turn <= kTurns; ++turn) {
    memory[below(random_, memory.size())] ^= std::byte{1};
    const std::uint64_t hash =
        capture_extent(GetParam(), {&source, 1}, 0, 0, kExtentBytes, slot.bytes());
    published_hash.store(hash, std::memory_order_relaxed);
    published.store(turn, std::memory_order_release);
    while (consumed.load(std::memory_order_acquire) < turn) std::this_thread::yield();
  }
  consumer.join();
  EXPECT_EQ(0U, wrong_count);
}

}  // namespace
}  // namespace stillframe::kernels
