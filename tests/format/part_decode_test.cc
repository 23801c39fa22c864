#include <gtest/gtest.h>

#include "base/text.h"
#include "format/safetensors.h"

namespace stillframe::format {
namespace {

using std::string_literals::operator""s;

// The head of a file with that JSON, without padding.
std::string Head(std::string_view json) {
  std::string head(8, '\0');
  store_u64(reinterpret_cast<std::byte*>(head.data()), json.size());
  return head.append(json);
}

Result<PartImage> Decode(std::string_view head, std::uint64_t file_bytes) {
  return decode_part("model", std::as_bytes(std::span(head)), file_bytes);
}

// Decodes a file with that JSON and that much data behind it.
Result<PartImage> DecodeJson(std::string_view json, std::uint64_t data_bytes) {
  const std::string head = Head(json);
  return Decode(head, head.size() + data_bytes);
}

TEST(PartDecode, takes_a_foreign_header_in_any_order_and_alignment) {
  const auto image = DecodeJson(
      "{ \"b\" : {\"data_offsets\":[ 4, 6 ],\"shape\":[2],\n\t\"dtype\":\"U8\"},\r\n"
      "\"a\":{\"shape\":[1],\"dtype\":\"F32\",\"data_offsets\":[0,4]},"
      "\"none\":{\"dtype\":\"F32\",\"shape\":[3,0],\"data_offsets\":[4,4]},"
      "\"__metadata__\":{\"format\":\"pt\"}}   ",
      6);
  ASSERT_TRUE(image) << image.error().message();
  ASSERT_EQ(image->tensors.size(), 3U);
  EXPECT_EQ(image->tensors[0].spec.name, "a");
  EXPECT_EQ(image->tensors[1].spec.name, "none");
  EXPECT_EQ(image->tensors[2].spec.name, "b");
  EXPECT_EQ(image->tensors[2].offset, image->header.size() + 4);
  EXPECT_EQ(image->tensors[2].bytes, 2U);
  EXPECT_EQ(image->metadata.at("format"), "pt");
}

TEST(PartDecode, takes_more_head_than_the_header) {
  const std::string head = Head("{}");
  EXPECT_TRUE(Decode(head, head.size()));
  const std::string file =
      Head(R"({"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})") + "123456789";
  EXPECT_TRUE(Decode(file, file.size()));
}

struct BadHeader {
  const char* what;
  std::string json;
  std::uint64_t data_bytes;
};

std::string One(std::string_view members) { return concat("{\"a\":{", members, "}}"); }

const std::vector<BadHeader>& bad_headers() {
  static const std::vector<BadHeader> kBad = {
      {"a hole at the start", One(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])"), 2},
      {"a hole between",
       R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
       3},
      {"an overlap",
       R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3},
      {"an alias",
       R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
       2},
      {"a byte too many", One(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), 2},
      {"a byte too few", One(R"("dtype":"U8","shape":[2],"data_offsets":[0,2])"), 1},
      {"data without a tensor", "{}", 1},
      {"an end before its begin", One(R"("dtype":"U8","shape":[1],"data_offsets":[1,0])"), 1},
      {"bytes that are not shape x dtype", One(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"),
       4},
      {"an end beyond 64 bits",
       One(R"("dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551616])"), 1},
      {"an offset near 2^64",
       R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[18446744073709551614],"data_offsets":[1,18446744073709551615]}})",
       1},
      {"a shape beyond 64 bits",
       One(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])"), 0},
      {"a shape beyond 64 bits and a zero",
       One(R"("dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0])"), 0},
      {"a negative dimension", One(R"("dtype":"U8","shape":[-1],"data_offsets":[0,0])"), 0},
      {"minus zero", One(R"("dtype":"U8","shape":[-0],"data_offsets":[0,0])"), 0},
      {"a negative offset", One(R"("dtype":"U8","shape":[0],"data_offsets":[-1,-1])"), 0},
      {"a float dimension", One(R"("dtype":"U8","shape":[1.0],"data_offsets":[0,1])"), 1},
      {"an exponent", One(R"("dtype":"U8","shape":[1e0],"data_offsets":[0,1])"), 1},
      {"a text as a dimension", One(R"("dtype":"U8","shape":["1"],"data_offsets":[0,1])"), 1},
      {"a null dimension", One(R"("dtype":"U8","shape":[null],"data_offsets":[0,1])"), 1},
      {"a nested shape", One(R"("dtype":"U8","shape":[[1]],"data_offsets":[0,1])"), 1},
      {"an object in a shape", One(R"("dtype":"U8","shape":[{}],"data_offsets":[0,1])"), 1},
      {"a shape that is a number", One(R"("dtype":"U8","shape":1,"data_offsets":[0,1])"), 1},
      {"33 dimensions",
       One(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])"),
       1},
      {"one offset", One(R"("dtype":"U8","shape":[0],"data_offsets":[0])"), 0},
      {"no offsets", One(R"("dtype":"U8","shape":[0],"data_offsets":[])"), 0},
      {"three offsets", One(R"("dtype":"U8","shape":[0],"data_offsets":[0,0,0])"), 0},
      {"an unknown dtype", One(R"("dtype":"F4","shape":[0],"data_offsets":[0,0])"), 0},
      {"a dtype in lower case", One(R"("dtype":"u8","shape":[0],"data_offsets":[0,0])"), 0},
      {"a dtype that is a number", One(R"("dtype":1,"shape":[0],"data_offsets":[0,0])"), 0},
      {"no dtype", One(R"("shape":[0],"data_offsets":[0,0])"), 0},
      {"no shape", One(R"("dtype":"U8","data_offsets":[0,1])"), 1},
      {"no data_offsets", One(R"("dtype":"U8","shape":[0])"), 0},
      {"an empty tensor object", R"({"a":{}})", 0},
      {"an unknown member", One(R"("dtype":"U8","shape":[0],"data_offsets":[0,0],"x":1)"), 0},
      {"dtype twice", One(R"("dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0])"), 0},
      {"shape twice", One(R"("dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1])"), 1},
      {"data_offsets twice",
       One(R"("dtype":"U8","shape":[0],"data_offsets":[0,0],"data_offsets":[0,0])"), 0},
      {"a name twice",
       R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2},
      {"a name twice, once escaped",
       R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2},
      {"an empty name", R"({"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0},
      {"NUL in a name", R"({"a\u0000":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0},
      {"a raw NUL in a name", "{\"a\0\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"s,
       0},
      {"a control character in a name",
       R"({"a\u001b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0},
      {"a name that is not UTF-8",
       "{\"a\xff\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0},
      {"half a surrogate pair", R"({"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0},
      {"a name of 4097 bytes",
       "{\"" + std::string(4097, 'n') + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0},
      {"a tensor that is null", R"({"a":null})", 0},
      {"a tensor that is a number", R"({"a":1})", 0},
      {"a tensor that is a boolean", R"({"a":true})", 0},
      {"a tensor that is an array", R"({"a":[]})", 0},
      {"a tensor in a tensor", R"({"a":{"b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}})", 0},
      {"metadata that is not a text", R"({"__metadata__":{"a":1}})", 0},
      {"metadata that nests", R"({"__metadata__":{"a":{}}})", 0},
      {"metadata that is a list", R"({"__metadata__":[]})", 0},
      {"metadata that is null", R"({"__metadata__":null})", 0},
      {"metadata twice", R"({"__metadata__":{},"__metadata__":{}})", 0},
      {"a metadata key twice", R"({"__metadata__":{"a":"1","a":"1"}})", 0},
      {"an array instead of an object", "[]", 0},
      {"a text instead of an object", "\"{}\"", 0},
      {"nothing but spaces", "    ", 0},
      {"a space before the object", " {}", 0},
      {"a newline behind the object", "{}\n", 0},
      {"NUL behind the object", "{}\0"s, 0},
      {"a second object", "{}{}", 0},
      {"a second object behind spaces", "{}  {}", 0},
      {"an unclosed object", "{", 0},
      {"a comment", "{/* */}", 0},
      {"a trailing comma", One(R"("dtype":"U8","shape":[0],"data_offsets":[0,0],)"), 0},
      {"a trailing comma in a shape", One(R"("dtype":"U8","shape":[1,],"data_offsets":[0,1])"), 1},
      {"a byte order mark", "\xef\xbb\xbf{}", 0},
      {"deep nesting", R"({"a":)" + std::string(100'000, '[') + "}", 0},
      {"deep objects",
       [] {
         std::string json;
         for (int i = 0; i < 10'000; ++i) json += R"({"a":)";
         return json + "}";
       }(),
       0},
  };
  return kBad;
}

TEST(PartDecode, refuses_every_bad_header_with_a_reason) {
  for (const BadHeader& bad : bad_headers()) {
    const auto image = DecodeJson(bad.json, bad.data_bytes);
    ASSERT_FALSE(image) << bad.what;
    EXPECT_EQ(image.error().code(), Code::kDataLoss) << bad.what;
    EXPECT_GT(image.error().message().size(), 20U) << bad.what;
    EXPECT_LT(image.error().message().size(), 500U) << bad.what;
  }
}

TEST(PartDecode, refuses_a_length_that_cannot_be) {
  std::string head = Head("{}");
  const auto with_length = [&head](std::uint64_t length, std::uint64_t file_bytes) {
    store_u64(reinterpret_cast<std::byte*>(head.data()), length);
    const auto bytes = header_bytes(std::as_bytes(std::span(head)), file_bytes);
    const auto image = Decode(head, file_bytes);
    EXPECT_EQ(bytes.has_value(), image.has_value()) << length;
    if (!bytes) {
      EXPECT_EQ(bytes.error().code(), Code::kDataLoss);
    }
    return bytes.has_value();
  };
  EXPECT_TRUE(with_length(2, 10));
  EXPECT_FALSE(with_length(0, 10));
  EXPECT_FALSE(with_length(3, 10));
  EXPECT_FALSE(with_length(2, 9));
  EXPECT_FALSE(with_length(2, 0));
  EXPECT_FALSE(with_length(kHeaderBytesMax + 1, ~std::uint64_t{0}));
  EXPECT_FALSE(with_length(~std::uint64_t{0}, ~std::uint64_t{0}));
  EXPECT_FALSE(with_length(~std::uint64_t{0} - 7, 10)) << "8 + N must not wrap";
  EXPECT_FALSE(with_length(std::uint64_t{1} << 63U, ~std::uint64_t{0}));
}

TEST(PartDecode, refuses_a_head_shorter_than_its_header) {
  const std::string head = Head(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})");
  for (std::size_t bytes = 0; bytes < head.size(); ++bytes) {
    const auto image = Decode(std::string_view(head).substr(0, bytes), head.size() + 1);
    ASSERT_FALSE(image) << bytes;
    EXPECT_EQ(image.error().code(), Code::kDataLoss);
  }
  EXPECT_TRUE(Decode(head, head.size() + 1));
}

TEST(PartDecode, refuses_more_tensors_than_the_bound) {
  std::string json = "{";
  for (std::size_t i = 0; i <= kTensorCountMax; ++i) {
    json +=
        concat(i == 0 ? "" : ",", "\"", i, R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})");
  }
  const auto image = DecodeJson(json + "}", 0);
  ASSERT_FALSE(image);
  EXPECT_NE(image.error().message().find("more than 1000000 tensors"), std::string_view::npos);
}

TEST(PartDecode, takes_names_at_the_bounds) {
  const std::string name(kTensorNameBytesMax, 'n');
  std::string shape = "1";
  for (std::size_t i = 1; i < kTensorRankMax; ++i) shape += ",1";
  const auto image = DecodeJson(
      concat("{\"", name, "\":{\"dtype\":\"U8\",\"shape\":[", shape, "],\"data_offsets\":[0,1]}}"),
      1);
  ASSERT_TRUE(image) << image.error().message();
  EXPECT_EQ(image->tensors[0].spec.shape.size(), kTensorRankMax);
}

}  // namespace
}  // namespace stillframe::format
