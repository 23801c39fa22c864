// Whatever is given where a path, a selector or a tag is wanted: the command ends by itself with a
// documented code and one printable line, and touches nothing but what it named.
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "base/check.h"
#include "catalog/change.h"
#include "tests/catalog/commit_for_test.h"
#include "tests/cli/command.h"
#include "tests/format/seed.h"

namespace stillframe::cli {
namespace {

namespace fs = std::filesystem;
using format::pick;

// Each is a process, which a sanitizer starts slowly.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kCommandCount = 80;
#else
constexpr int kCommandCount = 400;
#endif

std::string contents_of(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

// Every file and link below a directory, with its bytes or target.
std::map<std::string, std::string> everything_in(const fs::path& directory) {
  std::map<std::string, std::string> found;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    const std::string path = entry.path().string();
    if (entry.is_symlink()) {
      found[path] = "-> " + fs::read_symlink(entry.path()).string();
    } else {
      found[path] = entry.is_regular_file() ? contents_of(entry.path()) : "";
    }
  }
  return found;
}

class AnyArgument : public testing::Test {
 protected:
  AnyArgument() {
    root_ = testing::TempDir() + "stillframe-any-XXXXXX";
    check(::mkdtemp(root_.data()) != nullptr, "a test can make a directory");
    run_ = root_ + "/run";
    outside_ = root_ + "/outside";
    auto created = uring::create_backend({});
    check(created.has_value(), "a test can use the disk");
    io_ = std::move(created->backend);
    fs::create_directory(outside_);
    std::ofstream(outside_ + "/precious") << "precious";
    make_run();
  }
  ~AnyArgument() override {
    std::error_code ignored;
    fs::remove_all(root_, ignored);
  }

  void make_run() {
    fs::remove_all(run_);
    check(catalog::create_run(*io_, run_, catalog::kTestRunId).has_value(), "a run is made");
    for (std::uint64_t sequence = 1; sequence <= 3; ++sequence) {
      const auto step = static_cast<std::int64_t>(sequence * 100);
      check(catalog::commit_for_test(*io_, run_, {.sequence = sequence, .step = step}).has_value(),
            "a checkpoint is committed");
    }
    fs::create_directory_symlink(outside_, run_ + "/out");
  }

  // A path with something done to it.
  std::string argument(std::mt19937_64& random) const {
    const std::array<std::string, 22> pieces = {run_,        "@latest",
                                                "@best",     "@2",
                                                "@step-200", "@",
                                                "/latest",   "/..",
                                                "/",         "//",
                                                "/out",      "@../outside",
                                                "@.",        "@*",
                                                outside_,    "@v1.0",
                                                "@\xc3\xa9", "@\xff\xfe",
                                                "\x1b[31m",  " ",
                                                "\n",        "@18446744073709551616"};
    std::string text = pick(random, 4) == 0 ? "" : run_;
    for (std::uint64_t more = pick(random, 4); more > 0; --more) {
      text += pieces[pick(random, pieces.size())];
    }
    for (std::uint64_t changes = pick(random, 3); changes > 0 && !text.empty(); --changes) {
      const std::size_t at = pick(random, text.size());
      // No NUL: an argument of a process cannot hold one.
      const auto byte = static_cast<char>(1 + pick(random, 255));
      if (pick(random, 2) == 0) {
        text[at] = byte;
      } else {
        text.insert(at, 1 + pick(random, 3) * 1000, byte);
      }
    }
    return text;
  }

  std::vector<std::string> command(std::mt19937_64& random) const {
    const std::string target = root_ + "/target";
    switch (pick(random, 10)) {
      case 0: return {"ls", argument(random)};
      case 1: return {"show", argument(random)};
      case 2: return {"verify", argument(random)};
      case 3: return {"restore", argument(random), target};
      case 4: return {"rm", argument(random)};
      case 5: return {"pin", argument(random)};
      case 6: return {"tag", argument(random), argument(random)};
      case 7: return {"export", argument(random), "--to", "safetensors", target};
      case 8: return {"best", argument(random), "--metric", argument(random), "--mode", "min"};
      default: return {"status", "--socket", argument(random)};
    }
  }

  std::string root_;
  std::string run_;
  std::string outside_;
  std::unique_ptr<uring::IoBackend> io_;
};

TEST_F(AnyArgument, ends_with_a_documented_code_and_harms_nothing_that_it_does_not_name) {
  std::mt19937_64 random = format::seeded_generator();
  const auto before = everything_in(outside_);
  auto run_before = everything_in(run_);
  std::map<int, int> codes;
  for (int i = 0; i < kCommandCount; ++i) {
    // One that works and one that finds nothing, whatever the seed.
    std::vector<std::string> arguments = command(random);
    if (i == 0) arguments = {"verify", run_};
    if (i == 1) arguments = {"show", run_ + "@4"};
    std::string shown;
    for (const std::string& argument : arguments) shown += testing::PrintToString(argument) + ' ';
    SCOPED_TRACE(shown);
    const Outcome outcome = stillframe(arguments);
    ++codes[outcome.exit_code];
    EXPECT_GE(outcome.exit_code, 0);
    EXPECT_LE(outcome.exit_code, 4);
    if (outcome.exit_code != 0) {
      EXPECT_TRUE(outcome.has_one_error_line()) << outcome.err;
    }
    for (const char c : outcome.err.substr(0, outcome.err.find_last_not_of('\n') + 1)) {
      EXPECT_TRUE(static_cast<unsigned char>(c) >= 0x20) << testing::PrintToString(outcome.err);
    }
    EXPECT_EQ(everything_in(outside_), before);
    const auto run_now = everything_in(run_);
    const bool is_change = arguments[0] == "rm" || arguments[0] == "pin" || arguments[0] == "tag";
    if (!is_change || outcome.exit_code != 0) {
      EXPECT_EQ(run_now, run_before);
    } else if (arguments[0] == "rm") {
      // One, and there were three.
      auto contents = catalog::read_run(*io_, run_);
      ASSERT_TRUE(contents.has_value());
      EXPECT_EQ(contents->checkpoints.size(), 2U);
      make_run();
    }
    run_before = everything_in(run_);
    fs::remove_all(root_ + "/target");
    if (HasFailure()) return;
  }
  for (const auto& [code, count] : codes) std::cout << count << " ended with " << code << "\n";
  EXPECT_GT(codes[0], 0);
  EXPECT_GT(codes[3], 0);
}

}  // namespace
}  // namespace stillframe::cli
