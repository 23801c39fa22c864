#pragma once

#include <cstdint>
#include <memory>

#include "base/result.h"
#include "base/unique_fd.h"
#include "cuda/context.h"

namespace stillframe::cuda {

// Memory of a GPU that several processes map: made in one, which gives the others descriptors of
// it. It lives until the last of them has unmapped it, whoever ends first; no process can take it
// from another (GPU-4). Nothing of it is allocated beyond the making.
//
// Sole owner of one mapping; an empty owner is a valid state. Whoever ends it knows that the GPU is
// done with it.
class SharedBuffer {
 public:
  struct Made;
  // `bytes` is rounded up to what the GPU can share. kResourceExhausted: it has no such memory
  // left.
  static Result<Made> make(const std::shared_ptr<const Context>& context, std::uint64_t bytes);
  // Maps what another process made: exactly its bytes. `fd` stays the caller's. kInvalidArgument:
  // it is no such descriptor, or of another size.
  static Result<SharedBuffer> open(const std::shared_ptr<const Context>& context, int fd,
                                   std::uint64_t bytes);

  SharedBuffer() = default;
  SharedBuffer(SharedBuffer&& other) noexcept;
  SharedBuffer& operator=(SharedBuffer&& other) noexcept;
  ~SharedBuffer();

  CUdeviceptr get() const noexcept { return address_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  explicit operator bool() const noexcept { return address_ != 0; }

 private:
  static Result<SharedBuffer> map(const std::shared_ptr<const Context>& context,
                                  CUmemGenericAllocationHandle memory, std::uint64_t bytes);

  std::shared_ptr<const Context> context_;
  CUdeviceptr address_ = 0;
  std::uint64_t bytes_ = 0;
  bool is_mapped_ = false;
};

struct SharedBuffer::Made {
  SharedBuffer buffer;
  UniqueFd fd;  // Close-on-exec; for open() in another process.
};

// A descriptor of memory that the process's own allocator made shareable (PointerFacts::
// has_descriptor), for SharedBuffer::open() elsewhere. `begin` is where it is mapped.
Result<UniqueFd> descriptor_of(const Context& context, CUdeviceptr begin);

// The older way: a handle names a whole allocation of cuMemAlloc(), for one other process at a time
// and none across namespaces. The memory must outlive what was opened (GPU-4).
using IpcHandle = CUipcMemHandle;
Result<IpcHandle> ipc_handle_of(const Context& context, CUdeviceptr begin);
using IpcMapping = Owned<CUdeviceptr, &Calls::cuIpcCloseMemHandle>;
Result<IpcMapping> open_ipc_handle(const std::shared_ptr<const Context>& context,
                                   const IpcHandle& handle);

// What the GPU of a context has, and has left.
struct MemoryLeft {
  std::uint64_t free_bytes = 0;
  std::uint64_t bytes = 0;
};
Result<MemoryLeft> memory_left(const Context& context);

}  // namespace stillframe::cuda
