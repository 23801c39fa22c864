#include "format/manifest.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "base/text.h"
#include "format/manifest_text.h"
#include "tests/format/seed.h"

namespace stillframe::format {
namespace {

using std::string_literals::operator""s;

Manifest example() {
  Manifest manifest;
  manifest.run_id = "00112233445566778899aabbccddeeff";
  manifest.sequence = 12;
  manifest.previous_sequence = 11;
  manifest.step = 1200;
  manifest.wall_ns = 1'790'000'000'000'000'000;
  manifest.metrics = {{"loss", 0.1}, {"accuracy", 1.0}, {"val/\"top-5\" \xc3\xa9", -0.0}};
  manifest.best_rules = {{.metric = "loss", .mode = BestMode::kMin}};
  manifest.stillframe_version = "0.1.0";
  manifest.framework = "torch 2.13.0";
  manifest.python_version = "3.11.7";
  manifest.parts = {
      {.file = "model.safetensors", .bytes = 5000, .root = {.low = 1, .high = 2}},
      {.file = "optimizer.safetensors", .bytes = 3 << 20, .root = {.low = 3, .high = 4}}};
  manifest.sums = {.file = "manifest.sums", .bytes = 32, .hash = {.low = 5, .high = 6}};
  manifest.states = {{.file = "state.json", .bytes = 7, .hash = {.low = 8, .high = 9}}};
  return manifest;
}

// Closes a text with the checksum of its bytes, as a program with other ideas of a manifest would.
std::string Sealed(std::string_view body) {
  return concat(body, kChecksumStart, to_hex(hash128(body)), kChecksumEnd);
}

std::string Body(const Manifest& manifest) {
  const std::string text = encode_manifest(manifest);
  return text.substr(0, text.size() - kChecksumTailBytes);
}

Code Refusal(std::string_view text) {
  const auto manifest = decode_manifest(text);
  EXPECT_FALSE(manifest) << text;
  return manifest ? Code::kInternal : manifest.error().code();
}

std::string Replaced(std::string text, std::string_view from, std::string_view to) {
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

TEST(Manifest, reads_back_equal) {
  const std::string text = encode_manifest(example());
  const auto manifest = decode_manifest(text);
  ASSERT_TRUE(manifest) << manifest.error().message();
  EXPECT_EQ(*manifest, example());
  EXPECT_EQ(encode_manifest(*manifest), text);
}

TEST(Manifest, of_many_ranks_and_of_nothing_reads_back_equal) {
  Manifest ranks = example();
  ranks.world_size = 2;
  ranks.parts = {{"model.rank00000-of-00002.safetensors", 1, {}},
                 {"model.rank00001-of-00002.safetensors", 1, {}}};
  ranks.states = {{"state.rank00000-of-00002.json", 1, {}},
                  {"state.rank00001-of-00002.json", 1, {}}};
  ranks.has_pickle = true;
  ranks.best_rules[0].mode = BestMode::kMax;
  ASSERT_TRUE(decode_manifest(encode_manifest(ranks)))
      << decode_manifest(encode_manifest(ranks)).error().message();
  EXPECT_EQ(*decode_manifest(encode_manifest(ranks)), ranks);

  Manifest least;
  least.run_id = std::string(32, '0');
  least.sums.file = "manifest.sums";
  ASSERT_TRUE(decode_manifest(encode_manifest(least)));
  EXPECT_EQ(*decode_manifest(encode_manifest(least)), least);
}

TEST(Manifest, metrics_keep_every_bit_of_a_double) {
  std::mt19937_64 random = seeded_generator();
  std::vector<double> values = {
      0.0,  -0.0, 1.0,    0.1,    -1e300, 5e-324, 1e22, 1e23, 123456789012345680.0,
      1e21, 1e-7, 100000, 1e+100, 1.0 / 3};
  values.push_back(std::numeric_limits<double>::infinity());
  values.push_back(-std::numeric_limits<double>::infinity());
  values.push_back(std::numeric_limits<double>::max());
  for (int i = 0; i < 20000; ++i) values.push_back(std::bit_cast<double>(random()));

  Manifest manifest = example();
  for (std::size_t i = 0; i < values.size(); ++i) manifest.metrics[std::to_string(i)] = values[i];
  const auto decoded = decode_manifest(encode_manifest(manifest));
  ASSERT_TRUE(decoded) << decoded.error().message();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double value = decoded->metrics.at(std::to_string(i));
    if (std::isnan(values[i])) {
      EXPECT_TRUE(std::isnan(value));
    } else {
      EXPECT_EQ(std::bit_cast<std::uint64_t>(value), std::bit_cast<std::uint64_t>(values[i]));
    }
  }
}

TEST(Manifest, any_flipped_bit_is_damage) {
  const std::string text = encode_manifest(example());
  for (std::size_t bit = 0; bit < text.size() * 8; ++bit) {
    std::string flipped = text;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    ASSERT_EQ(Refusal(flipped), Code::kDataLoss) << "bit " << bit;
  }
}

TEST(Manifest, any_truncation_or_addition_is_damage) {
  const std::string text = encode_manifest(example());
  for (std::size_t bytes = 0; bytes < text.size(); ++bytes) {
    ASSERT_EQ(Refusal(text.substr(0, bytes)), Code::kDataLoss) << bytes;
    if (bytes > 0) {
      ASSERT_EQ(Refusal(text.substr(bytes)), Code::kDataLoss) << "without its first " << bytes;
    }
  }
  for (const std::string& more : {"\n"s, " "s, "\0"s, "{}"s, text}) {
    EXPECT_EQ(Refusal(text + more), Code::kDataLoss);
    EXPECT_EQ(Refusal(more + text), Code::kDataLoss);
  }
}

TEST(Manifest, a_torn_sector_is_damage) {
  Manifest manifest = example();
  for (int i = 0; i < 200; ++i) manifest.metrics[concat("metric ", i)] = i;
  const std::string text = encode_manifest(manifest);
  ASSERT_GT(text.size(), 2048U);
  for (std::size_t at = 0; at < text.size(); at += 512) {
    std::string torn = text;
    std::fill(torn.begin() + static_cast<std::ptrdiff_t>(at),
              torn.begin() + static_cast<std::ptrdiff_t>(std::min(at + 512, text.size())), '\0');
    EXPECT_EQ(Refusal(torn), Code::kDataLoss) << at;
    EXPECT_EQ(Refusal(text.substr(0, at) + std::string(text.size() - at, '\0')), Code::kDataLoss)
        << at;
  }
}

TEST(Manifest, of_a_newer_version_is_refused_by_name) {
  const std::string newer =
      Sealed(Replaced(Body(example()), "\"format_version\": 1", "\"format_version\": 2"));
  const auto manifest = decode_manifest(newer);
  ASSERT_FALSE(manifest);
  EXPECT_EQ(manifest.error().code(), Code::kInvalidArgument);
  EXPECT_NE(manifest.error().message().find("format version 2"), std::string_view::npos);

  const std::string unknown =
      Sealed("{\n  \"format_version\": 77,\n  \"everything\": \"else\",\n  ");
  EXPECT_EQ(Refusal(unknown), Code::kInvalidArgument);
  std::string damaged = newer;
  damaged[40] ^= 1;
  EXPECT_EQ(Refusal(damaged), Code::kDataLoss) << "damage is told first";
}

TEST(Manifest, whose_version_is_no_version_is_damage) {
  for (const char* version :
       {"0", "-1", "1.0", "01", "1e0", "\"1\"", "null", "99999999999999999999", "true", "[1]"}) {
    const std::string body = Replaced(Body(example()), "\"format_version\": 1,",
                                      concat("\"format_version\": ", version, ","));
    EXPECT_EQ(Refusal(Sealed(body)), Code::kDataLoss) << version;
  }
}

TEST(Manifest, with_a_good_checksum_over_bad_members_is_damage) {
  const std::string body = Body(example());
  const std::pair<const char*, const char*> kEdits[] = {
      {"  \"step\": 1200,\n", ""},
      {"  \"step\": 1200,\n", "  \"step\": 1200,\n  \"step\": 1200,\n"},
      {"  \"step\": 1200,\n", "  \"step\": 1200,\n  \"unknown\": 1,\n"},
      {"  \"step\": 1200,\n", "  \"step\": 1200,\n\n"},
      {"\"step\": 1200", "\"step\":1200"},
      {"\"step\": 1200", "\"st\\u0065p\": 1200"},
      {"\"step\": 1200", "\"step\": 1200.0"},
      {"\"step\": 1200", "\"step\": 12e2"},
      {"\"step\": 1200", "\"step\": \"1200\""},
      {"\"step\": 1200", "\"step\": null"},
      {"\"step\": 1200", "\"step\": -1"},
      {"\"step\": 1200", "\"step\": 9223372036854775808"},
      {"\"sequence\": 12", "\"sequence\": -12"},
      {"\"sequence\": 12", "\"sequence\": 18446744073709551616"},
      {"\"sequence\": 12", "\"sequence\": 11"},
      {"\"previous_sequence\": 11", "\"previous_sequence\": 12"},
      {"\"previous_sequence\": 11", "\"previous_sequence\": \"none\""},
      {"\"world_size\": 1", "\"world_size\": 0"},
      {"\"world_size\": 1", "\"world_size\": 2"},
      {"\"world_size\": 1", "\"world_size\": 4294967296"},
      {"00112233445566778899aabbccddeeff", "00112233445566778899AABBCCDDEEFF"},
      {"00112233445566778899aabbccddeeff", "00112233445566778899aabbccddeef"},
      {"\"loss\": 0.1", "\"loss\": 0.10"},
      {"\"loss\": 0.1", "\"loss\": 1"},
      {"\"loss\": 0.1", "\"loss\": \"nan\""},
      {"\"loss\": 0.1", "\"loss\": null"},
      {"\"loss\": 0.1", "\"loss\": 1e999"},
      {"\"loss\": 0.1", "\"loss\": 0.1, \"loss\": 0.1"},
      {"\"loss\": 0.1", "\"loss\": 0.1, \"a\": 0.1"},
      {"\"loss\": 0.1", "\"lo\\u0000ss\": 0.1"},
      {"\"loss\": 0.1", "\"\": 0.1"},
      {"\"mode\": \"min\"", "\"mode\": \"MIN\""},
      {"\"mode\": \"min\"", "\"mode\": \"min\", \"x\": 1"},
      {"{\"metric\": \"loss\", \"mode\": \"min\"}", "{}"},
      {"{\"metric\": \"loss\", \"mode\": \"min\"}", "[]"},
      {"\"has_pickle\": false", "\"has_pickle\": 0"},
      {"\"has_pickle\": false", "\"has_pickle\": null"},
      {"\"model.safetensors\"", "\"../model.safetensors\""},
      {"\"model.safetensors\"", "\"model.bin\""},
      {"\"model.safetensors\"", "\"optimizer.safetensors\""},
      {"\"model.safetensors\"", "\"model\\u0000.safetensors\""},
      {"\"model.safetensors\"", "\"model\xff.safetensors\""},
      {"\"bytes\": 5000", "\"bytes\": 5e3"},
      {"\"bytes\": 5000", "\"bytes\": 18446744073709551616"},
      {"\"bytes\": 5000", "\"bytes\": [5000]"},
      {"\"root\": \"0000000000000002", "\"root\": \"000000000000002"},
      {"\"root\": \"", "\"hash\": \""},
      {"\"file\": \"manifest.sums\"", "\"file\": \"other.sums\""},
      {"\"file\": \"state.json\"", "\"file\": \"state2.json\""},
      {"\"bytes\": 7,", "\"bytes\": 268435457,"},
      {"\"parts\": [", "\"parts\": [[],"},
      {"\"parts\": [", "\"parts\": [{\"file\": {\"deep\": {}}},"},
      {"\"torch 2.13.0\"", "\"torch\\n2.13.0\""},
  };
  for (const auto& [from, to] : kEdits) {
    EXPECT_EQ(Refusal(Sealed(Replaced(body, from, to))), Code::kDataLoss) << from << " -> " << to;
  }
  for (const std::string& other :
       {""s, "{"s, "{}"s, "{\n  \"format_version\": 1,\n  "s, body + "}"s, "[" + body}) {
    EXPECT_EQ(Refusal(Sealed(other)), Code::kDataLoss) << other;
  }
  EXPECT_EQ(Refusal(concat(body, kChecksumStart, to_hex(hash128(body)), "\" }\n")),
            Code::kDataLoss);
}

TEST(Manifest, above_its_bound_is_refused_unread) {
  Manifest manifest = example();
  manifest.metrics.clear();
  for (int i = 0; i < 400'000; ++i)
    manifest.metrics[concat("a metric with a rather long name ", i)] = i;
  const std::string text = encode_manifest(manifest);
  ASSERT_GT(text.size(), kManifestBytesMax);
  EXPECT_EQ(Refusal(text), Code::kDataLoss);
}

TEST(Manifest, check_refuses_what_decode_would_refuse) {
  const auto refuses = [](auto change) {
    Manifest manifest = example();
    change(manifest);
    const Status status = check_manifest(manifest);
    EXPECT_FALSE(decode_manifest(encode_manifest(manifest)));
    return !status && status.error().code() == Code::kInvalidArgument;
  };
  EXPECT_TRUE(check_manifest(example()));
  EXPECT_TRUE(refuses([](Manifest& m) { m.run_id = "short"; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.step = -1; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.world_size = 0; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.metrics[""] = 1; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.metrics["a\nb"] = 1; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.metrics[std::string(257, 'm')] = 1; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.best_rules[0].metric = "\xff"; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.best_rules.push_back(m.best_rules[0]); }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.framework = std::string(257, 'f'); }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.python_version = "3\x01"; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.parts[0].file = "a/b.safetensors"; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.parts[1].file = m.parts[0].file; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.sums.file = "sums"; }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.states.push_back(m.states[0]); }));
  EXPECT_TRUE(refuses([](Manifest& m) { m.states[0].bytes = kStateBytesMax + 1; }));
}

}  // namespace
}  // namespace stillframe::format
