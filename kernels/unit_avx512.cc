// Compiled with the flags for avx512 where the compiler has them; see unit_loops.h for what that
// forbids.
#include "kernels/unit.h"

#if defined(__AVX512F__)

#include <immintrin.h>

namespace stillframe::kernels {
namespace {

struct Vector {
  using Value = __m512i;
  static constexpr std::size_t kBytes = 64;
  static Value load(const std::byte* source) {
    return _mm512_loadu_si512(reinterpret_cast<const __m512i*>(source));
  }
  static void stream(std::byte* target, Value value) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), value);
  }
};

}  // namespace
}  // namespace stillframe::kernels

#include "kernels/unit_loops.h"

namespace stillframe::kernels {

const UnitKernels* avx512_unit_kernels() noexcept { return &kUnitKernels; }

}  // namespace stillframe::kernels

#else

namespace stillframe::kernels {

const UnitKernels* avx512_unit_kernels() noexcept { return nullptr; }

}  // namespace stillframe::kernels

#endif
