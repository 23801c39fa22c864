#include "kernels/copy_kernel.h"

#include <algorithm>
#include <array>
#include <optional>

#include "base/check.h"

namespace stillframe::kernels {

namespace {

constexpr std::array kIsas = {Isa::kPlain, Isa::kAvx2, Isa::kAvx512};
constexpr std::array kForms = {CopyForm::kMemcpy, CopyForm::kSequential, CopyForm::kInterleaved};

// Null when this build or this CPU lacks it.
const UnitKernels* find_unit_kernels(Isa isa) noexcept {
  switch (isa) {
    case Isa::kPlain: return plain_unit_kernels();
#if defined(__x86_64__)
    case Isa::kAvx2: return __builtin_cpu_supports("avx2") ? avx2_unit_kernels() : nullptr;
    case Isa::kAvx512: return __builtin_cpu_supports("avx512f") ? avx512_unit_kernels() : nullptr;
#else
    case Isa::kAvx2:
    case Isa::kAvx512: return nullptr;
#endif
  }
  return nullptr;
}

// Nanoseconds of one kernel's extents.
struct Trial {
  CopyKernel kernel;
  std::vector<std::int64_t> times_ns;

  std::int64_t median_ns() {
    const auto middle = times_ns.begin() + static_cast<std::ptrdiff_t>(times_ns.size() / 2);
    std::nth_element(times_ns.begin(), middle, times_ns.end());
    return *middle;
  }
};

std::optional<CopyKernel> fastest(std::vector<Trial>& trials) {
  std::optional<CopyKernel> best;
  std::int64_t best_ns = 0;
  for (Trial& trial : trials) {
    if (trial.times_ns.empty()) continue;
    const std::int64_t trial_ns = trial.median_ns();
    if (trial_ns <= 0) return std::nullopt;  // The clock is too coarse, or stands still.
    if (!best || trial_ns < best_ns) {
      best = trial.kernel;
      best_ns = trial_ns;
    }
  }
  return best;
}

}  // namespace

const UnitKernels& unit_kernels_of(Isa isa) noexcept {
  const UnitKernels* kernels = find_unit_kernels(isa);
  return kernels != nullptr ? *kernels : *plain_unit_kernels();
}

std::string_view name(CopyKernel kernel) noexcept {
  constexpr std::array<std::array<std::string_view, 3>, 3> kNames = {{
      {"memcpy plain", "memcpy avx2", "memcpy avx512"},
      {"sequential plain", "sequential avx2", "sequential avx512"},
      {"interleaved plain", "interleaved avx2", "interleaved avx512"},
  }};
  return kNames[static_cast<std::size_t>(kernel.form)][static_cast<std::size_t>(kernel.isa)];
}

std::vector<CopyKernel> runnable_kernels() {
  std::vector<CopyKernel> kernels;
  for (const Isa isa : kIsas) {
    if (find_unit_kernels(isa) == nullptr) continue;
    for (const CopyForm form : kForms) kernels.push_back({.form = form, .isa = isa});
  }
  return kernels;
}

CopyKernel widest_sequential_kernel() {
  return {.form = CopyForm::kSequential, .isa = runnable_kernels().back().isa};
}

CopyKernel choose_kernel(const Clock& clock, ConstBytes scratch_source, Bytes scratch_target,
                         std::int64_t budget_ns) {
  const std::vector<CopyKernel> kernels = runnable_kernels();
  const CopyKernel fallback = widest_sequential_kernel();
  const std::size_t extent_count =
      std::min(scratch_source.size(), scratch_target.size()) / kExtentBytes;
  if (extent_count == 0) return fallback;

  std::vector<Trial> trials;
  for (const CopyKernel kernel : kernels) trials.push_back({.kernel = kernel, .times_ns = {}});
  // The kernels take turns, so that a disturbance meets them all, and each turn is on the next
  // extent, so that caches have forgotten it. The cap ends the loop when the clock stands still.
  constexpr std::size_t kTurnsMax = 4096;
  const std::int64_t start_ns = clock.monotonic_ns();
  for (std::size_t turn = 0; turn < kTurnsMax; ++turn) {
    const std::size_t offset = turn % extent_count * kExtentBytes;
    const Source source = {.data = scratch_source.data() + offset, .bytes = kExtentBytes};
    Trial& trial = trials[turn % trials.size()];
    const std::int64_t before_ns = clock.monotonic_ns();
    (void)capture_extent(trial.kernel, {&source, 1}, 0, 0, kExtentBytes,
                         scratch_target.subspan(offset, kExtentBytes));
    const std::int64_t after_ns = clock.monotonic_ns();
    trial.times_ns.push_back(after_ns - before_ns);
    if (after_ns - start_ns >= budget_ns && turn + 1 >= trials.size()) break;
  }
  return fastest(trials).value_or(fallback);
}

}  // namespace stillframe::kernels
