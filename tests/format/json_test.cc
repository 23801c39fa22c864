#include "format/json.h"

#include <gtest/gtest.h>

#include "format/json_tree.h"

namespace stillframe::format {
namespace {

using Kind = JsonValue::Kind;
using std::string_literals::operator""s;

constexpr std::size_t kDepth = 4;

TEST(Json, numbers_arrive_as_their_text) {
  const char* const kNumbers[] = {"0",
                                  "-0",
                                  "-0.0",
                                  "18446744073709551615",
                                  "18446744073709551616",
                                  "-9223372036854775809",
                                  "0.1",
                                  "1e22",
                                  "1.7976931348623157e+308",
                                  "5e-324",
                                  "2.2250738585072011e-308",
                                  "123456789012345678901234567890.123456789"};
  for (const std::string number : kNumbers) {
    const auto tree = read_json_tree("[" + number + "]", kDepth);
    ASSERT_TRUE(tree) << number << ": " << tree.error().message();
    EXPECT_EQ(tree->items[0].text, number);
  }
}

TEST(Json, escapes_are_undone_and_long_texts_stay_whole) {
  const std::string longest(100'000, 'x');
  const auto tree = read_json_tree(
      "{\"a\\u00e9\\ud83d\\ude00\\n\": \"\\\"\\\\\\/" + longest + "\\u0041\"}", kDepth);
  ASSERT_TRUE(tree) << tree.error().message();
  EXPECT_EQ(tree->keys[0], "a\xc3\xa9\xf0\x9f\x98\x80\n");
  EXPECT_EQ(tree->items[0].text, "\"\\/" + longest + "A");
}

TEST(Json, texts_written_read_back_equal) {
  std::string all;
  for (char c = 0; c < 0x7f; ++c) all.push_back(c);
  for (const std::string& text : {""s, "plain"s, all, "caf\xc3\xa9 \xf0\x9f\x94\xa5"s, "\0"s}) {
    std::string json = "[";
    append_json_string(json, text);
    const auto tree = read_json_tree(json + "]", kDepth);
    ASSERT_TRUE(tree) << json;
    EXPECT_EQ(tree->items[0].text, text);
  }
}

TEST(Json, the_depth_is_counted_exactly) {
  EXPECT_TRUE(read_json_tree("[[[[]]]]", kDepth));
  EXPECT_TRUE(read_json_tree("[{\"a\": [{}]}]", kDepth));
  EXPECT_FALSE(read_json_tree("[[[[[]]]]]", kDepth));
  EXPECT_FALSE(read_json_tree(std::string(1'000'000, '['), kDepth));
}

TEST(Json, whatever_is_not_strict_is_refused) {
  for (const std::string& text : {""s,
                                  " "s,
                                  "["s,
                                  "[1"s,
                                  "[1,]"s,
                                  "{\"a\":1,}"s,
                                  "[1] x"s,
                                  "[1][2]"s,
                                  "[1]\0"s,
                                  "[01]"s,
                                  "[+1]"s,
                                  "[.5]"s,
                                  "[1.]"s,
                                  "[0x10]"s,
                                  "[NaN]"s,
                                  "[Infinity]"s,
                                  "[-]"s,
                                  "[1e]"s,
                                  "{a:1}"s,
                                  "{'a':1}"s,
                                  "{\"a\" 1}"s,
                                  "{1:1}"s,
                                  "// c\n[1]"s,
                                  "/* c */[1]"s,
                                  "[\"\x01\"]"s,
                                  "[\"\n\"]"s,
                                  "[\"\\x\"]"s,
                                  "[\"a]"s,
                                  "[\"\xff\"]"s,
                                  "[\"\xc0\xaf\"]"s,
                                  "[tru]"s,
                                  "[\"\\ud800\"]"s,
                                  "[\"\\udc00\"]"s,
                                  "[\"\xed\xa0\x80\"]"s,
                                  "\xef\xbb\xbf[1]"s,
                                  "{\"a\":1,\"a\":1}"s,
                                  "{\"a\":1,\"\\u0061\":2}"s,
                                  "[{\"x\":{\"k\":1,\"j\":2,\"k\":3}}]"s}) {
    const auto tree = read_json_tree(text, kDepth);
    ASSERT_FALSE(tree) << text;
    EXPECT_EQ(tree.error().code(), Code::kDataLoss) << text;
  }
}

}  // namespace
}  // namespace stillframe::format
