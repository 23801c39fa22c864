#include "shm/gpu_plan.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace stillframe::shm {
namespace {

constexpr std::uint64_t kSlotBytes = std::uint64_t{4} << 20;

// Two parts; the first of two extents, of which a GPU packs the second.
GpuPlan example() {
  const std::uint64_t image_bytes = kExtentBytes + 5'000;
  return {
      .parts = {{.image_bytes = image_bytes, .slot_offset = 0, .piece_count = 2},
                {.image_bytes = 100, .slot_offset = 2 * kExtentBytes, .piece_count = 1}},
      .chunks = {{.part = 0, .first_extent = 1, .extent_count = 1},
                 {.part = 1, .first_extent = 0, .extent_count = 1}},
      .allocation_bytes = {4'096, 2'000'000},
      .pieces = {{.allocation = 1, .offset = 7, .image_offset = 4'096, .bytes = kExtentBytes},
                 {.allocation = 0, .offset = 0, .image_offset = kExtentBytes + 4'096, .bytes = 904},
                 {.allocation = 1, .offset = 1'999'900, .image_offset = 0, .bytes = 100}}};
}

Result<GpuPlan> decoded(const GpuPlan& plan) {
  const std::string blob = encode(plan);
  return decode_gpu_plan(std::as_bytes(std::span(blob)), kSlotBytes);
}

TEST(GpuPlan, comes_back_as_it_was) {
  const auto plan = decoded(example());
  ASSERT_TRUE(plan) << plan.error().message();
  EXPECT_EQ(encode(*plan), encode(example()));
  EXPECT_EQ(chunk_bytes(*plan, plan->chunks[0]), 8'192U);  // Whole leaves.
  EXPECT_EQ(chunk_bytes(*plan, plan->chunks[1]), 4'096U);
}

TEST(GpuPlan, of_which_anything_lies_outside_of_what_it_belongs_to_is_refused) {
  const std::vector<std::pair<const char*, std::function<void(GpuPlan&)>>> lies = {
      {"image", [](GpuPlan& plan) { plan.parts[1].slot_offset = kSlotBytes - 4'095; }},
      {"image", [](GpuPlan& plan) { plan.parts[0].slot_offset = ~std::uint64_t{0}; }},
      {"image", [](GpuPlan& plan) { plan.parts[1].image_bytes = 0; }},
      {"overlap", [](GpuPlan& plan) { plan.pieces[1].image_offset -= 1; }},
      {"overlap", [](GpuPlan& plan) { plan.pieces[2].bytes = 0; }},
      {"overlap", [](GpuPlan& plan) { plan.pieces[1].bytes += 1; }},
      {"allocation", [](GpuPlan& plan) { plan.pieces[2].offset += 1; }},
      {"allocation", [](GpuPlan& plan) { plan.pieces[2].offset = ~std::uint64_t{0}; }},
      {"allocation", [](GpuPlan& plan) { plan.pieces[0].allocation = 2; }},
      {"gap", [](GpuPlan& plan) { plan.pieces[1].image_offset += 1, plan.pieces[1].bytes -= 1; }},
      {"gap", [](GpuPlan& plan) { plan.pieces[1].bytes -= 1; }},
      {"gap", [](GpuPlan& plan) { plan.chunks[0].first_extent = 0; }},
      {"chunk", [](GpuPlan& plan) { plan.chunks[0].extent_count = 2; }},
      {"chunk", [](GpuPlan& plan) { plan.chunks[0].extent_count = 0; }},
      {"chunk", [](GpuPlan& plan) { plan.chunks[1].part = 2; }},
      {"pieces", [](GpuPlan& plan) { plan.parts[0].piece_count = 4; }},
      {"pieces", [](GpuPlan& plan) { plan.parts[1].piece_count = 0; }},
      {"empty", [](GpuPlan& plan) { plan.chunks.clear(); }},
  };
  for (std::size_t i = 0; i < lies.size(); ++i) {
    GpuPlan plan = example();
    lies[i].second(plan);
    const auto refused = decoded(plan);
    ASSERT_FALSE(refused) << i;
    EXPECT_EQ(refused.error().code(), Code::kInvalidArgument) << i;
    EXPECT_NE(refused.error().message().find(lies[i].first), std::string_view::npos)
        << i << ": " << refused.error().message();
  }
}

TEST(GpuPlan, that_is_not_as_long_as_it_says_is_refused) {
  const std::string blob = encode(example());
  for (std::size_t bytes = 0; bytes < blob.size(); ++bytes) {
    EXPECT_FALSE(decode_gpu_plan(std::as_bytes(std::span(blob).first(bytes)), kSlotBytes)) << bytes;
  }
  const std::string longer = blob + '\0';
  EXPECT_FALSE(decode_gpu_plan(std::as_bytes(std::span(longer)), kSlotBytes));
  for (std::size_t count = 0; count < 4; ++count) {
    std::string many = blob;
    many[count * 8 + 7] = '\x7f';
    EXPECT_FALSE(decode_gpu_plan(std::as_bytes(std::span(many)), kSlotBytes)) << count;
  }
}

}  // namespace
}  // namespace stillframe::shm
