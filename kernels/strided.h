#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/host_copy.h"

// Bytes of a tensor that is not contiguous, in logical row-major order.
namespace stillframe::kernels {

// Copies the bytes [offset, offset + packed.size()) of the tensor into `packed`. The range lies
// within the tensor; it may begin and end inside an element.
void gather(const Strides& strides, const std::byte* data, std::uint64_t offset,
            Bytes packed) noexcept;

// The reverse.
void scatter(const Strides& strides, std::byte* data, std::uint64_t offset,
             ConstBytes packed) noexcept;

}  // namespace stillframe::kernels
