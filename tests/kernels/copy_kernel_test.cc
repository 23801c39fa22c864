#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "kernels/host_copy.h"

namespace stillframe::kernels {
namespace {

// Stands still, or moves on by a step each time that it is read.
class FakeClock final : public Clock {
 public:
  explicit FakeClock(std::int64_t step_ns) : step_ns_(step_ns) {}
  std::int64_t monotonic_ns() const noexcept override { return now_ns_ += step_ns_; }
  std::int64_t wall_ns() const noexcept override { return 0; }

 private:
  const std::int64_t step_ns_;
  mutable std::int64_t now_ns_ = 0;
};

TEST(CopyKernel, every_kernel_has_a_name_of_its_own) {
  std::set<std::string_view> names;
  for (const CopyForm form : {CopyForm::kMemcpy, CopyForm::kSequential, CopyForm::kInterleaved}) {
    for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
      names.insert(name({.form = form, .isa = isa}));
    }
  }
  EXPECT_EQ(9U, names.size());
  EXPECT_EQ("interleaved avx512", name({.form = CopyForm::kInterleaved, .isa = Isa::kAvx512}));
}

TEST(CopyKernel, plain_kernels_run_everywhere) {
  const std::vector<CopyKernel> kernels = runnable_kernels();
  ASSERT_GE(kernels.size(), 3U);
  EXPECT_EQ(Isa::kPlain, kernels.front().isa);
}

TEST(CopyKernel, the_choice_is_a_kernel_that_runs_here) {
  std::vector<std::byte> source(4 * kExtentBytes);
  std::vector<std::byte> target(5 * kExtentBytes);
  const std::size_t skip_bytes = -reinterpret_cast<std::uintptr_t>(target.data()) % kBlockBytes;
  const CopyKernel chosen =
      choose_kernel(SystemClock(), source, Bytes(target).subspan(skip_bytes, source.size()));
  const std::vector<CopyKernel> kernels = runnable_kernels();
  EXPECT_NE(kernels.end(), std::find(kernels.begin(), kernels.end(), chosen));
}

TEST(CopyKernel, a_clock_that_stands_still_gives_the_widest_sequential_kernel) {
  std::vector<std::byte> source(kExtentBytes);
  std::vector<std::byte> target(2 * kExtentBytes);
  const std::size_t skip_bytes = -reinterpret_cast<std::uintptr_t>(target.data()) % kBlockBytes;
  const CopyKernel expected = {.form = CopyForm::kSequential, .isa = runnable_kernels().back().isa};
  EXPECT_EQ(expected,
            choose_kernel(FakeClock(0), source, Bytes(target).subspan(skip_bytes, source.size())));
}

TEST(CopyKernel, too_little_memory_to_measure_gives_the_widest_sequential_kernel) {
  const CopyKernel expected = {.form = CopyForm::kSequential, .isa = runnable_kernels().back().isa};
  EXPECT_EQ(expected, choose_kernel(SystemClock(), {}, {}));
}

TEST(CopyKernel, the_measurement_ends_when_its_budget_is_spent) {
  std::vector<std::byte> source(kExtentBytes);
  std::vector<std::byte> target(2 * kExtentBytes);
  const std::size_t skip_bytes = -reinterpret_cast<std::uintptr_t>(target.data()) % kBlockBytes;
  const FakeClock clock(1'000'000);  // A turn reads it twice.
  (void)choose_kernel(clock, source, Bytes(target).subspan(skip_bytes, source.size()));
  const auto turns_max = std::max<std::size_t>(runnable_kernels().size(), 11);
  EXPECT_LE(clock.monotonic_ns(), static_cast<std::int64_t>(2 * turns_max + 2) * 1'000'000);
}

}  // namespace
}  // namespace stillframe::kernels
