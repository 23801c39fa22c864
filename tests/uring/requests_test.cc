#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <set>
#include <thread>

#include "tests/uring/backends.h"

// What every backend promises of requests in flight.
namespace stillframe::uring {
namespace {

class Requests : public BackendTest {};

INSTANTIATE_TEST_SUITE_P(, Requests,
                         testing::Values(Kind::kUring, Kind::kThreads, Kind::kSimulated),
                         [](const auto& suite) { return kind_name(suite.param); });

constexpr std::size_t kMiB = std::size_t{1} << 20;

IoRequest transfer(IoRequest::Kind kind, FileId file, Bytes memory, std::uint64_t offset) {
  IoRequest request;
  request.kind = kind;
  request.file = file;
  request.data = memory.data();
  request.bytes = memory.size();
  request.offset = offset;
  return request;
}

IoRequest sync_of(FileId file) {
  IoRequest request;
  request.kind = IoRequest::Kind::kSync;
  request.file = file;
  return request;
}

TEST_P(Requests, what_was_written_in_pieces_is_read_back) {
  const FileId file = create("part", 8 * kMiB);
  const Mapping source = aligned_memory(8 * kMiB);
  fill_pattern(source.bytes(), 1);
  std::vector<IoRequest> writes;
  for (std::size_t i = 0; i < 8; ++i) {
    writes.push_back(
        transfer(IoRequest::Kind::kWrite, file, source.bytes().subspan(i * kMiB, kMiB), i * kMiB));
  }
  run(writes);
  for (const IoRequest& write : writes) {
    EXPECT_FALSE(write.error);
    EXPECT_EQ(write.moved_bytes, kMiB);
  }
  EXPECT_FALSE(run_one(sync_of(file)).error);
  io().close(file);

  auto opened = io().open(path("part"), OpenMode::kReadDirect);
  ASSERT_TRUE(opened);
  const Mapping target = aligned_memory(8 * kMiB);
  const IoRequest read = run_one(transfer(IoRequest::Kind::kRead, *opened, target.bytes(), 0));
  EXPECT_FALSE(read.error);
  EXPECT_EQ(read.moved_bytes, 8 * kMiB);
  EXPECT_TRUE(std::ranges::equal(source.bytes(), target.bytes()));
  io().close(*opened);
}

TEST_P(Requests, more_requests_than_fit_are_refused_and_none_is_lost) {
  const std::size_t count = io().in_flight_max();
  const FileId file = create("part", (count + 1) * kBlockBytes);
  const Mapping memory = aligned_memory((count + 1) * kBlockBytes);
  std::vector<IoRequest> writes;
  for (std::size_t i = 0; i <= count; ++i) {
    writes.push_back(transfer(IoRequest::Kind::kWrite, file,
                              memory.bytes().subspan(i * kBlockBytes, kBlockBytes),
                              i * kBlockBytes));
    writes.back().tag = i;
  }
  for (std::size_t i = 0; i < count; ++i) ASSERT_TRUE(io().submit(writes[i]));
  EXPECT_EQ(io().in_flight(), count);
  const auto refused = io().submit(writes[count]);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kResourceExhausted);

