// The GPU's kernels, run on the CPU from the same source, against base/hash.h and a plain copy.
#include "kernels/pack.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "base/hash.h"
#include "kernels/pack_table.h"
#include "tests/format/seed.h"
#include "tests/kernels/host_block.h"

namespace stillframe::kernels {
namespace {

using format::pick;
using Random = std::mt19937_64;

// Memory as a GPU gives it: aligned, and known to those who check what is touched.
class Allocation {
 public:
  explicit Allocation(std::uint64_t bytes) : bytes_(bytes), memory_(bytes + 256) {
    void* begin = memory_.data();
    std::size_t room = memory_.size();
    data_ = static_cast<std::byte*>(std::align(256, std::max<std::size_t>(bytes, 1), begin, room));
  }
  Bytes bytes() const { return {data_, bytes_}; }

 private:
  std::uint64_t bytes_;
  std::vector<std::byte> memory_;
  std::byte* data_ = nullptr;
};

// Tensors of random sizes at random addresses, and the image that they make.
class Tensors {
 public:
  void add(Random& random, std::uint64_t bytes, std::uint64_t misalignment) {
    if (bytes == 0) return;
    auto memory = std::make_unique<Allocation>(bytes + misalignment);
    for (std::byte& byte : memory->bytes()) byte = static_cast<std::byte>(random());
    const Bytes data = memory->bytes().subspan(misalignment);
    pieces_.push_back({.data = data.data(), .image_offset = image_.size(), .bytes = bytes});
    image_.insert(image_.end(), data.begin(), data.end());
    memory_.push_back(std::move(memory));
  }

  std::vector<Piece>& pieces() { return pieces_; }
  const std::vector<std::byte>& image() const { return image_; }
  Bytes data(std::size_t piece) const { return {pieces_[piece].data, pieces_[piece].bytes}; }
  std::uint64_t extent_count() const { return (image_.size() + kExtentBytes - 1) / kExtentBytes; }
  std::uint64_t expected_hash(std::uint64_t extent) const {
    const std::uint64_t begin = extent * kExtentBytes;
    return hash_extent(ConstBytes(image_).subspan(
        begin, std::min<std::uint64_t>(kExtentBytes, image_.size() - begin)));
  }
  void allow(DeviceMemory& memory) const {
    for (const Piece& piece : pieces_) memory.allow(piece.data, piece.bytes);
  }

 private:
  std::vector<std::unique_ptr<Allocation>> memory_;
  std::vector<Piece> pieces_;
  std::vector<std::byte> image_;
};

// One launch: what a driver would do with a PackJob.
class Launch {
 public:
  Launch(Tensors& tensors, std::uint64_t first_extent, std::uint64_t extent_count)
      : first_pieces_(first_pieces(tensors.pieces(), tensors.image().size())),
        image_(image_bytes(tensors, first_extent, extent_count)),
        hashes_(extent_count, 0),
        damaged_(extent_count, 7) {
    std::fill(image_.bytes().begin(), image_.bytes().end(), std::byte{0xA5});
    job_ = {.pieces = tensors.pieces().data(),
            .first_piece = first_pieces_.data(),
            .image_bytes = tensors.image().size(),
            .first_extent = first_extent,
            .extent_count = extent_count,
            .image = image_.bytes().data(),
            .extent_hashes = hashes_.data(),
            .damaged = damaged_.data()};
    tensors.allow(memory_);
    memory_.allow(tensors.pieces().data(), tensors.pieces().size() * sizeof(Piece));
    memory_.allow(first_pieces_.data(), first_pieces_.size() * sizeof(std::uint32_t));
    memory_.allow(image_.bytes().data(), image_.bytes().size());
    memory_.allow(hashes_.data(), hashes_.size() * sizeof(std::uint64_t));
    memory_.allow(damaged_.data(), damaged_.size() * sizeof(std::uint32_t));
  }

