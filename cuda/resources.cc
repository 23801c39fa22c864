#include "cuda/resources.h"

#include <string>

#include "base/text.h"

namespace stillframe::cuda {

namespace {

// Makes `handle` by `make`, a call in `context`, and its owner.
template <class Owner, class Handle, class Make>
Result<Owner> own(const std::shared_ptr<const Context>& context, const std::string& doing,
                  Handle handle, Make&& make) {
  const Current current(*context);
  auto made = context->driver().check(doing, make(context->calls(), handle));
  if (!made) return std::move(made).error();
  return Owner(context, handle);
}

}  // namespace

Result<Stream> create_stream(const std::shared_ptr<const Context>& context) {
  return own<Stream>(
      context, "create a stream", CUstream(), [](const Calls& calls, CUstream& stream) {
        int least = 0;
        int greatest = 0;
        const CUresult asked = calls.cuCtxGetStreamPriorityRange(&least, &greatest);
        if (asked != CUDA_SUCCESS) return asked;
        return calls.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, least);
      });
}

Result<Event> create_event(const std::shared_ptr<const Context>& context) {
  return own<Event>(context, "create an event", CUevent(), [](const Calls& calls, CUevent& event) {
    return calls.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING);
  });
}

Result<bool> has_happened(const Context& context, const Event& event) {
  const Current current(context);
  const CUresult result = context.calls().cuEventQuery(event.get());
  if (result == CUDA_SUCCESS) return true;
  if (result == CUDA_ERROR_NOT_READY) return false;
  return context.driver().error("wait for a GPU", result);
}

Result<DeviceBuffer> allocate(const std::shared_ptr<const Context>& context, std::uint64_t bytes) {
  return own<DeviceBuffer>(
      context, concat("allocate ", bytes, " bytes of GPU ", context->ordinal()), CUdeviceptr(),
      [bytes](const Calls& calls, CUdeviceptr& data) { return calls.cuMemAlloc(&data, bytes); });
}

Result<HostBuffer> allocate_host(const std::shared_ptr<const Context>& context,
                                 std::uint64_t bytes) {
  using Pointer = void*;
  return own<HostBuffer>(context, concat("allocate ", bytes, " bytes of page-locked memory"),
                         Pointer(), [bytes](const Calls& calls, Pointer& data) {
                           return calls.cuMemHostAlloc(
                               &data, bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
                         });
}

Result<HostRegistration> register_host(const std::shared_ptr<const Context>& context, Bytes bytes) {
  using Pointer = void*;
  return own<HostRegistration>(context, concat("page-lock ", bytes.size(), " bytes"),
                               Pointer(bytes.data()), [bytes](const Calls& calls, Pointer& data) {
                                 return calls.cuMemHostRegister(
                                     data, bytes.size(),
                                     CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
                               });
}

Result<CUdeviceptr> device_address(const Context& context, void* host) {
  const Current current(context);
  CUdeviceptr address = 0;
  auto asked = context.driver().check("find page-locked memory from a GPU",
                                      context.calls().cuMemHostGetDevicePointer(&address, host, 0));
  if (!asked) return std::move(asked).error();
  return address;
}

Result<Module> load_module(const std::shared_ptr<const Context>& context, ConstBytes image) {
  return own<Module>(context, concat("load the kernels on GPU ", context->ordinal()), CUmodule(),
                     [image](const Calls& calls, CUmodule& module) {
                       return calls.cuModuleLoadData(&module, image.data());
                     });
}

}  // namespace stillframe::cuda