  std::set<std::uint64_t> seen;
  while (seen.size() < count) {
    for (const IoRequest* request : io().wait(-1)) {
      EXPECT_TRUE(seen.insert(request->tag).second) << "handed out twice: " << request->tag;
      EXPECT_FALSE(request->error);
    }
  }
  EXPECT_EQ(io().in_flight(), 0U);
  EXPECT_TRUE(io().submit(writes[count]));
  EXPECT_EQ(io().wait(-1).size(), 1U);
  io().close(file);
}

TEST_P(Requests, a_read_ends_early_at_the_end_of_the_file) {
  const FileId file = create("part", 4 * kBlockBytes);
  const Mapping memory = aligned_memory(4 * kBlockBytes);
  fill_pattern(memory.bytes(), 2);
  ASSERT_FALSE(run_one(transfer(IoRequest::Kind::kWrite, file, memory.bytes(), 0)).error);
  for (const std::uint64_t bytes : {3 * kBlockBytes + 1, 2 * kBlockBytes, kBlockBytes + 1536,
                                    std::size_t{4095}, std::size_t{512}, std::size_t{0}}) {
    ASSERT_TRUE(io().truncate(file, bytes));
    auto opened = io().open(path("part"), OpenMode::kReadDirect);
    ASSERT_TRUE(opened);
    const Mapping target = aligned_memory(8 * kBlockBytes);
    const IoRequest read = run_one(transfer(IoRequest::Kind::kRead, *opened, target.bytes(), 0));
    EXPECT_FALSE(read.error) << bytes << ": " << read.error->message();
    EXPECT_EQ(read.moved_bytes, bytes);
    EXPECT_TRUE(std::ranges::equal(memory.bytes().first(bytes), target.bytes().first(bytes)));
    const IoRequest beyond =
        run_one(transfer(IoRequest::Kind::kRead, *opened, target.bytes(), 16 * kBlockBytes));
    EXPECT_FALSE(beyond.error);
    EXPECT_EQ(beyond.moved_bytes, 0U);
    io().close(*opened);
  }
  io().close(file);
}

TEST_P(Requests, what_is_wrong_is_refused_before_anything_happens) {
  const FileId file = create("part", 2 * kBlockBytes);
  const Mapping memory = aligned_memory(2 * kBlockBytes);
  IoRequest beyond =
      transfer(IoRequest::Kind::kWrite, file, memory.bytes().first(kBlockBytes), 2 * kBlockBytes);
  IoRequest unaligned = transfer(IoRequest::Kind::kWrite, file, memory.bytes().first(100), 0);
  IoRequest unknown = transfer(IoRequest::Kind::kRead, FileId{.value = 12'345}, memory.bytes(), 0);
  auto small = io().open(path("small"), OpenMode::kCreateBuffered);
  ASSERT_TRUE(small);
  IoRequest buffered = transfer(IoRequest::Kind::kRead, *small, memory.bytes(), 0);
  auto reader = io().open(path("part"), OpenMode::kReadDirect);
  ASSERT_TRUE(reader);
  IoRequest readonly = transfer(IoRequest::Kind::kWrite, *reader, memory.bytes(), 0);
  for (IoRequest* wrong : {&beyond, &unaligned, &unknown, &buffered, &readonly}) {
    const auto refused = io().submit(*wrong);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), Code::kInvalidArgument);
  }
  EXPECT_EQ(io().in_flight(), 0U);
  EXPECT_EQ(io().file_status(file)->bytes, 2 * kBlockBytes);
  for (const FileId open : {file, *small, *reader}) io().close(open);
}

TEST_P(Requests, an_fsync_of_a_buffered_file_may_be_in_flight) {
  auto small = io().open(path("small"), OpenMode::kCreateBuffered);
  ASSERT_TRUE(small);
  ASSERT_TRUE(io().write_all(*small, "state"));
  EXPECT_FALSE(run_one(sync_of(*small)).error);
  io().close(*small);
}

TEST_P(Requests, an_allocated_file_grows_the_range_of_writes) {
  const FileId file = create("part", kBlockBytes);
  const Mapping memory = aligned_memory(kBlockBytes);
  IoRequest write = transfer(IoRequest::Kind::kWrite, file, memory.bytes(), kBlockBytes);
  EXPECT_FALSE(io().submit(write));
  ASSERT_TRUE(io().allocate(file, 2 * kBlockBytes));
  EXPECT_FALSE(run_one(write).error);
  ASSERT_TRUE(io().truncate(file, kBlockBytes));
  EXPECT_FALSE(io().submit(write));
  io().close(file);
}

TEST_P(Requests, a_wake_before_the_wait_ends_it) {
  io().wake();
  EXPECT_TRUE(io().wait(-1).empty());
  EXPECT_TRUE(io().wait(0).empty());
}

TEST_P(Requests, every_wake_ends_a_wait) {
  // Each side waits for the other, so a single lost wake stops both: the test's deadline tells.
  constexpr int kRoundCount = 2'000;
  std::atomic<int> asked = 0;
  std::thread waker([&] {
    for (int round = 1; round <= kRoundCount; ++round) {
      for (int seen = asked.load(); seen < round; seen = asked.load()) asked.wait(seen);
      io().wake();
    }
  });
  for (int round = 1; round <= kRoundCount; ++round) {
    asked.store(round);
    asked.notify_one();
    EXPECT_TRUE(io().wait(-1).empty());
  }
  waker.join();
}

TEST_P(Requests, wakes_among_requests_lose_neither) {
  const FileId file = create("part", 64 * kBlockBytes);
  const Mapping memory = aligned_memory(64 * kBlockBytes);
  std::atomic<bool> stopping = false;
  std::thread waker([&] {
    while (!stopping.load()) {
      io().wake();
      std::this_thread::yield();
    }
  });
  std::size_t done_count = 0;
  for (int round = 0; round < 20; ++round) {
    std::vector<IoRequest> writes;
    for (std::size_t i = 0; i < 64; ++i) {
      writes.push_back(transfer(IoRequest::Kind::kWrite, file,
                                memory.bytes().subspan(i * kBlockBytes, kBlockBytes),
                                i * kBlockBytes));
    }
    run(writes);
    done_count += writes.size();
  }
  stopping.store(true);
  waker.join();
  EXPECT_EQ(done_count, 20U * 64U);
  EXPECT_EQ(io().in_flight(), 0U);
  io().close(file);
}

TEST_P(Requests, a_wait_without_anything_to_come_ends_at_its_timeout) {
  EXPECT_TRUE(io().wait(0).empty());
  EXPECT_TRUE(io().wait(20).empty());
}

TEST_P(Requests, memory_is_registered_once_and_used_by_every_request) {
  const Mapping memory = aligned_memory(4 * kMiB);
  fill_pattern(memory.bytes(), 3);
  EXPECT_EQ(io().registration_count(), 0U);
  const auto registered = io().register_memory(memory.bytes());
  if (!registered) {
    EXPECT_EQ(io().registration_count(), 0U);
    if (GetParam() != Kind::kThreads) {
      GTEST_SKIP() << "the kernel pins no memory here: " << registered.error().message();
    }
  }
  const std::uint64_t count = io().registration_count();
  EXPECT_EQ(count, registered ? 1U : 0U);
  const FileId file = create("part", 4 * kMiB);
  for (int save = 0; save < 3; ++save) {
    EXPECT_FALSE(run_one(transfer(IoRequest::Kind::kWrite, file, memory.bytes(), 0)).error);
  }
  // Also with memory half inside and half outside.
  const Mapping other = aligned_memory(kMiB);
  EXPECT_FALSE(run_one(transfer(IoRequest::Kind::kRead, file, other.bytes(), 0)).error);
  EXPECT_TRUE(std::ranges::equal(other.bytes(), memory.bytes().first(kMiB)));
  EXPECT_EQ(io().registration_count(), count);

  io().unregister_memory(memory.bytes());
  EXPECT_FALSE(run_one(transfer(IoRequest::Kind::kWrite, file, memory.bytes(), 0)).error);
  io().close(file);
}

// The simulated drive's requests move only inside wait().
class RealRequests : public Requests {};

INSTANTIATE_TEST_SUITE_P(, RealRequests, testing::Values(Kind::kUring, Kind::kThreads),
                         [](const auto& suite) { return kind_name(suite.param); });

// The kernel moves what the limit allows, then refuses the rest: a real short completion
// (URING-12).
TEST_P(RealRequests, a_short_write_goes_on_and_meets_its_error) {
  const FileId file = create("part", 4 * kMiB);
  const Mapping memory = aligned_memory(4 * kMiB);
  const FileSizeLimit limit(kMiB);
  const IoRequest write = run_one(transfer(IoRequest::Kind::kWrite, file, memory.bytes(), 0));
  ASSERT_TRUE(write.error);
  EXPECT_EQ(write.error->native(), EFBIG);
  EXPECT_EQ(write.moved_bytes, kMiB);
  io().close(file);
}

TEST_P(RealRequests, a_backend_that_ends_waits_for_what_is_in_flight) {
  auto created =
      create_backend({.choice = GetParam() == Kind::kUring ? BackendOptions::Choice::kUring
                                                           : BackendOptions::Choice::kThreads});
  ASSERT_TRUE(created);
  const FileId file = create("part", 4 * kMiB);
  io().close(file);
  auto again = created->backend->open(path("part"), OpenMode::kWriteDirect);
  ASSERT_TRUE(again);
  const Mapping memory = aligned_memory(4 * kMiB);
  IoRequest write = transfer(IoRequest::Kind::kWrite, *again, memory.bytes(), 0);
  ASSERT_TRUE(created->backend->submit(write));
  created->backend.reset();
  EXPECT_FALSE(write.error);
  EXPECT_EQ(write.moved_bytes, 4 * kMiB);
}

}  // namespace
}  // namespace stillframe::uring
