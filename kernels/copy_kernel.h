#pragma once

#include "kernels/host_copy.h"
#include "kernels/unit.h"

// From the name of a kernel to its code. Internal to kernels.
namespace stillframe::kernels {

// The loops for `isa`; the plain ones where this build or this CPU lacks it, so that a kernel
// chosen on another machine is slow here and nothing worse.
const UnitKernels& unit_kernels_of(Isa isa) noexcept;

}  // namespace stillframe::kernels
