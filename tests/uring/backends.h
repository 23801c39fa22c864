#pragma once

// Every backend under one test: real files in a temporary directory, or the simulated drive.

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/mapping.h"
#include "tests/simulated/simulated_backend.h"
#include "uring/io_backend.h"

namespace stillframe::uring {

enum class Kind : std::uint8_t { kUring, kThreads, kSimulated };

// For test names: "uring".
std::string kind_name(Kind kind);

// STILLFRAME_SEED, or a fresh one; printed.
std::uint64_t test_seed();

// Zeroed memory that O_DIRECT takes.
Mapping aligned_memory(std::size_t bytes);
// Fills with bytes that say where they belong.
void fill_pattern(Bytes memory, std::uint64_t seed);
std::vector<std::byte> pattern(std::size_t bytes, std::uint64_t seed);

// No file of this process may grow or be written beyond `bytes` while it lives.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(std::uint64_t bytes);
  ~FileSizeLimit();
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  rlimit before_ = {};
};

// Skips, with the kernel's reason, where io_uring is refused.
class BackendTest : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override;
  void TearDown() override;

  IoBackend& io() { return *backend_; }
  std::string path(std::string_view name) const { return root_ + "/" + std::string(name); }

  // A file of `bytes`, open in kCreateDirect; fails the test otherwise.
  FileId create(std::string_view name, std::uint64_t bytes);
  // Submits, then waits until all of them came back.
  void run(std::vector<IoRequest>& requests);
  // Runs one and returns it.
  IoRequest run_one(IoRequest request);

 private:
  std::string root_;
  std::unique_ptr<IoBackend> backend_;
};

}  // namespace stillframe::uring
