// Decodes the worked example of docs/FORMAT.md from the page itself, so that the page cannot drift
// from the code. On a difference it prints the block as the code would have it.

#include <gtest/gtest.h>

#include <charconv>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>

#include "base/text.h"
#include "format/manifest.h"
#include "format/safetensors.h"

namespace stillframe::format {
namespace {

std::string read_page() {
  std::ifstream page(STILLFRAME_SOURCE_DIR "/docs/FORMAT.md", std::ios::binary);
  return {std::istreambuf_iterator<char>(page), std::istreambuf_iterator<char>()};
}

// The text between "```<label>\n" and "```".
std::string Block(std::string_view label) {
  const std::string page = read_page();
  const std::string fence = concat("```", label, "\n");
  const std::size_t start = page.find(fence);
  EXPECT_NE(start, std::string::npos) << "no block " << label;
  if (start == std::string::npos) return {};
  const std::size_t text = start + fence.size();
  return page.substr(text, page.find("```", text) - text);
}

// As `hexdump -C` prints bytes: 16 a line, a line like the one before as one "*", the length last.
std::string Dump(std::string_view bytes) {
  std::string text;
  std::string previous;
  const auto hex8 = [](std::size_t offset) { return to_hex(offset).substr(8); };
  for (std::size_t offset = 0; offset < bytes.size(); offset += 16) {
    const std::string row(bytes.substr(offset, 16));
    if (row == previous && row.size() == 16) {
      if (!text.ends_with("*\n")) text += "*\n";
      continue;
    }
    text += hex8(offset) + "  ";
    std::string shown;
    for (std::size_t i = 0; i < 16; ++i) {
      if (i == 8) text += ' ';
      if (i >= row.size()) {
        text += "   ";
        continue;
      }
      const auto byte = static_cast<unsigned char>(row[i]);
      text += to_hex(std::uint64_t{byte}).substr(14) + " ";
      shown += byte >= 0x20 && byte < 0x7f ? row[i] : '.';
    }
    text += concat(" |", shown, "|\n");
    previous = row;
  }
  return text + hex8(bytes.size()) + "\n";
}

// The other direction.
std::string Undump(const std::string& dump) {
  std::string bytes;
  std::istringstream lines(dump);
  bool repeats = false;
  for (std::string line; std::getline(lines, line);) {
    if (line == "*") {
      repeats = true;
      continue;
    }
    const std::size_t offset = std::stoull(line.substr(0, 8), nullptr, 16);
    if (repeats) {
      EXPECT_GE(bytes.size(), 16U);
      const std::string row = bytes.substr(bytes.size() - 16);
      while (bytes.size() < offset) bytes += row;
    }
    repeats = false;
    EXPECT_EQ(bytes.size(), offset) << line;
    std::istringstream digits(line.size() > 8 ? line.substr(8, line.find('|') - 8) : "");
    for (std::string pair; digits >> pair;) {
      bytes.push_back(static_cast<char>(std::stoul(pair, nullptr, 16)));
    }
  }
  return bytes;
}

// What the page shows, made by the code.
struct Example {
  std::string part;
  std::vector<std::uint64_t> hashes;
  std::string sums;
  std::string state;
  Manifest manifest;
};

Example make_example() {
  Example example;
  const auto image = place({.name = "model",
                            .tensors = {{"weight", Dtype::kF32, {2, 3}}, {"step", Dtype::kI64, {}}},
                            .metadata = {{"format", "pt"}}});
  const std::int64_t step = 1200;
  const float weight[] = {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, -2.5F};
  example.part = image->header;
  example.part.append(reinterpret_cast<const char*>(&step), sizeof step);
  example.part.append(reinterpret_cast<const char*>(weight), sizeof weight);
  example.hashes = {hash_extent(std::as_bytes(std::span(example.part)))};
  example.sums = encode_sums({example.hashes});
  example.state = "{\"format_version\": 1, \"extra\": {\"epoch\": 3}}\n";

  Manifest& manifest = example.manifest;
  manifest.run_id = "00112233445566778899aabbccddeeff";
  manifest.sequence = 12;
  manifest.previous_sequence = 11;
  manifest.step = 1200;
  manifest.wall_ns = 1'790'000'000'000'000'000;
  manifest.metrics = {{"accuracy", 1.0}, {"loss", 0.25}};
  manifest.best_rules = {{.metric = "loss", .mode = BestMode::kMin}};
  manifest.stillframe_version = "0.1.0";
  manifest.framework = "torch 2.13.0";
  manifest.python_version = "3.11.7";
  manifest.parts = {{"model.safetensors", example.part.size(), root_of(example.hashes)}};
  manifest.sums = {"manifest.sums", example.sums.size(), hash128(example.sums)};
  manifest.states = {{"state.json", example.state.size(), hash128(example.state)}};
  return example;
}

TEST(WorkedExample, on_the_page_is_what_the_code_writes) {
  const Example example = make_example();
  const auto expect_block = [](std::string_view label, const std::string& text) {
    EXPECT_EQ(Block(label), text) << "write this:\n```" << label << '\n' << text << "```";
  };
  expect_block("hex model.safetensors", Dump(example.part));
  expect_block("hex manifest.sums", Dump(example.sums));
  expect_block("json state.json", example.state);
  expect_block("json manifest.json", encode_manifest(example.manifest));
}

TEST(WorkedExample, on_the_page_decodes_to_its_tensors) {
  const std::string part = Undump(Block("hex model.safetensors"));
  const auto image = decode_part("model", std::as_bytes(std::span(part)), part.size());
  ASSERT_TRUE(image) << image.error().message();
  ASSERT_EQ(image->tensors.size(), 2U);
  EXPECT_EQ(image->tensors[0].spec, (TensorSpec{"step", Dtype::kI64, {}}));
  EXPECT_EQ(image->tensors[1].spec, (TensorSpec{"weight", Dtype::kF32, {2, 3}}));
  std::int64_t step = 0;
  std::memcpy(&step, part.data() + image->tensors[0].offset, sizeof step);
  EXPECT_EQ(step, 1200);
  float last = 0;
  std::memcpy(&last, part.data() + image->tensors[1].offset + 5 * sizeof last, sizeof last);
  EXPECT_EQ(last, -2.5F);
}

TEST(WorkedExample, on_the_page_passes_every_check_of_a_restore) {
  const std::string part = Undump(Block("hex model.safetensors"));
  const std::string state = Block("json state.json");
  const auto manifest = decode_manifest(Block("json manifest.json"));
  ASSERT_TRUE(manifest) << manifest.error().message();
  const auto sums = decode_sums(*manifest, Undump(Block("hex manifest.sums")));
  ASSERT_TRUE(sums) << sums.error().message();
  EXPECT_EQ(manifest->parts.at(0).bytes, part.size());
  EXPECT_EQ(sums->at(0).at(0), hash_extent(std::as_bytes(std::span(part))));
  EXPECT_EQ(manifest->states.at(0).bytes, state.size());
  EXPECT_EQ(manifest->states.at(0).hash, hash128(state));
}

}  // namespace
}  // namespace stillframe::format