  template <class Kernel>
  void run(Random& random, std::uint64_t blocks, Kernel&& kernel) {
    std::vector<std::uint64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0U);
    std::shuffle(order.begin(), order.end(), random);
    for (const std::uint64_t index : order) {
      HostBlock block(memory_, random, index, blocks);
      kernel(block, job_);
      EXPECT_EQ(block.violation(), "");
    }
  }
  void pack(Random& random, std::uint64_t blocks) {
    run(random, blocks, [](HostBlock& block, const PackJob& job) { kernels::pack(block, job); });
  }
  void unpack(Random& random, std::uint64_t blocks) {
    run(random, blocks, [](HostBlock& block, const PackJob& job) { kernels::unpack(block, job); });
  }

  Bytes image() const { return image_.bytes(); }
  std::vector<std::uint64_t>& hashes() { return hashes_; }
  const std::vector<std::uint32_t>& damaged() const { return damaged_; }

 private:
  static std::uint64_t image_bytes(const Tensors& tensors, std::uint64_t first,
                                   std::uint64_t count) {
    const std::uint64_t end =
        std::min<std::uint64_t>((first + count) * kExtentBytes, tensors.image().size());
    return round_up(end - first * kExtentBytes, kLeafBytes);
  }

  std::vector<std::uint32_t> first_pieces_;
  Allocation image_;
  std::vector<std::uint64_t> hashes_;
  std::vector<std::uint32_t> damaged_;
  PackJob job_;
  DeviceMemory memory_;
};

// Every kind of neighbourhood: long runs, odd ends, many in one leaf, leaves that lie in none
// whole.
Tensors random_tensors(Random& random) {
  Tensors tensors;
  const std::uint64_t count = 1 + pick(random, 60);
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t kind = pick(random, 4);
    const std::uint64_t misalignment = pick(random, 2) == 0 ? 0 : pick(random, 33);
    if (kind == 0) tensors.add(random, 1 + pick(random, 40), misalignment);
    if (kind == 1) tensors.add(random, 1 + pick(random, 9000), misalignment);
    if (kind == 2) tensors.add(random, kLeafBytes * (1 + pick(random, 3)), misalignment);
    if (kind == 3) tensors.add(random, pick(random, 150'000), misalignment);
  }
  tensors.add(random, 1 + pick(random, 5000), 0);
  return tensors;
}

TEST(Pack, gives_the_image_and_the_hashes_of_the_host) {
  Random random = format::seeded_generator();
  for (int round = 0; round < 5; ++round) {
    Tensors tensors = random_tensors(random);
    Launch launch(tensors, 0, tensors.extent_count());
    launch.pack(random, 1 + pick(random, 4));
    const std::vector<std::byte>& image = tensors.image();
    ASSERT_TRUE(std::equal(image.begin(), image.end(), launch.image().begin()));
    for (const std::byte byte : launch.image().subspan(image.size())) {
      EXPECT_EQ(byte, std::byte{0});
    }
    for (std::uint64_t extent = 0; extent < tensors.extent_count(); ++extent) {
      EXPECT_EQ(launch.hashes()[extent], tensors.expected_hash(extent)) << "extent " << extent;
    }
  }
}

TEST(Pack, of_a_window_is_that_part_of_the_image) {
  Random random = format::seeded_generator();
  Tensors tensors;
  for (unsigned i = 0; i < 9; ++i) {
    tensors.add(random, 250'000 + pick(random, 60'000), i % 3);
  }
  ASSERT_EQ(tensors.extent_count(), 3U);
  for (const std::uint64_t first : {1U, 2U}) {
    Launch launch(tensors, first, 1);
    launch.pack(random, 2);
    EXPECT_EQ(launch.hashes()[0], tensors.expected_hash(first));
    const auto begin = tensors.image().begin() + static_cast<std::ptrdiff_t>(first * kExtentBytes);
    const auto bytes = std::min<std::uint64_t>(launch.image().size(),
                                               tensors.image().size() - first * kExtentBytes);
    EXPECT_TRUE(
        std::equal(begin, begin + static_cast<std::ptrdiff_t>(bytes), launch.image().begin()));
  }
}

TEST(Pack, takes_thousands_of_tiny_tensors_in_one_leaf) {
  Random random = format::seeded_generator();
  Tensors tensors;
  for (int i = 0; i < 6000; ++i) tensors.add(random, 1 + pick(random, 3), pick(random, 4));
  Launch launch(tensors, 0, 1);
  launch.pack(random, 1);
  EXPECT_EQ(launch.hashes()[0], tensors.expected_hash(0));
}

TEST(Unpack, gives_every_piece_its_bytes_and_touches_nothing_else) {
  Random random = format::seeded_generator();
  for (int round = 0; round < 4; ++round) {
    Tensors tensors = random_tensors(random);
    Launch launch(tensors, 0, tensors.extent_count());
    launch.pack(random, 1);
    const std::vector<std::byte> image = tensors.image();
    // Some are not wanted.
    std::vector<Piece>& pieces = tensors.pieces();
    const std::vector<Piece> all = pieces;
    std::erase_if(pieces, [&](const Piece&) { return pick(random, 4) == 0; });
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      std::fill(tensors.data(i).begin(), tensors.data(i).end(), std::byte{0});
    }
    Launch back(tensors, 0, tensors.extent_count());
    std::copy(launch.image().begin(), launch.image().end(), back.image().begin());
    // Behind the end of the image anything may lie.
    for (std::byte& byte : back.image().subspan(image.size())) byte = std::byte{0x77};
    back.hashes() = launch.hashes();
    back.unpack(random, 1 + pick(random, 3));
    for (const std::uint32_t damaged : back.damaged()) EXPECT_EQ(damaged, 0U);
    for (const Piece& piece : pieces) {
      EXPECT_EQ(std::memcmp(piece.data, image.data() + piece.image_offset, piece.bytes), 0);
    }
  }
}

