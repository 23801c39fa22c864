#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/result.h"
#include "client/layout.h"
#include "client/libstillframe.h"
#include "cuda/context.h"
#include "cuda/driver.h"

namespace stillframe::client {

// A tensor of a save whose memory is a GPU's; none is empty.
struct GpuTensor {
  std::uint32_t index = 0;  // In the order of the layout.
  std::uint64_t data = 0;   // The GPU's address of its first element.
  int ordinal = 0;
  // Its memory may change as soon as the call has returned.
  bool is_early = false;
  // Empty: contiguous.
  std::vector<std::int64_t> stride_bytes;

  bool operator==(const GpuTensor&) const = default;
};

// Which tensors of a save lie on GPUs, and on which. Asks the driver at each save for each of its
// allocations, not for each tensor: launching over memory that was freed meanwhile would break the
// trainer's context for good (GPU-2, GPU-15). Session thread.
class GpuTensors {
 public:
  // Whether something changed since the call before. With `is_lazy`, sources that are not lazy are
  // early. kInvalidArgument: a tensor lies on no GPU, though its source says so, or in two
  // allocations of different GPUs; the message names it.
  Result<bool> update(const std::shared_ptr<const cuda::Driver>& driver,
                      const std::shared_ptr<const Layout>& layout,
                      std::span<const sf_source> sources, bool is_lazy);
  std::span<const GpuTensor> get() const noexcept { return tensors_; }

 private:
  // An allocation of the driver.
  struct Range {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    int ordinal = 0;
    std::uint64_t buffer_id = 0;

    bool operator==(const Range&) const = default;
  };
  // The one that holds an address; none where that is no GPU's.
  Result<std::optional<Range>> ask(const std::shared_ptr<const cuda::Driver>& driver,
                                   std::uint64_t address);
  Result<const Range*> find_range(const std::shared_ptr<const cuda::Driver>& driver,
                                  std::uint64_t address);
  Result<bool> are_ranges_valid(const std::shared_ptr<const cuda::Driver>& driver);

  std::map<int, std::shared_ptr<const cuda::Context>> contexts_;  // By ordinal.
  std::shared_ptr<const Layout> layout_;
  std::vector<GpuTensor> tensors_;
  std::vector<Range> ranges_;  // Sorted.
};

}  // namespace stillframe::client
