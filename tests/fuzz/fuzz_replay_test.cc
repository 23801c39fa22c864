// Runs the committed corpus of each fuzz target, then mutations of it, so that every build and
// sanitizer sees bytes that no writer of ours made. The search for new ones is libFuzzer's.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/format/seed.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {
namespace {

using format::pick;
using format::seeded_generator;

struct Target {
  const char* name;
  bool (*run)(ConstBytes input);
};

// So that a test is listed by its target's name and not by its addresses.
void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

class FuzzReplay : public testing::TestWithParam<Target> {};

std::vector<std::string> read_corpus(const char* target) {
  const auto folder = std::filesystem::path(STILLFRAME_SOURCE_DIR) / "tests/fuzz/corpus" / target;
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    files.push_back(entry.path());
  // The order of a directory is the file system's; a seed must mean the same everywhere.
  std::sort(files.begin(), files.end());
  std::vector<std::string> corpus;
  for (const auto& file : files) {
    std::ifstream stream(file, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
  }
  return corpus;
}

bool run(const Target& target, const std::string& input) {
  return target.run(std::as_bytes(std::span(input)));
}

// Changes one to four things, as a fuzzer without feedback would.
std::string mutated(std::string input, const std::vector<std::string>& corpus,
                    std::mt19937_64& random) {
  static const std::string kPieces[] = {"0",
                                        "1",
                                        "-1",
                                        "18446744073709551615",
                                        "18446744073709551616",
                                        "4294967296",
                                        "1e3",
                                        "1.0",
                                        "\"",
                                        "\\",
                                        "{",
                                        "}",
                                        "[",
                                        "]",
                                        ",",
                                        ":",
                                        " ",
                                        "@",
                                        "/",
                                        "..",
                                        "step-",
                                        "null",
                                        "\\u0000",
                                        "\n",
                                        "-",
                                        ".rank00001-of-00002",
                                        ".safetensors",
                                        std::string(1, '\0'),
                                        std::string(8, '\xff'),
                                        "\"shape\":[0],",
                                        "\"dtype\":\"F32\",",
                                        "\xc3\xa9",
                                        "\xed\xa0\x80"};
  for (std::uint64_t changes = 1 + pick(random, 4); changes > 0; --changes) {
    const std::size_t at = pick(random, input.size() + 1);
    const std::size_t count = std::min<std::size_t>(pick(random, 32), input.size() - at);
    switch (pick(random, 6)) {
      case 0:
        if (at < input.size()) input[at] = static_cast<char>(input[at] ^ (1 << pick(random, 8)));
        break;
      case 1:
        if (at < input.size()) input[at] = static_cast<char>(pick(random, 256));
        break;
      case 2: input.erase(at, count); break;
      case 3: input.insert(at, input.substr(pick(random, input.size() + 1), count)); break;
      case 4: input.insert(at, kPieces[pick(random, std::size(kPieces))]); break;
      default: {
        const std::string& other = corpus[pick(random, corpus.size())];
        input = input.substr(0, at) + other.substr(pick(random, other.size() + 1));
      }
    }
  }
  return input;
}

TEST_P(FuzzReplay, the_corpus_holds_inputs_that_are_accepted_and_some_that_are_not) {
  const std::vector<std::string> corpus = read_corpus(GetParam().name);
  ASSERT_GE(corpus.size(), 4U);
  const auto accepted = std::count_if(corpus.begin(), corpus.end(), [](const std::string& input) {
    return run(GetParam(), input);
  });
  EXPECT_GT(accepted, 0);
  EXPECT_LT(static_cast<std::size_t>(accepted), corpus.size());
}

TEST_P(FuzzReplay, mutations_of_the_corpus_break_no_promise) {
  const std::vector<std::string> corpus = read_corpus(GetParam().name);
  std::mt19937_64 random = seeded_generator();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  std::uint64_t inputs = 0;
  std::uint64_t accepted = 0;
  // A hundred at least: a target under a sanitizer on a busy machine may take 10 ms for one.
  while (inputs < 100 || std::chrono::steady_clock::now() < deadline) {
    // The target ends the process when a promise breaks; the seed above leads back to the input.
    if (run(GetParam(), mutated(corpus[pick(random, corpus.size())], corpus, random))) ++accepted;
    ++inputs;
  }
  std::cout << inputs << " inputs, " << accepted << " accepted\n";
}

INSTANTIATE_TEST_SUITE_P(Format, FuzzReplay,
                         testing::Values(Target{"part_header", part_header},
                                         Target{"manifest", manifest}, Target{"sums", sums},
                                         Target{"names", names}, Target{"json_tree", json_tree}),
                         [](const auto& each) { return std::string(each.param.name); });

INSTANTIATE_TEST_SUITE_P(Shm, FuzzReplay,
                         testing::Values(Target{"control_message", control_message},
                                         Target{"layout_blob", layout_blob},
                                         Target{"ring_records", ring_records},
                                         Target{"gpu_plan", gpu_plan}),
                         [](const auto& each) { return std::string(each.param.name); });

INSTANTIATE_TEST_SUITE_P(Cli, FuzzReplay, testing::Values(Target{"cli_address", cli_address}),
                         [](const auto& each) { return std::string(each.param.name); });

INSTANTIATE_TEST_SUITE_P(Catalog, FuzzReplay,
                         testing::Values(Target{"recovery_tree", recovery_tree}),
                         [](const auto& each) { return std::string(each.param.name); });

}  // namespace
}  // namespace stillframe::fuzz
