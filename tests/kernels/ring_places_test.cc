#include "kernels/ring_places.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/format/seed.h"

namespace stillframe::kernels {
namespace {

TEST(RingPlaces, in_a_ring_that_holds_all_never_wait) {
  const std::vector<std::uint64_t> chunks = {4096, 100, 8192, 4096};
  const auto places = ring_places(chunks, ring_bytes_for(chunks).max);
  for (const RingPlace& place : places) EXPECT_EQ(place.waits_for, 0U);
}

TEST(RingPlaces, of_the_smallest_ring_let_one_be_packed_while_another_is_taken_away) {
  const std::vector<std::uint64_t> chunks(5, 4096);
  const auto places = ring_places(chunks, ring_bytes_for(chunks).min);
  for (std::size_t i = 0; i < places.size(); ++i) {
    EXPECT_EQ(places[i].offset, i % 2 * 4096);
    EXPECT_EQ(places[i].waits_for, i < 2 ? 0 : i - 1);
  }
}

TEST(RingPlaces, of_one_chunk_want_no_more_than_that) {
  const std::vector<std::uint64_t> chunk = {4096};
  EXPECT_EQ(ring_bytes_for(chunk).min, 4096U);
  EXPECT_EQ(ring_bytes_for(chunk).max, 4096U);
}

// Whatever the sizes: no chunk lies where one that it does not wait for may still be.
TEST(RingPlaces, never_share_memory_with_a_chunk_that_may_still_be_there) {
  auto random = format::seeded_generator();
  for (int round = 0; round < 2'000; ++round) {
    std::vector<std::uint64_t> chunks(1 + format::pick(random, 30));
    for (std::uint64_t& bytes : chunks) bytes = 1 + format::pick(random, 5'000);
    const RingBytes needed = ring_bytes_for(chunks);
    const std::uint64_t ring_bytes =
        needed.min + format::pick(random, needed.max - needed.min + 1'000);
    const auto places = ring_places(chunks, ring_bytes);
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      ASSERT_EQ(places[i].offset % 256, 0U);
      ASSERT_LE(places[i].offset + chunks[i], ring_bytes);
      // What it waits for can be taken away before it is there.
      ASSERT_LE(places[i].waits_for, i);
      for (std::size_t before = places[i].waits_for; before < i; ++before) {
        const bool overlaps = places[before].offset < places[i].offset + chunks[i] &&
                              places[i].offset < places[before].offset + chunks[before];
        ASSERT_FALSE(overlaps) << "round " << round << ", chunks " << before << " and " << i;
      }
    }
  }
}

}  // namespace
}  // namespace stillframe::kernels
