#include "cuda/devices.h"

#include <unistd.h>

#include <array>
#include <cstdlib>

#include "base/text.h"

namespace stillframe::cuda {

namespace {

std::string text_of(const CUuuid& uuid) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text = "GPU-";
  for (std::size_t i = 0; i < sizeof uuid.bytes; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    const auto byte = static_cast<unsigned char>(uuid.bytes[i]);
    text += kDigits[byte / 16];
    text += kDigits[byte % 16];
  }
  return text;
}

Result<DeviceFacts> look_at(const Driver& driver, int ordinal) {
  const Calls& calls = driver.calls();
  CUdevice device = 0;
  std::array<char, 256> name = {};
  CUuuid uuid = {};
  std::size_t bytes = 0;
  DeviceFacts facts;
  for (const CUresult result : {
           calls.cuDeviceGet(&device, ordinal),
           calls.cuDeviceGetName(name.data(), static_cast<int>(name.size() - 1), device),
           calls.cuDeviceGetUuid(&uuid, device),
           calls.cuDeviceTotalMem(&bytes, device),
           calls.cuDeviceGetAttribute(&facts.major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                                      device),
           calls.cuDeviceGetAttribute(&facts.minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                                      device),
       }) {
    auto asked = driver.check(concat("look at GPU ", ordinal), result);
    if (!asked) return std::move(asked).error();
  }
  facts.name = name.data();
  facts.uuid = text_of(uuid);
  facts.bytes = bytes;
  return facts;
}

// The control pipe of a running MPS daemon, as its clients find it.
bool is_under_mps() {
  const char* const folder = std::getenv("CUDA_MPS_PIPE_DIRECTORY");
  const std::string control = concat(folder != nullptr ? folder : "/tmp/nvidia-mps", "/control");
  return ::access(control.c_str(), F_OK) == 0;
}

}  // namespace

Status may_be_shared(const DeviceFacts& device) {
  // Its name ends with the profile: "NVIDIA H100 80GB HBM3 MIG 1g.10gb".
  if (device.name.find(" MIG ") != std::string::npos) {
    return Error(Code::kUnavailable, "a MIG instance shares no memory between processes");
  }
  if (is_under_mps()) {
    return Error(Code::kUnavailable,
                 "MPS is in use, under which a fault of one process ends the others as well");
  }
  return ok();
}

Result<std::vector<DeviceFacts>> list_devices(const Driver& driver) {
  int count = 0;
  auto counted = driver.check("count the GPUs", driver.calls().cuDeviceGetCount(&count));
  if (!counted) return std::move(counted).error();
  std::vector<DeviceFacts> devices;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    auto facts = look_at(driver, ordinal);
    if (!facts) return std::move(facts).error();
    devices.push_back(*std::move(facts));
  }
  return devices;
}

}  // namespace stillframe::cuda
