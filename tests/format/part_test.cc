#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "base/text.h"
#include "format/safetensors.h"
#include "tests/format/seed.h"

namespace stillframe::format {
namespace {

using std::string_literals::operator""s;

constexpr std::uint64_t kHuge = std::uint64_t{1} << 62U;

TensorSpec Tensor(std::string name, Dtype dtype, std::vector<std::uint64_t> shape) {
  return {.name = std::move(name), .dtype = dtype, .shape = std::move(shape)};
}

PartSpec Part(std::vector<TensorSpec> tensors, std::map<std::string, std::string> metadata = {}) {
  return {.name = "model", .tensors = std::move(tensors), .metadata = std::move(metadata)};
}

std::string Json(const PartImage& image) {
  const std::size_t end = image.header.find_last_not_of(' ');
  return image.header.substr(8, end - 7);
}

PartImage Placed(const PartSpec& part) {
  auto image = place(part);
  EXPECT_TRUE(image) << image.error().message();
  return image ? *std::move(image) : PartImage{};
}

std::string Refused(const PartSpec& part) {
  const auto image = place(part);
  EXPECT_FALSE(image);
  if (image) return {};
  EXPECT_EQ(image.error().code(), Code::kInvalidArgument);
  return std::string(image.error().message());
}

Result<PartImage> Decoded(const PartImage& image) {
  return decode_part(image.name, std::as_bytes(std::span(image.header)), image.bytes);
}

TEST(Part, header_is_the_stock_writers_with_data_on_a_block) {
  const PartImage image =
      Placed(Part({Tensor("b", Dtype::kU8, {3}), Tensor("w", Dtype::kF32, {2, 3}),
                   Tensor("a", Dtype::kBF16, {5}), Tensor("n", Dtype::kI64, {}),
                   Tensor("e", Dtype::kF32, {0, 7})},
                  {{"format", "pt"}, {"a\"", "\n\\"}}));
  EXPECT_EQ(Json(image), R"({"__metadata__":{"a\"":"\u000a\\","format":"pt"},)"
                         R"("n":{"dtype":"I64","shape":[],"data_offsets":[0,8]},)"
                         R"("e":{"dtype":"F32","shape":[0,7],"data_offsets":[8,8]},)"
                         R"("w":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},)"
                         R"("a":{"dtype":"BF16","shape":[5],"data_offsets":[32,42]},)"
                         R"("b":{"dtype":"U8","shape":[3],"data_offsets":[42,45]}})");
  ASSERT_EQ(image.header.size(), 4096U);
  EXPECT_EQ(load_u64(std::as_bytes(std::span(image.header)).data()), 4088U);
  EXPECT_EQ(image.bytes, 4096U + 45U);
  EXPECT_EQ(image.tensors[2].offset, 4096U + 8U);
}

TEST(Part, without_tensors_is_a_file) {
  const PartImage image = Placed(Part({}));
  EXPECT_EQ(Json(image), "{}");
  EXPECT_EQ(image.bytes, 4096U);
  ASSERT_TRUE(Decoded(image));
  EXPECT_TRUE(Decoded(image)->tensors.empty());
  EXPECT_EQ(Json(Placed(Part({}, {{"k", "v"}}))), R"({"__metadata__":{"k":"v"}})");
}

TEST(Part, data_begins_on_a_block_for_every_length_of_the_json) {
  std::set<std::size_t> sizes;
  for (std::size_t bytes = 3900; bytes < 4200; ++bytes) {
    const PartImage image = Placed(Part({}, {{"k", std::string(bytes, 'v')}}));
    EXPECT_EQ(image.header.size() % kBlockBytes, 0U);
    EXPECT_LT(image.header.size() - 8 - Json(image).size(), kBlockBytes)
        << "no block of mere padding";
    EXPECT_TRUE(Decoded(image));
    sizes.insert(image.header.size());
  }
  EXPECT_EQ(sizes, (std::set<std::size_t>{4096, 8192}));
}

TEST(Part, that_is_not_allowed_is_refused_by_name) {
  EXPECT_NE(Refused(Part({Tensor("twice", Dtype::kU8, {}), Tensor("a", Dtype::kF32, {}),
                          Tensor("twice", Dtype::kF32, {})}))
                .find("\"twice\" occurs twice"),
            std::string::npos);
  EXPECT_NE(
      Refused(Part({Tensor("x", Dtype::kU8, std::vector<std::uint64_t>(33, 1))})).find("\"x\""),
      std::string::npos);
  EXPECT_NE(Refused(Part({Tensor("huge", Dtype::kF32, {kHuge})})).find("\"huge\""),
            std::string::npos);
  EXPECT_NE(Refused(Part({Tensor("a", Dtype::kU8, {kHuge}), Tensor("b", Dtype::kU8, {kHuge})}))
                .find("\"b\""),
            std::string::npos);
  EXPECT_NE(Refused(Part({Tensor("a\0b"s, Dtype::kU8, {})})).find("a\\x00b"), std::string::npos);
  Refused(Part({Tensor("", Dtype::kU8, {})}));
  Refused(Part({Tensor("__metadata__", Dtype::kU8, {})}));
  Refused(Part({}, {{"k", "\xff"}}));
  Refused(Part({}, {{"\xff", "v"}}));
  Refused({.name = "../model", .tensors = {}, .metadata = {}});
  Refused({.name = "", .tensors = {}, .metadata = {}});
}

