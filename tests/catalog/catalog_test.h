#pragma once

// A run in a real directory, once for each backend that works here.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/text.h"
#include "base/unique_fd.h"
#include "catalog/aligned_memory.h"
#include "catalog/block_reader.h"
#include "catalog/change.h"
#include "catalog/run.h"
#include "tests/catalog/commit_for_test.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// EXPECT_OK(status): the error's own words when it fails.
template <class T>
testing::AssertionResult is_ok(const Result<T>& result) {
  if (result) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << name(result.error().code()) << ": " << result.error().message();
}
#define EXPECT_OK(result) EXPECT_TRUE(::stillframe::catalog::is_ok(result))
#define ASSERT_OK(result) ASSERT_TRUE(::stillframe::catalog::is_ok(result))

using Choice = uring::BackendOptions::Choice;

class TemporaryDirectory {
 public:
  TemporaryDirectory() : path_(testing::TempDir() + "catalog-XXXXXX") {
    check(::mkdtemp(path_.data()) != nullptr, "a test can make its directory");
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

inline bool exists(const std::string& path) {
  return std::filesystem::exists(std::filesystem::symlink_status(path));
}

class CatalogTest : public testing::TestWithParam<Choice> {
 protected:
  void SetUp() override {
    auto created = uring::create_backend({.choice = GetParam()});
    if (!created) GTEST_SKIP() << "no such backend here: " << created.error().message();
    io_ = std::move(created->backend);
    run_ = directory_.path() + "/run";
    ASSERT_OK(create_run(*io_, run_, kTestRunId));
    auto staging = allocate_aligned(kReadDepth * kReadBlockBytes);
    ASSERT_OK(staging);
    staging_ = *std::move(staging);
  }

  Checkpoint commit(const TestCommit& commit) {
    auto checkpoint = commit_for_test(*io_, run_, commit);
    EXPECT_OK(checkpoint);
    if (!checkpoint) return Checkpoint();
    for (const format::ManifestPart& part : checkpoint->manifest.parts) {
      wait_until_nobody_has(concat(checkpoint->path, '/', part.file));
    }
    return *std::move(checkpoint);
  }
  // Until nobody has the file open. A worker of io_uring may let go of a file after its fsync is
  // answered, and the kernel then closes it when the ring is waited on next. A lease is refused
  // before that, and the file is not recycled. In a daemon a whole save lies between.
  void wait_until_nobody_has(const std::string& path) {
    const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    check(static_cast<bool>(file), "a test can open its own file");
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (::fcntl(file.get(), F_SETLEASE, F_WRLCK) != 0) {
      check(errno == EAGAIN && std::chrono::steady_clock::now() < deadline,
            "a file of a test is let go of within ten seconds");
      (void)io_->wait(1);
    }
  }
  RunContents scan() {
    auto contents = read_run(*io_, run_);
    EXPECT_OK(contents);
    return contents ? *std::move(contents) : RunContents();
  }
  std::vector<std::uint64_t> sequences() {
    std::vector<std::uint64_t> sequences;
    for (const Checkpoint& one : scan().checkpoints) sequences.push_back(one.manifest.sequence);
    return sequences;
  }
  std::vector<std::string> verify(const Checkpoint& checkpoint) {
    auto damage = verify_checkpoint(*io_, checkpoint, staging_.bytes());
    EXPECT_OK(damage);
    return damage ? *std::move(damage) : std::vector<std::string>{"not verified"};
  }
  std::size_t spool_count() const {
    const std::filesystem::directory_iterator spool(run_ + "/.stillframe/spool");
    return static_cast<std::size_t>(std::distance(begin(spool), end(spool)));
  }

  TemporaryDirectory directory_;
  std::unique_ptr<uring::IoBackend> io_;
  std::string run_;
  Mapping staging_;
};

inline std::string choice_name(const testing::TestParamInfo<Choice>& info) {
  return info.param == Choice::kUring ? "uring" : "threads";
}

#define CATALOG_TEST_SUITE(Suite)                                                              \
  INSTANTIATE_TEST_SUITE_P(Backends, Suite, testing::Values(Choice::kThreads, Choice::kUring), \
                           choice_name)

inline constexpr SpoolLimits kRoomySpool{.file_count_max = 8, .bytes_max = std::uint64_t{1} << 30};

}  // namespace stillframe::catalog
