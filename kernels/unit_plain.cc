#include "kernels/unit.h"

#if defined(__SSE2__)  // Every x86-64.
#include <immintrin.h>

namespace stillframe::kernels {
namespace {

struct Vector {
  using Value = __m128i;
  static constexpr std::size_t kBytes = 16;
  static Value load(const std::byte* source) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  }
  static void stream(std::byte* target, Value value) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target), value);
  }
};

}  // namespace
}  // namespace stillframe::kernels

#else  // Elsewhere ordinary stores stand in: right, if not fast.

namespace stillframe::kernels {
namespace {

struct Vector {
  using Value = std::uint64_t;
  static constexpr std::size_t kBytes = 8;
  static Value load(const std::byte* source) {
    Value value = 0;
    __builtin_memcpy(&value, source, sizeof value);
    return value;
  }
  static void stream(std::byte* target, Value value) {
    __builtin_memcpy(target, &value, sizeof value);
  }
};

}  // namespace
}  // namespace stillframe::kernels

#endif

#include "kernels/unit_loops.h"

namespace stillframe::kernels {

const UnitKernels* plain_unit_kernels() noexcept { return &kUnitKernels; }

}  // namespace stillframe::kernels
