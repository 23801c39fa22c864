// What the daemon checks of a client: its layout and its ring records.
#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "base/hash.h"
#include "daemon/snapshot_plan.h"
#include "daemon/snapshot_stream.h"
#include "shm/messages.h"

namespace stillframe::daemon {
namespace {

shm::wire::LayoutT layout_of(std::uint64_t element_count) {
  shm::wire::LayoutT layout;
  for (const char* name : {"model", "optimizer"}) {
    auto part = std::make_unique<shm::wire::PartT>();
    part->name = name;
    auto tensor = std::make_unique<shm::wire::TensorT>();
    tensor->name = std::string(name) + ".weight";
    tensor->dtype = 14;  // F32
    tensor->shape = {element_count};
    part->tensors.push_back(std::move(tensor));
    layout.parts.push_back(std::move(part));
  }
  return layout;
}

Result<SnapshotPlan> plan(const shm::wire::LayoutT& layout) {
  auto blob = shm::encode(layout);
  if (!blob) return std::move(blob).error();
  return plan_snapshot(std::as_bytes(std::span(*blob)));
}

TEST(SnapshotPlan, places_each_part_on_an_extent_of_its_own) {
  auto made = plan(layout_of(300'000));
  ASSERT_TRUE(made) << made.error().message();
  ASSERT_EQ(made->parts.size(), 2U);
  EXPECT_EQ(made->part_offsets[0], 0U);
  EXPECT_EQ(made->part_offsets[1] % kExtentBytes, 0U);
  EXPECT_EQ(made->parts[0].bytes, 4096U + 1'200'000U);
  EXPECT_EQ(made->extent_counts[0], 2U);
  EXPECT_EQ(made->extent_count, 4U);
  EXPECT_EQ(made->slot_bytes % kHugePageBytes, 0U);
  EXPECT_GE(made->slot_bytes, made->part_offsets[1] + made->parts[1].bytes);
}

TEST(SnapshotPlan, refuses_an_unknown_dtype_a_repeated_part_and_a_path_as_part_name) {
  auto unknown = layout_of(8);
  unknown.parts[0]->tensors[0]->dtype = 200;
  EXPECT_FALSE(plan(unknown));
  auto repeated = layout_of(8);
  repeated.parts[1]->name = "model";
  EXPECT_FALSE(plan(repeated));
  for (const char* name : {"..", "a/b", "", "a\nb"}) {
    auto path = layout_of(8);
    path.parts[0]->name = name;
    EXPECT_FALSE(plan(path)) << name;
  }
  EXPECT_FALSE(plan(shm::wire::LayoutT()));
}

TEST(SnapshotPlan, refuses_sizes_that_overflow) {
  auto huge = layout_of(~std::uint64_t{0} / 2);
  EXPECT_FALSE(plan(huge));
}

class Stream : public ::testing::Test {
 protected:
  void SetUp() override {
    auto made = plan(layout_of(300'000));
    ASSERT_TRUE(made);
    plan_ = *std::move(made);
    stream_.emplace(plan_, [this] { ++wake_count_; });
  }
  static shm::ExtentRecord record(std::uint32_t part, std::uint32_t extent) {
    return {.ticket = 1, .part = part, .extent = extent, .hash = 7, .reserved = 0};
  }
  SnapshotPlan plan_;
  int wake_count_ = 0;
  std::optional<SnapshotStream> stream_;
};

TEST_F(Stream, hands_each_extent_over_once_and_wakes_the_writer) {
  EXPECT_TRUE(stream_->accept(record(0, 1)));
  EXPECT_TRUE(stream_->accept(record(1, 0)));
  EXPECT_EQ(wake_count_, 2);
  EXPECT_EQ(stream_->take().extents.size(), 2U);
  EXPECT_TRUE(stream_->take().extents.empty());
}

TEST_F(Stream, refuses_what_the_layout_does_not_have_and_what_came_before) {
  EXPECT_FALSE(stream_->accept(record(2, 0)));
  EXPECT_FALSE(stream_->accept(record(0, 2)));
  EXPECT_FALSE(stream_->accept(record(~0U, ~0U)));
  EXPECT_TRUE(stream_->accept(record(0, 0)));
  EXPECT_FALSE(stream_->accept(record(0, 0)));
}

TEST_F(Stream, is_complete_only_with_every_extent) {
  EXPECT_TRUE(stream_->accept(record(0, 0)));
  EXPECT_TRUE(stream_->accept(record(0, 1)));
  EXPECT_TRUE(stream_->accept(record(1, 0)));
  EXPECT_FALSE(stream_->complete());
  EXPECT_EQ(stream_->take().end, SnapshotStream::End::kOpen);
  EXPECT_TRUE(stream_->accept(record(1, 1)));
  EXPECT_TRUE(stream_->complete());
  EXPECT_EQ(stream_->take().end, SnapshotStream::End::kComplete);
}

TEST_F(Stream, keeps_its_first_end) {
  stream_->void_capture(Error(Code::kCancelled, "first"));
  stream_->void_capture(Error(Code::kDataLoss, "second"));
  EXPECT_EQ(stream_->take().end, SnapshotStream::End::kVoided);
  EXPECT_EQ(stream_->void_reason().message(), "first");
}

}  // namespace
}  // namespace stillframe::daemon
