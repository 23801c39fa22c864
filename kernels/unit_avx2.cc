// Compiled with the flags for avx2 where the compiler has them; see unit_loops.h for what that
// forbids.
#include "kernels/unit.h"

#if defined(__AVX2__)

#include <immintrin.h>

namespace stillframe::kernels {
namespace {

struct Vector {
  using Value = __m256i;
  static constexpr std::size_t kBytes = 32;
  static Value load(const std::byte* source) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  }
  static void stream(std::byte* target, Value value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), value);
  }
};

}  // namespace
}  // namespace stillframe::kernels

#include "kernels/unit_loops.h"

namespace stillframe::kernels {

const UnitKernels* avx2_unit_kernels() noexcept { return &kUnitKernels; }

}  // namespace stillframe::kernels

#else

namespace stillframe::kernels {

const UnitKernels* avx2_unit_kernels() noexcept { return nullptr; }

}  // namespace stillframe::kernels

#endif
