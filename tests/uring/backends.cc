#include "tests/uring/backends.h"

#include <sys/mman.h>

#include <csignal>
#include <cstdlib>
#include <iostream>
#include <random>

#include "base/text.h"

namespace stillframe::uring {

namespace {

std::string temporary_root() {
  const char* const wish = std::getenv("TMPDIR");
  std::string root = concat(wish != nullptr ? wish : STILLFRAME_TEST_DIRECTORY, "/io-XXXXXX");
  EXPECT_NE(::mkdtemp(root.data()), nullptr) << root;
  return root;
}

void remove_tree(IoBackend& io, const std::string& path) {
  auto entries = io.list_directory(path);
  ASSERT_TRUE(entries) << entries.error().message();
  for (const DirectoryEntry& entry : *entries) {
    const std::string inner = path + "/" + entry.name;
    if (entry.kind == FileKind::kDirectory) {
      remove_tree(io, inner);
    } else {
      EXPECT_TRUE(io.unlink(inner));
    }
  }
  EXPECT_TRUE(io.remove_directory(path));
}

}  // namespace

std::string kind_name(Kind kind) {
  switch (kind) {
    case Kind::kUring: return "uring";
    case Kind::kThreads: return "threads";
    case Kind::kSimulated: return "simulated";
  }
  return "unknown";
}

std::uint64_t test_seed() {
  const char* const wish = std::getenv("STILLFRAME_SEED");
  const std::uint64_t seed =
      wish != nullptr ? std::strtoull(wish, nullptr, 10) : std::uint64_t{std::random_device()()};
  std::cout << "STILLFRAME_SEED=" << seed << '\n';
  return seed;
}

Mapping aligned_memory(std::size_t bytes) {
  void* const address =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  EXPECT_NE(address, MAP_FAILED);
  return {address, bytes};
}

void fill_pattern(Bytes memory, std::uint64_t seed) {
  simulated::SeededRng rng(seed);
  for (std::byte& byte : memory) byte = static_cast<std::byte>(rng.next());
}

std::vector<std::byte> pattern(std::size_t bytes, std::uint64_t seed) {
  std::vector<std::byte> made(bytes);
  fill_pattern(made, seed);
  return made;
}

FileSizeLimit::FileSizeLimit(std::uint64_t bytes) {
  // Its default action ends the process; ignored, the call answers EFBIG.
  (void)::signal(SIGXFSZ, SIG_IGN);
  EXPECT_EQ(::getrlimit(RLIMIT_FSIZE, &before_), 0);
  const rlimit lowered{.rlim_cur = bytes, .rlim_max = before_.rlim_max};
  EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &lowered), 0);
}

FileSizeLimit::~FileSizeLimit() { EXPECT_EQ(::setrlimit(RLIMIT_FSIZE, &before_), 0); }

void BackendTest::SetUp() {
  if (GetParam() == Kind::kSimulated) {
    backend_ = std::make_unique<simulated::SimulatedBackend>(
        simulated::SimulatedDrive::create({.seed = test_seed()}));
    root_ = "/test";
    ASSERT_TRUE(backend_->make_directory(root_));
    return;
  }
  const bool is_uring = GetParam() == Kind::kUring;
  auto created = create_backend(
      {.choice = is_uring ? BackendOptions::Choice::kUring : BackendOptions::Choice::kThreads});
  if (!created && is_uring) GTEST_SKIP() << created.error().message();
  ASSERT_TRUE(created) << created.error().message();
  backend_ = std::move(created->backend);
  root_ = temporary_root();
}

void BackendTest::TearDown() {
  if (backend_ && !root_.empty()) remove_tree(*backend_, root_);
}

FileId BackendTest::create(std::string_view name, std::uint64_t bytes) {
  auto file = io().open(path(name), OpenMode::kCreateDirect);
  EXPECT_TRUE(file);
  if (!file) return {};
  EXPECT_TRUE(io().allocate(*file, bytes));
  return *file;
}

void BackendTest::run(std::vector<IoRequest>& requests) {
  std::size_t next = 0;
  std::size_t done_count = 0;
  while (done_count < requests.size()) {
    while (next < requests.size() && io().in_flight() < io().in_flight_max()) {
      auto submitted = io().submit(requests[next]);
      ASSERT_TRUE(submitted) << submitted.error().message();
      ++next;
    }
    done_count += io().wait(-1).size();
  }
}

IoRequest BackendTest::run_one(IoRequest request) {
  std::vector<IoRequest> requests = {std::move(request)};
  run(requests);
  return requests.front();
}

}  // namespace stillframe::uring
