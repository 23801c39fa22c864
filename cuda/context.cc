#include "cuda/context.h"

#include "base/text.h"

namespace stillframe::cuda {

Context::Context(std::shared_ptr<const Driver> driver, int ordinal, CUdevice device,
                 CUcontext context)
    : driver_(std::move(driver)), ordinal_(ordinal), device_(device), context_(context) {}

Result<std::shared_ptr<const Context>> Context::retain(std::shared_ptr<const Driver> driver,
                                                       int ordinal) {
  CUdevice device = 0;
  auto found =
      driver->check(concat("find GPU ", ordinal), driver->calls().cuDeviceGet(&device, ordinal));
  if (!found) return std::move(found).error();
  CUcontext context = nullptr;
  auto retained = driver->check(concat("take the context of GPU ", ordinal),
                                driver->calls().cuDevicePrimaryCtxRetain(&context, device));
  if (!retained) return std::move(retained).error();
  return std::shared_ptr<const Context>(new Context(std::move(driver), ordinal, device, context));
}

Context::~Context() { (void)driver_->calls().cuDevicePrimaryCtxRelease(device_); }

}  // namespace stillframe::cuda
