#include "format/names.h"

#include <gtest/gtest.h>

#include <limits>

#include "format/utf8.h"
#include "tests/format/seed.h"

namespace stillframe::format {
namespace {

using Kind = Selector::Kind;
using std::string_literals::operator""s;

constexpr std::uint64_t kMaxU64 = std::numeric_limits<std::uint64_t>::max();
constexpr std::int64_t kMaxI64 = std::numeric_limits<std::int64_t>::max();

TEST(Name, is_1_to_128_plain_characters) {
  for (const std::string& name :
       {"model"s, "a"s, "A-b_c.9"s, "..."s, ".hidden"s, std::string(128, 'x')}) {
    EXPECT_TRUE(check_name("tag", name)) << name;
  }
}

TEST(Name, that_could_leave_its_directory_or_confuse_a_reader_is_refused) {
  for (const std::string& name : {""s, "."s, ".."s, "a/b"s, "../x"s, "a\0b"s, "\0"s, "a b"s, "a\n"s,
                                  "caf\xc3\xa9"s, "a@b"s, "a\\b"s, "~"s, std::string(129, 'x')}) {
    const Status status = check_name("tag", name);
    ASSERT_FALSE(status) << name;
    EXPECT_EQ(status.error().code(), Code::kInvalidArgument);
    EXPECT_EQ(status.error().message().substr(0, 5), "tag \"");
    EXPECT_TRUE(is_plain_utf8(status.error().message())) << "a message may be printed";
  }
}

TEST(TensorName, is_any_text_without_control_characters) {
  for (const std::string& name :
       {"a"s, "../../etc/passwd"s, "layer 1"s, "\xc3\xa9"s, "\xe2\x82\xac"s, "\xf0\x9f\x94\xa5"s,
        "\"\\"s, "\xc2\xa0"s, "\xf4\x8f\xbf\xbf"s, std::string(4096, 'n')}) {
    EXPECT_TRUE(check_tensor_name(name)) << printable(name);
  }
}

TEST(TensorName, that_is_empty_long_binary_or_reserved_is_refused) {
  for (const std::string& name :
       {""s, std::string(4097, 'n'), "a\0"s, "a\nb"s, "\x7f"s, "\x1f"s,
        "\xc2\x80"s,          // U+0080, a control character
        "\x80"s,              // A continuation without a start
        "\xc0\xaf"s,          // '/' in an overlong form
        "\xe0\x80\xaf"s,      // the same in three bytes
        "\xf0\x80\x80\xaf"s,  // and in four
        "\xed\xa0\x80"s,      // A surrogate
        "\xf4\x90\x80\x80"s,  // Above U+10FFFF
        "\xf5\x80\x80\x80"s, "\xff"s, "\xe2\x82"s, "\xe2\x28\xa1"s, "__metadata__"s}) {
    const Status status = check_tensor_name(name);
    ASSERT_FALSE(status) << printable(name);
    EXPECT_EQ(status.error().code(), Code::kInvalidArgument);
  }
}

TEST(CheckpointName, goes_to_a_directory_and_back) {
  const std::pair<CheckpointName, const char*> kTable[] = {
      {{12, 1200}, "00000012-step-1200"},
      {{0, 0}, "00000000-step-0"},
      {{99999999, 1}, "99999999-step-1"},
      {{100000000, 1}, "100000000-step-1"},
      {{kMaxU64, kMaxI64}, "18446744073709551615-step-9223372036854775807"},
  };
  for (const auto& [name, text] : kTable) {
    EXPECT_EQ(checkpoint_directory_name(name), text);
    EXPECT_EQ(parse_checkpoint_directory_name(text), name) << text;
  }
}

TEST(CheckpointName, has_one_spelling) {
  for (const std::string& text : {""s,
                                  "12-step-1200"s,
                                  "0000012-step-1"s,
                                  "000000012-step-1"s,
                                  "00000012-step-01"s,
                                  "00000012-step-"s,
                                  "00000012-step--1"s,
                                  "00000012-step-+1"s,
                                  "00000012-step-1 "s,
                                  " 00000012-step-1"s,
                                  "+0000012-step-1"s,
                                  "-0000012-step-1"s,
                                  "00000012step-1"s,
                                  "00000012-STEP-1"s,
                                  "0000001a-step-1"s,
                                  "00000012-step-1\0"s,
                                  "-step-1"s,
                                  "18446744073709551616-step-1"s,
                                  "00000012-step-9223372036854775808"s,
                                  "00000012-step-1-step-2"s,
                                  "tmp-00000012-step-1"s}) {
    EXPECT_FALSE(parse_checkpoint_directory_name(text)) << printable(text);
  }
}

TEST(TemporaryName, goes_to_a_directory_and_back) {
  const TemporaryName name{.sequence = 12, .nonce = 0x0123456789abcdef};
  EXPECT_EQ(temporary_directory_name(name), "tmp-00000012-0123456789abcdef");
  EXPECT_EQ(parse_temporary_directory_name("tmp-00000012-0123456789abcdef"), name);
  const TemporaryName largest{.sequence = kMaxU64, .nonce = kMaxU64};
  EXPECT_EQ(parse_temporary_directory_name(temporary_directory_name(largest)), largest);
}

TEST(TemporaryName, has_one_spelling) {
  for (const char* text :
       {"", "tmp-", "tmp-12-0123456789abcdef", "tmp-00000012-0123456789ABCDEF",
        "tmp-00000012-123456789abcdef", "tmp-00000012-00123456789abcdef", "tmp-00000012",
        "tmp-00000012-0123456789abcdef0", "tmp-00000012-0123456789abcdeg",
        "tmp-00000012--123456789abcdef", "00000012-step-1", "TMP-00000012-0123456789abcdef"}) {
    EXPECT_FALSE(parse_temporary_directory_name(text)) << text;
  }
}

TEST(PartFile, carries_its_rank_when_there_are_several) {
  EXPECT_EQ(part_file_name("model", 0, 1), "model.safetensors");
  EXPECT_EQ(part_file_name("model", 3, 8), "model.rank00003-of-00008.safetensors");
  EXPECT_EQ(part_file_name("m", 123456, 200000), "m.rank123456-of-200000.safetensors");
  EXPECT_EQ(state_file_name(0, 1), "state.json");
  EXPECT_EQ(state_file_name(3, 8), "state.rank00003-of-00008.json");
}

TEST(PartFile, names_are_told_from_the_world_size) {
  EXPECT_EQ(parse_part_file_name("model.safetensors", 1), (RankFile{"model", 0}));
  EXPECT_EQ(parse_part_file_name("model.rank00003-of-00008.safetensors", 8),
            (RankFile{"model", 3}));
  EXPECT_EQ(parse_part_file_name("a.rank00000-of-00002.safetensors", 1),
            (RankFile{"a.rank00000-of-00002", 0}));
  EXPECT_EQ(parse_part_file_name("a.rank00000-of-00002.rank00001-of-00002.safetensors", 2),
            (RankFile{"a.rank00000-of-00002", 1}));
  EXPECT_EQ(parse_state_file_name("state.json", 1), 0U);
  EXPECT_EQ(parse_state_file_name("state.rank00003-of-00008.json", 8), 3U);
}

TEST(PartFile, names_of_another_world_or_form_are_refused) {
  for (const char* text :
       {"model.safetensors", "model.rank00008-of-00008.safetensors",
        ".rank00003-of-00008.safetensors", "model.rank3-of-8.safetensors",
        "model.rank00003-of-00009.safetensors", "model.rank00003-of-00008",
        "model.rank000003-of-00008.safetensors", "model.rank-0003-of-00008.safetensors",
        "model.rank00003-of-00008.x.safetensors", "../m.rank00003-of-00008.safetensors", "",
        ".safetensors"}) {
    EXPECT_FALSE(parse_part_file_name(text, 8)) << text;
  }
  for (const char* text : {"", "model", "model.bin", ".safetensors", "a/b.safetensors",
                           "..safetensors.", "model.safetensors ", "MODEL.SAFETENSORS"}) {
    EXPECT_FALSE(parse_part_file_name(text, 1)) << text;
  }
  for (const char* text : {"", "state", "state.jso", "statejson", "state.rank00000-of-00001.json",
                           "state..json", "xstate.json"}) {
    EXPECT_FALSE(parse_state_file_name(text, 1)) << text;
  }
  EXPECT_FALSE(parse_state_file_name("state.json", 2));
}

TEST(Selector, goes_to_text_and_back) {
  const std::pair<Selector, const char*> kTable[] = {
      {{.kind = Kind::kLatest}, "latest"},
      {{.kind = Kind::kBest}, "best"},
      {{.kind = Kind::kBest, .metric = "val loss@2"}, "best:val loss@2"},
      {{.kind = Kind::kSequence, .sequence = 12}, "12"},
      {{.kind = Kind::kSequence, .sequence = 0}, "0"},
      {{.kind = Kind::kSequence, .sequence = kMaxU64}, "18446744073709551615"},
      {{.kind = Kind::kStep, .step = 1200}, "step-1200"},
      {{.kind = Kind::kStep, .step = kMaxI64}, "step-9223372036854775807"},
      {{.kind = Kind::kTag, .tag = "release"}, "release"},
      {{.kind = Kind::kTag, .tag = "step-"}, "step-"},
      {{.kind = Kind::kTag, .tag = "step-1a"}, "step-1a"},
      {{.kind = Kind::kTag, .tag = "12a"}, "12a"},
      {{.kind = Kind::kTag, .tag = "Latest"}, "Latest"},
      {{.kind = Kind::kTag, .tag = "-1"}, "-1"},
  };
  for (const auto& [selector, text] : kTable) {
    EXPECT_EQ(to_text(selector), text);
    const auto parsed = parse_selector(text);
    ASSERT_TRUE(parsed) << text;
    EXPECT_EQ(*parsed, selector) << text;
  }
  EXPECT_EQ(*parse_selector("00000012"), (Selector{.kind = Kind::kSequence, .sequence = 12}));
}

TEST(Selector, that_names_nothing_is_refused) {
  for (const std::string& text :
       {""s, "18446744073709551616"s, "step-9223372036854775808"s, "a b"s, "a/b"s, "a@b"s, ".."s,
        "latest\0"s, "00000012-step-1200"s, "best:"s, "best:a\nb"s, "best:" + std::string(257, 'm'),
        std::string(129, '1'), std::string(129, 'a')}) {
    const auto parsed = parse_selector(text);
    ASSERT_FALSE(parsed) << printable(text);
    EXPECT_EQ(parsed.error().code(), Code::kInvalidArgument);
  }
}

TEST(Tag, must_not_read_as_another_selector) {
  for (const char* tag : {"v1.0", "best-so-far", "step", "step-x", "x12", "12.5"}) {
    EXPECT_TRUE(check_tag(tag)) << tag;
  }
  for (const char* tag :
       {"", "latest", "best", "12", "0012", "step-12", "step-0", "..", "a/b", "00000012-step-1200",
        "99999999999999999999", "step-99999999999999999999"}) {
    EXPECT_FALSE(check_tag(tag)) << tag;
  }
}

TEST(Address, splits_into_run_and_selector) {
  const Selector kSequence12{.kind = Kind::kSequence, .sequence = 12};
  const Selector kIsBest{.kind = Kind::kBest};
  const struct {
    const char* text;
    const char* run;
    Selector selector;
  } kTable[] = {
      {"checkpoints/run1", "checkpoints/run1", {}},
      {"checkpoints/run1/", "checkpoints/run1", {}},
      {"run1", "run1", {}},
      {".", ".", {}},
      {"/", "/", {}},
      {"checkpoints/run1@best", "checkpoints/run1", kIsBest},
      {"run1@12", "run1", kSequence12},
      {"run1@00000012", "run1", kSequence12},
      {"run1@step-7", "run1", {.kind = Kind::kStep, .step = 7}},
      {"run1@v1.0", "run1", {.kind = Kind::kTag, .tag = "v1.0"}},
      {"checkpoints/run1/00000012-step-1200", "checkpoints/run1", kSequence12},
      {"checkpoints/run1/00000012-step-1200//", "checkpoints/run1", kSequence12},
      {"00000012-step-1200", ".", kSequence12},
      {"/00000012-step-1200", "/", kSequence12},
      {"checkpoints/run1/latest", "checkpoints/run1", {}},
      {"checkpoints/run1/best", "checkpoints/run1", kIsBest},
      {"best", ".", kIsBest},
      {"/best", "/", kIsBest},
      {"me@host/run1", "me@host/run1", {}},
      {"me@host/run1@best", "me@host/run1", kIsBest},
      {"a@b@latest", "a@b", {}},
      {"run1/00000012-step-1200@best", "run1/00000012-step-1200", kIsBest},
      {"runs/0012-step-1", "runs/0012-step-1", {}},
  };
  for (const auto& row : kTable) {
    const auto address = parse_address(row.text);
    ASSERT_TRUE(address) << row.text << ": " << address.error().message();
    EXPECT_EQ(address->run_path, row.run) << row.text;
    EXPECT_EQ(address->selector, row.selector) << row.text;
  }
}

TEST(Address, without_a_run_or_with_a_bad_selector_is_refused) {
  for (const std::string& text : {""s, "@best"s, "runs/@best"s, "run1@"s, "run1@a b"s, "run1@.."s,
                                  "a\0b"s, "run1@99999999999999999999"s, std::string(4097, 'a')}) {
    const auto address = parse_address(text);
    ASSERT_FALSE(address) << printable(text);
    EXPECT_EQ(address.error().code(), Code::kInvalidArgument);
  }
}

TEST(Names, made_from_random_numbers_parse_to_the_same_numbers) {
  std::mt19937_64 random = seeded_generator();
  for (int i = 0; i < 20000; ++i) {
    const auto number = [&random] { return random() >> pick(random, 64); };
    const CheckpointName checkpoint{.sequence = number(),
                                    .step = static_cast<std::int64_t>(number() >> 1U)};
    ASSERT_EQ(parse_checkpoint_directory_name(checkpoint_directory_name(checkpoint)), checkpoint);
    const TemporaryName temporary{.sequence = number(), .nonce = number()};
    ASSERT_EQ(parse_temporary_directory_name(temporary_directory_name(temporary)), temporary);
    const auto world_size = static_cast<std::uint32_t>(number() >> 32U) + 1;
    const auto rank = static_cast<std::uint32_t>(pick(random, world_size));
    ASSERT_EQ(parse_part_file_name(part_file_name("model", rank, world_size), world_size),
              (RankFile{"model", rank}));
    ASSERT_EQ(parse_state_file_name(state_file_name(rank, world_size), world_size), rank);
  }
}

}  // namespace
}  // namespace stillframe::format
