#include "cuda/shared_buffer.h"

#include <fcntl.h>

#include <cerrno>
#include <utility>

#include "base/bytes.h"
#include "base/os_error.h"
#include "base/text.h"

namespace stillframe::cuda {

namespace {

constexpr CUmemAllocationHandleType kDescriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

// Ends the name of the memory, not the memory, which mappings and descriptors keep.
class MemoryHandle {
 public:
  MemoryHandle(const Context& context, CUmemGenericAllocationHandle handle)
      : context_(context), handle_(handle) {}
  MemoryHandle(const MemoryHandle&) = delete;
  MemoryHandle& operator=(const MemoryHandle&) = delete;
  ~MemoryHandle() { (void)context_.calls().cuMemRelease(handle_); }

 private:
  const Context& context_;
  CUmemGenericAllocationHandle handle_;
};

Result<UniqueFd> export_memory(const Context& context, CUmemGenericAllocationHandle memory) {
  constexpr std::string_view kDoing = "share memory of a GPU";
  int fd = -1;
  auto exported = context.driver().check(
      kDoing, context.calls().cuMemExportToShareableHandle(&fd, memory, kDescriptor, 0));
  if (!exported) return std::move(exported).error();
  UniqueFd owned(fd);
  if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) return os_error(kDoing, errno);
  return owned;
}

}  // namespace

SharedBuffer::SharedBuffer(SharedBuffer&& other) noexcept
    : context_(std::move(other.context_)),
      address_(std::exchange(other.address_, 0)),
      bytes_(std::exchange(other.bytes_, 0)),
      is_mapped_(std::exchange(other.is_mapped_, false)) {}

SharedBuffer& SharedBuffer::operator=(SharedBuffer&& other) noexcept {
  SharedBuffer taken(std::move(other));
  std::swap(context_, taken.context_);
  std::swap(address_, taken.address_);
  std::swap(bytes_, taken.bytes_);
  std::swap(is_mapped_, taken.is_mapped_);
  return *this;
}

SharedBuffer::~SharedBuffer() {
  if (address_ == 0) return;
  const Current current(*context_);
  if (is_mapped_) (void)context_->calls().cuMemUnmap(address_, bytes_);
  (void)context_->calls().cuMemAddressFree(address_, bytes_);
}

Result<SharedBuffer> SharedBuffer::map(const std::shared_ptr<const Context>& context,
                                       CUmemGenericAllocationHandle memory, std::uint64_t bytes) {
  const Calls& calls = context->calls();
  const auto check = [&context](CUresult result) {
    return context->driver().check("map shared memory of a GPU", result);
  };
  SharedBuffer buffer;
  auto reserved = check(calls.cuMemAddressReserve(&buffer.address_, bytes, 0, 0, 0));
  if (!reserved) {
    buffer.address_ = 0;
    return std::move(reserved).error();
  }
  buffer.context_ = context;
  buffer.bytes_ = bytes;
  auto mapped = check(calls.cuMemMap(buffer.address_, bytes, 0, memory, 0));
  if (!mapped) return std::move(mapped).error();
  buffer.is_mapped_ = true;
  CUmemAccessDesc access = {};
  access.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = context->device()};
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  auto allowed = check(calls.cuMemSetAccess(buffer.address_, bytes, &access, 1));
  if (!allowed) return std::move(allowed).error();
  return buffer;
}

Result<SharedBuffer::Made> SharedBuffer::make(const std::shared_ptr<const Context>& context,
                                              std::uint64_t bytes) {
  const Calls& calls = context->calls();
  const Current current(*context);
  CUmemAllocationProp wanted = {};
  wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  wanted.requestedHandleTypes = kDescriptor;
  wanted.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = context->device()};
  std::size_t unit = 0;
  auto asked = context->driver().check(
      "ask how a GPU shares memory",
      calls.cuMemGetAllocationGranularity(&unit, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  if (!asked) return std::move(asked).error();
  const std::uint64_t whole_bytes = round_up(bytes, unit);
  CUmemGenericAllocationHandle memory = 0;
  auto created = context->driver().check(
      concat("allocate ", whole_bytes, " bytes of GPU ", context->ordinal(), " to share"),
      calls.cuMemCreate(&memory, whole_bytes, &wanted, 0));
  if (!created) return std::move(created).error();
  const MemoryHandle handle(*context, memory);
  Made made;
  auto exported = export_memory(*context, memory);
  if (!exported) return std::move(exported).error();
  made.fd = *std::move(exported);
  auto buffer = map(context, memory, whole_bytes);
  if (!buffer) return std::move(buffer).error();
  made.buffer = *std::move(buffer);
  return made;
}

Result<SharedBuffer> SharedBuffer::open(const std::shared_ptr<const Context>& context, int fd,
                                        std::uint64_t bytes) {
  const Current current(*context);
  CUmemGenericAllocationHandle memory = 0;
  auto imported = context->driver().check(
      "take shared memory of a GPU",
      context->calls().cuMemImportFromShareableHandle(
          &memory, reinterpret_cast<void*>(static_cast<std::uintptr_t>(fd)), kDescriptor));
  if (!imported) return std::move(imported).error();
  const MemoryHandle handle(*context, memory);
  return map(context, memory, bytes);
}

Result<UniqueFd> descriptor_of(const Context& context, CUdeviceptr begin) {
  const Current current(context);
  CUmemGenericAllocationHandle memory = 0;
  auto retained = context.driver().check(
      "find shared memory of a GPU",
      context.calls().cuMemRetainAllocationHandle(
          &memory, reinterpret_cast<void*>(static_cast<std::uintptr_t>(begin))));
  if (!retained) return std::move(retained).error();
  const MemoryHandle handle(context, memory);
  return export_memory(context, memory);
}

Result<IpcHandle> ipc_handle_of(const Context& context, CUdeviceptr begin) {
  const Current current(context);
  IpcHandle handle = {};
  auto got = context.driver().check("share an allocation of a GPU",
                                    context.calls().cuIpcGetMemHandle(&handle, begin));
  if (!got) return std::move(got).error();
  return handle;
}

Result<IpcMapping> open_ipc_handle(const std::shared_ptr<const Context>& context,
                                   const IpcHandle& handle) {
  const Current current(*context);
  CUdeviceptr begin = 0;
  auto opened = context->driver().check(
      "open an allocation of another process",
      context->calls().cuIpcOpenMemHandle(&begin, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
  if (!opened) return std::move(opened).error();
  return IpcMapping(context, begin);
}

Result<MemoryLeft> memory_left(const Context& context) {
  const Current current(context);
  std::size_t free_bytes = 0;
  std::size_t bytes = 0;
  auto asked = context.driver().check("ask for a GPU's memory",
                                      context.calls().cuMemGetInfo(&free_bytes, &bytes));
  if (!asked) return std::move(asked).error();
  return MemoryLeft{.free_bytes = free_bytes, .bytes = bytes};
}

}  // namespace stillframe::cuda