TEST(Part, up_to_the_last_file_offset_is_placed) {
  const std::uint64_t limit = (std::uint64_t{1} << 63U) - 4096;
  EXPECT_EQ(Placed(Part({Tensor("a", Dtype::kU8, {limit - 4096})})).bytes, limit);
  Refused(Part({Tensor("a", Dtype::kU8, {limit - 4095})}));
}

TEST(Part, header_above_the_stock_readers_limit_is_refused) {
  EXPECT_NE(Refused(Part({}, {{"k", std::string(kHeaderBytesMax, 'v')}})).find("at most 100000000"),
            std::string::npos);
}

std::string random_name(std::mt19937_64& random) {
  const char* const kPieces[] = {"layer", ".", "weight", "\xc3\xa9",        "\"", "\\", "/",
                                 " ",     "0", "1",      "\xf0\x9f\x94\xa5"};
  std::string name;
  for (std::uint64_t i = 0; i <= pick(random, 6); ++i)
    name += kPieces[pick(random, std::size(kPieces))];
  return name;
}

PartSpec random_part(std::mt19937_64& random) {
  PartSpec part = Part({});
  std::set<std::string> names;
  for (std::uint64_t count = pick(random, 40); count > 0; --count) {
    TensorSpec tensor = Tensor(random_name(random),
                               *dtype_from_number(static_cast<std::uint8_t>(pick(random, 19))), {});
    for (std::uint64_t rank = pick(random, 5); rank > 0; --rank)
      tensor.shape.push_back(pick(random, 9));
    if (names.insert(tensor.name).second) part.tensors.push_back(std::move(tensor));
  }
  for (std::uint64_t count = pick(random, 4); count > 0; --count) {
    part.metadata[random_name(random)] = random_name(random) + "\n\t\x01";
  }
  return part;
}

TEST(Part, random_layouts_are_disjoint_gapless_and_read_back_equal) {
  std::mt19937_64 random = seeded_generator();
  for (int i = 0; i < 2000; ++i) {
    PartSpec part = random_part(random);
    const PartImage image = Placed(part);
    ASSERT_EQ(image.tensors.size(), part.tensors.size());
    std::uint64_t end = image.header.size();
    for (const PlacedTensor& tensor : image.tensors) {
      ASSERT_EQ(tensor.offset, end);
      ASSERT_EQ((tensor.offset - image.header.size()) % element_bytes(tensor.spec.dtype), 0U);
      ASSERT_EQ(tensor.bytes, *tensor_bytes(tensor.spec));
      end += tensor.bytes;
    }
    ASSERT_EQ(end, image.bytes);

    const auto decoded = Decoded(image);
    ASSERT_TRUE(decoded) << decoded.error().message();
    EXPECT_EQ(decoded->header, image.header);
    EXPECT_EQ(decoded->metadata, image.metadata);
    EXPECT_EQ(decoded->bytes, image.bytes);
    PartSpec again = Part({}, decoded->metadata);
    for (std::size_t t = 0; t < image.tensors.size(); ++t) {
      EXPECT_EQ(decoded->tensors[t].spec, image.tensors[t].spec);
      EXPECT_EQ(decoded->tensors[t].offset, image.tensors[t].offset);
      EXPECT_EQ(decoded->tensors[t].bytes, image.tensors[t].bytes);
      again.tensors.push_back(decoded->tensors[t].spec);
    }
    // The place of a tensor depends on the set of tensors alone.
    std::shuffle(again.tensors.begin(), again.tensors.end(), random);
    EXPECT_EQ(Placed(again).header, image.header);
  }
}

PartSpec part_of(std::size_t count, std::string_view prefix) {
  PartSpec part = Part({});
  part.tensors.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    part.tensors.push_back(Tensor(concat(prefix, i * 7919 % count),
                                  i % 2 == 0 ? Dtype::kF32 : Dtype::kBF16, {i % 5, 64}));
  }
  return part;
}

TEST(Part, of_a_million_tensors_is_the_largest) {
  PartSpec part = part_of(kTensorCountMax, "t.");
  const PartImage image = Placed(part);
  const auto decoded = Decoded(image);
  ASSERT_TRUE(decoded) << decoded.error().message();
  EXPECT_EQ(decoded->tensors.size(), kTensorCountMax);

  part.tensors.push_back(Tensor("one more", Dtype::kU8, {}));
  Refused(part);
}

}  // namespace
}  // namespace stillframe::format
