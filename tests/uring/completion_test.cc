#include "uring/completion.h"

#include <gtest/gtest.h>

#include <cerrno>

#include "base/bytes.h"

// The rule that ends requests, fed with results that no healthy drive gives.
namespace stillframe::uring {
namespace {

constexpr std::size_t kRequestBytes = 4 * kBlockBytes;
alignas(kBlockBytes) std::byte memory[kRequestBytes];

IoRequest request_of(IoRequest::Kind kind) {
  IoRequest request;
  request.kind = kind;
  request.data = memory;
  request.bytes = kRequestBytes;
  request.offset = 8 * kBlockBytes;
  return request;
}

FileFacts file_of(OpenMode mode) {
  return {.path = "part", .mode = mode, .bytes = std::uint64_t{1} << 20};
}

Operation operation_of(IoRequest& request) {
  return begin(request, file_of(OpenMode::kWriteDirect), 3);
}

TEST(Completion, a_whole_transfer_finishes_the_request) {
  IoRequest request = request_of(IoRequest::Kind::kWrite);
  Operation operation = operation_of(request);
  EXPECT_EQ(complete(operation, kRequestBytes), Next::kFinished);
  EXPECT_EQ(request.moved_bytes, kRequestBytes);
  EXPECT_FALSE(request.error);
}

TEST(Completion, a_short_write_keeps_whole_blocks_and_is_queued_again) {
  IoRequest request = request_of(IoRequest::Kind::kWrite);
  Operation operation = operation_of(request);
  EXPECT_EQ(complete(operation, kBlockBytes + 512), Next::kQueueAgain);
  EXPECT_EQ(operation.data(), memory + kBlockBytes);
  EXPECT_EQ(operation.offset(), 9 * kBlockBytes);
  EXPECT_EQ(operation.rest_bytes(), 3 * kBlockBytes);
  EXPECT_EQ(complete(operation, 3 * kBlockBytes), Next::kFinished);
  EXPECT_EQ(request.moved_bytes, kRequestBytes);
  EXPECT_FALSE(request.error);
}

TEST(Completion, a_write_that_keeps_no_block_is_an_error) {
  for (const int result : {0, 512, 4095}) {
    IoRequest request = request_of(IoRequest::Kind::kWrite);
    Operation operation = operation_of(request);
    EXPECT_EQ(complete(operation, result), Next::kFinished);
    ASSERT_TRUE(request.error) << result;
    EXPECT_EQ(request.error->code(), Code::kUnavailable);
    EXPECT_EQ(request.moved_bytes, 0U);
  }
}

TEST(Completion, a_read_of_nothing_is_the_end_of_the_file) {
  IoRequest request = request_of(IoRequest::Kind::kRead);
  Operation operation = operation_of(request);
  EXPECT_EQ(complete(operation, kBlockBytes), Next::kQueueAgain);
  EXPECT_EQ(complete(operation, 0), Next::kFinished);
  EXPECT_EQ(request.moved_bytes, kBlockBytes);
  EXPECT_FALSE(request.error);
}

TEST(Completion, a_fraction_of_a_block_is_the_end_of_the_file_only_where_the_file_ends) {
  FileFacts file = file_of(OpenMode::kReadDirect);
  file.bytes = 8 * kBlockBytes + 100;
  IoRequest request = request_of(IoRequest::Kind::kRead);
  Operation operation = begin(request, file, 3);
  EXPECT_EQ(complete(operation, 100), Next::kFinished);
  EXPECT_EQ(request.moved_bytes, 100U);
  EXPECT_FALSE(request.error);

  operation = begin(request, file, 3);
  EXPECT_EQ(complete(operation, 99), Next::kFinished);
  ASSERT_TRUE(request.error);
  EXPECT_EQ(request.error->code(), Code::kUnavailable);
}

TEST(Completion, an_error_names_the_file_the_place_and_the_number) {
  IoRequest request = request_of(IoRequest::Kind::kWrite);
  Operation operation = operation_of(request);
  EXPECT_EQ(complete(operation, kBlockBytes), Next::kQueueAgain);
  EXPECT_EQ(complete(operation, -ENOSPC), Next::kFinished);
  ASSERT_TRUE(request.error);
  EXPECT_EQ(request.error->code(), Code::kResourceExhausted);
  EXPECT_EQ(request.error->native(), ENOSPC);
  EXPECT_EQ(request.error->message(),
            "write 12288 bytes at offset 36864 of part: No space left on device");
}

TEST(Completion, a_transient_error_is_tried_again_a_bounded_number_of_times) {
  for (const int number : {EAGAIN, EINTR, EBUSY}) {
    IoRequest request = request_of(IoRequest::Kind::kRead);
    Operation operation = operation_of(request);
    for (std::uint64_t i = 0; i < kRetryCountMax; ++i) {
      ASSERT_EQ(complete(operation, -number), Next::kQueueAfterPause);
      EXPECT_FALSE(request.error);
    }
    EXPECT_EQ(complete(operation, -number), Next::kFinished);
    ASSERT_TRUE(request.error);
    EXPECT_EQ(request.error->native(), number);
  }
}

TEST(Completion, progress_gives_a_fresh_number_of_retries) {
  IoRequest request = request_of(IoRequest::Kind::kRead);
  Operation operation = operation_of(request);
  for (std::uint64_t i = 0; i < kRetryCountMax; ++i) (void)complete(operation, -EAGAIN);
  EXPECT_EQ(complete(operation, kBlockBytes), Next::kQueueAgain);
  EXPECT_EQ(complete(operation, -EAGAIN), Next::kQueueAfterPause);
}

TEST(Completion, no_error_of_an_fsync_is_tried_again) {
  for (const int number : {EIO, EAGAIN, EINTR, ENOSPC}) {
    IoRequest request = request_of(IoRequest::Kind::kSync);
    Operation operation = operation_of(request);
    EXPECT_EQ(complete(operation, -number), Next::kFinished);
    ASSERT_TRUE(request.error);
    EXPECT_EQ(request.error->native(), number);
  }
}

TEST(Completion, a_request_that_is_used_again_starts_clean) {
  IoRequest request = request_of(IoRequest::Kind::kWrite);
  Operation operation = operation_of(request);
  (void)complete(operation, kBlockBytes);
  (void)complete(operation, -EIO);
  operation = operation_of(request);
  EXPECT_FALSE(request.error);
  EXPECT_EQ(operation.rest_bytes(), kRequestBytes);
}

TEST(Completion, a_call_moves_at_most_one_gibibyte) {
  IoRequest request = request_of(IoRequest::Kind::kWrite);
  request.bytes = std::size_t{3} << 30;
  const Operation operation = operation_of(request);
  EXPECT_EQ(operation.call_bytes(), std::size_t{1} << 30);
}

TEST(CheckRequest, refuses_what_is_unaligned) {
  const FileFacts file = file_of(OpenMode::kWriteDirect);
  IoRequest request = request_of(IoRequest::Kind::kWrite);
  EXPECT_TRUE(check_request(request, file));
  request.bytes = kBlockBytes - 1;
  EXPECT_FALSE(check_request(request, file));
  request = request_of(IoRequest::Kind::kWrite);
  request.offset = 512;
  EXPECT_FALSE(check_request(request, file));
  request = request_of(IoRequest::Kind::kWrite);
  request.data = memory + 512;
  EXPECT_FALSE(check_request(request, file));
}

TEST(CheckRequest, refuses_a_write_beyond_the_end_and_takes_a_read_there) {
  const FileFacts file = file_of(OpenMode::kWriteDirect);
  IoRequest request = request_of(IoRequest::Kind::kWrite);
  request.offset = file.bytes - kRequestBytes;
  EXPECT_TRUE(check_request(request, file));
  request.offset += kBlockBytes;
  const auto refused = check_request(request, file);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), Code::kInvalidArgument);
  request.kind = IoRequest::Kind::kRead;
  EXPECT_TRUE(check_request(request, file));
}

TEST(CheckRequest, refuses_a_range_that_wraps_around) {
  IoRequest request = request_of(IoRequest::Kind::kRead);
  request.offset = ~std::uint64_t{0} - kBlockBytes + 1;
  EXPECT_FALSE(check_request(request, file_of(OpenMode::kReadDirect)));
}

TEST(CheckRequest, takes_only_an_fsync_on_a_buffered_file) {
  const FileFacts file = file_of(OpenMode::kCreateBuffered);
  EXPECT_FALSE(check_request(request_of(IoRequest::Kind::kWrite), file));
  EXPECT_FALSE(check_request(request_of(IoRequest::Kind::kRead), file));
  EXPECT_TRUE(check_request(request_of(IoRequest::Kind::kSync), file));
}

}  // namespace
}  // namespace stillframe::uring
