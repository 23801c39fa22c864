#pragma once

#include <cstdint>
#include <memory>

#include "base/bytes.h"
#include "base/result.h"
#include "cuda/context.h"

// What a lane needs of a GPU, each with its owner. None of these calls waits for work on the GPU,
// unless the driver does so by itself. Whoever ends an owner knows that the GPU is done with it.
namespace stillframe::cuda {

using Stream = Owned<CUstream, &Calls::cuStreamDestroy>;
using Event = Owned<CUevent, &Calls::cuEventDestroy>;
using DeviceBuffer = Owned<CUdeviceptr, &Calls::cuMemFree>;
using HostBuffer = Owned<void*, &Calls::cuMemFreeHost>;              // Page-locked.
using HostRegistration = Owned<void*, &Calls::cuMemHostUnregister>;  // Of memory that exists.
using Module = Owned<CUmodule, &Calls::cuModuleUnload>;

// Waits for no other stream by itself, and gives way to all others.
Result<Stream> create_stream(const std::shared_ptr<const Context>& context);
// Without times, the cheapest form.
Result<Event> create_event(const std::shared_ptr<const Context>& context);
// Whether the GPU has come to where the event was recorded last.
Result<bool> has_happened(const Context& context, const Event& event);
// Aligned to 256 bytes at least.
Result<DeviceBuffer> allocate(const std::shared_ptr<const Context>& context, std::uint64_t bytes);
// Every GPU of the process can reach it, at device_address().
Result<HostBuffer> allocate_host(const std::shared_ptr<const Context>& context,
                                 std::uint64_t bytes);
// The same for memory that the caller has mapped, and unmaps only behind the registration's end.
Result<HostRegistration> register_host(const std::shared_ptr<const Context>& context, Bytes bytes);
// Where a GPU finds page-locked memory of the host.
Result<CUdeviceptr> device_address(const Context& context, void* host);
Result<Module> load_module(const std::shared_ptr<const Context>& context, ConstBytes image);

}  // namespace stillframe::cuda