TEST(Unpack, names_the_extent_in_which_a_bit_is_flipped) {
  Random random = format::seeded_generator();
  Tensors tensors;
  for (int i = 0; i < 5; ++i) tensors.add(random, 500'000, 0);
  Launch launch(tensors, 0, tensors.extent_count());
  launch.pack(random, 1);
  for (int i = 0; i < 12; ++i) {
    Launch back(tensors, 0, tensors.extent_count());
    std::copy(launch.image().begin(), launch.image().end(), back.image().begin());
    back.hashes() = launch.hashes();
    const std::uint64_t at = pick(random, tensors.image().size());
    back.image()[at] ^= static_cast<std::byte>(1U << pick(random, 8));
    back.unpack(random, 1);
    for (std::uint64_t extent = 0; extent < tensors.extent_count(); ++extent) {
      EXPECT_EQ(back.damaged()[extent], extent == at / kExtentBytes ? 1U : 0U) << "byte " << at;
    }
  }
}

// The rules that the CPU's form holds the kernels to.

TEST(HostBlock, finds_a_missing_barrier) {
  Random random = format::seeded_generator();
  const DeviceMemory memory;
  for (const bool has_barrier : {true, false}) {
    HostBlock block(memory, random, 0, 1);
    HostBlock::PerThread<std::uint32_t> value;
    block.each([&](std::uint32_t thread) { block.shared().store(thread, thread * 4, thread); });
    if (has_barrier) block.barrier();
    block.each([&](std::uint32_t thread) {
      value[thread] = block.shared().load<std::uint32_t>(thread, (thread ^ 1U) * 4);
    });
    EXPECT_EQ(block.violation().empty(), has_barrier);
  }
}

TEST(HostBlock, finds_an_access_behind_an_allocation_and_a_misaligned_one) {
  Random random = format::seeded_generator();
  const Allocation allocation(64);
  DeviceMemory memory;
  memory.allow(allocation.bytes().data(), 64);
  for (const std::size_t offset : {56U, 60U, 64U}) {
    HostBlock block(memory, random, 0, 1);
    (void)block.load(reinterpret_cast<const std::uint64_t*>(allocation.bytes().data() + offset));
    EXPECT_EQ(block.violation().empty(), offset == 56) << offset;
  }
}

}  // namespace
}  // namespace stillframe::kernels
