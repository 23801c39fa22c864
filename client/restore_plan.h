#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/result.h"
#include "catalog/block_reader.h"
#include "client/libstillframe.h"
#include "kernels/host_copy.h"

namespace stillframe::client {

// Finds a part's tensors by name.
class TensorIndex {
 public:
  explicit TensorIndex(const std::vector<catalog::OpenPart>& parts);
  // nullptr: no such part, or no such tensor in it.
  const format::PlacedTensor* find(std::uint64_t part, std::string_view name) const;

 private:
  std::vector<std::unordered_map<std::string_view, const format::PlacedTensor*>> parts_;
};

// What one read has to do: where the bytes of each part go, and which extents hold them.
struct RestorePlan {
  // Sorted, without empty ones.
  std::vector<std::vector<kernels::Target>> targets_by_part;
  // The same for addresses of GPUs, and whether there are any.
  std::vector<std::vector<kernels::Target>> gpu_targets_by_part;
  bool has_gpu_targets = false;
  std::vector<catalog::ExtentRange> wanted;  // In the order of the drive.
  std::vector<std::unique_ptr<kernels::Strides>> strides;
  std::uint64_t bytes = 0;  // Of the wanted extents.
};

// kInvalidArgument: a target names a tensor that is not there, has another size than it or no
// memory, or strided memory of a GPU, or names one that another target names too.
Result<RestorePlan> plan_restore(const std::vector<catalog::OpenPart>& parts,
                                 const TensorIndex& index, std::span<const sf_target> targets);

}  // namespace stillframe::client
