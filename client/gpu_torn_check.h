#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"
#include "client/block_sampler.h"
#include "client/gpu_plan.h"
#include "client/layout.h"
#include "cuda/resources.h"
#include "kernels/gpu_launch.h"
#include "kernels/pack_table.h"

namespace stillframe::client {

// Looks whether a GPU's tensors changed while they were captured: some blocks of them are set aside
// by the GPU when the capture begins, and compared with the slot when it ends. What a worker packed
// is judged in the same way: imports have been read as zeros (GPU-27). One thread at a time.
class GpuTornCheck {
 public:
  explicit GpuTornCheck(std::shared_ptr<const cuda::Context> context)
      : context_(std::move(context)) {}

  // For captures of `share` from now on; the layout lives as long. kResourceExhausted: there is no
  // memory for the blocks, 1 MiB of the GPU's and 1 MiB that is page-locked; then nothing is
  // checked.
  Status prepare(const GpuPlan::Share& share, const Layout& layout);
  bool is_ready() const noexcept { return static_cast<bool>(host_); }
  // For captures of nothing.
  void clear() noexcept {
    forget();
    tensors_.clear();
  }
  // Of a capture first, in the trainer's stream, so that no later work in it can change the blocks:
  // a few tens of microseconds of it. Not before the capture before has ended.
  Status set_aside(const kernels::GpuKernels& kernels, CUstream trainer);
  // Then, in a stream that waits for that.
  Status fetch(CUstream stream);
  // For a capture of which nothing is to be compared.
  void forget() noexcept { set_aside_length_ = 0; }

  // Once all of the capture is in the slot. kDataLoss names a tensor of which that has other bytes.
  Status compare(ConstBytes slot);
  // As compare(), but every byte with what the tensors hold now, by `stream`, and waits for it.
  // kUnavailable: the GPU did not answer within 10 s.
  Status compare_all(ConstBytes slot, CUstream stream);

 private:
  // A tensor as the plan has it.
  struct Tensor {
    CUdeviceptr data = 0;
    std::uint64_t slot_offset = 0;
    std::uint64_t bytes = 0;
    TensorPlace place;
  };
  std::byte* set_aside_bytes() const noexcept { return static_cast<std::byte*>(host_.get()); }
  Status wait_for(CUstream stream);
  Error changed(const Tensor& tensor) const;

  std::shared_ptr<const cuda::Context> context_;
  const Layout* layout_ = nullptr;
  std::vector<Tensor> tensors_;
  BlockSampler sampler_;
  std::span<const BlockSampler::Block> blocks_;  // Of this capture.
  std::uint64_t set_aside_length_ = 0;           // Of all of them, in bytes.
  kernels::PackTables tables_;
  // First the blocks, one behind the other, then the tables for them, and on the GPU a hash.
  cuda::DeviceBuffer gpu_;
  cuda::HostBuffer host_;
  cuda::Event done_;
};

}  // namespace stillframe::client
