#include <gtest/gtest.h>

#include "format/manifest.h"

namespace stillframe::format {
namespace {

using Sums = std::vector<std::vector<std::uint64_t>>;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20U;

// Three parts of 1, 0 and 3 extents, and their sums.
struct Checkpoint {
  Manifest manifest;
  Sums sums = {{0x0102030405060708}, {}, {1, 2, ~std::uint64_t{0}}};
  std::string text = encode_sums(sums);

  Checkpoint() {
    manifest.parts = {{"a.safetensors", 1, root_of(sums[0])},
                      {"b.safetensors", 0, root_of(sums[1])},
                      {"c.safetensors", 2 * kMiB + 1, root_of(sums[2])}};
    manifest.sums = {"manifest.sums", text.size(), hash128(text)};
  }
  // Makes the whole-file hash agree, so that what lies below it is what gets checked.
  void seal() { manifest.sums = {"manifest.sums", text.size(), hash128(text)}; }
};

Code Refusal(const Checkpoint& checkpoint) {
  const auto sums = decode_sums(checkpoint.manifest, checkpoint.text);
  EXPECT_FALSE(sums);
  return sums ? Code::kInternal : sums.error().code();
}

TEST(Sums, are_little_endian_in_the_order_of_parts) {
  const Checkpoint checkpoint;
  EXPECT_EQ(checkpoint.text.substr(0, 8), "\x08\x07\x06\x05\x04\x03\x02\x01");
  EXPECT_EQ(checkpoint.text.size(), 32U);
  const auto sums = decode_sums(checkpoint.manifest, checkpoint.text);
  ASSERT_TRUE(sums) << sums.error().message();
  EXPECT_EQ(*sums, checkpoint.sums);
}

TEST(Sums, count_an_extent_for_each_begun_mebibyte) {
  EXPECT_EQ(extent_count(0), 0U);
  EXPECT_EQ(extent_count(1), 1U);
  EXPECT_EQ(extent_count(kMiB), 1U);
  EXPECT_EQ(extent_count(kMiB + 1), 2U);
  EXPECT_EQ(extent_count(~std::uint64_t{0}), std::uint64_t{1} << 44U);
}

TEST(Sums, with_any_flipped_bit_are_damage) {
  Checkpoint checkpoint;
  for (std::size_t bit = 0; bit < checkpoint.text.size() * 8; ++bit) {
    Checkpoint flipped = checkpoint;
    flipped.text[bit / 8] = static_cast<char>(flipped.text[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_EQ(Refusal(flipped), Code::kDataLoss) << bit;
    flipped.seal();
    EXPECT_EQ(Refusal(flipped), Code::kDataLoss) << bit << ": the roots must catch it";
  }
}

TEST(Sums, of_the_wrong_length_are_damage) {
  for (std::size_t bytes = 0; bytes < 40; ++bytes) {
    if (bytes == 32) continue;
    Checkpoint checkpoint;
    checkpoint.text.resize(bytes);
    EXPECT_EQ(Refusal(checkpoint), Code::kDataLoss) << bytes;
    checkpoint.seal();
    EXPECT_EQ(Refusal(checkpoint), Code::kDataLoss) << bytes;
  }
}

TEST(Sums, for_parts_of_absurd_length_allocate_nothing) {
  Checkpoint checkpoint;
  checkpoint.manifest.parts[0].bytes = ~std::uint64_t{0};
  EXPECT_EQ(Refusal(checkpoint), Code::kDataLoss);
}

TEST(Sums, whose_roots_are_swapped_are_damage) {
  Checkpoint checkpoint;
  std::swap(checkpoint.manifest.parts[0].root, checkpoint.manifest.parts[2].root);
  const auto sums = decode_sums(checkpoint.manifest, checkpoint.text);
  ASSERT_FALSE(sums);
  EXPECT_NE(sums.error().message().find("a.safetensors"), std::string_view::npos);
}

}  // namespace
}  // namespace stillframe::format
