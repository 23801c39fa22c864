#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "client/libstillframe.h"
#include "cuda/resources.h"
#include "cuda/shared_buffer.h"

namespace stillframe::testing {

// A training process whose tensors lie on two GPUs, or on one that is taken for both, and on the
// host. Its work on a GPU runs in a stream of its own, as a framework's does: fill() only enqueues.
class GpuTrainer {
 public:
  enum class Place { kHost, kGpu0, kGpu1 };
  // How a GPU's memory was allocated: by cuMemAlloc(), at reserved addresses with or without a
  // descriptor for other processes, or in pieces of 2 MiB with a descriptor each.
  enum class Allocator { kPlain, kShareable, kPrivate, kPieces };
  struct Tensor {
    Place place = Place::kHost;
    std::uint64_t bytes = 0;  // Of a strided one, a multiple of 8.
    bool is_lazy = false;
    bool is_strided = false;         // Stored column by column.
    std::uint64_t misalignment = 0;  // Of its address.
    Allocator allocator = Allocator::kPlain;
  };

  // Parameters and moments on both GPUs, buffers, counters of the host: one of each kind.
  static std::vector<Tensor> mixed_tensors();

  GpuTrainer(std::string run_path, std::string socket_path, std::vector<Tensor> tensors);
  ~GpuTrainer();
  GpuTrainer(const GpuTrainer&) = delete;
  GpuTrainer& operator=(const GpuTrainer&) = delete;

  // As sf_attach_options has them.
  struct Lane {
    std::string name = "pinned";
    std::uint64_t window_bytes = 0;
    std::uint64_t ring_bytes = 0;
  };
  int attach(const Lane& lane);  // And registers the layout.
  // Gives every tensor its bytes of `step`: those that `is_wanted` says. On GPUs, in stream order.
  enum class Which { kAll, kLazy, kEarly };
  void fill(std::int64_t step, Which which = Which::kAll);
  // Puts the streams some 10 ms behind.
  void delay();
  // Stops the first GPU's stream, until go_on().
  void stop();
  void go_on();
  // Writes other bytes to the lazy tensors of GPUs, as soon as the streams get there.
  void spoil();
  void wait_gpus();
  // As soon as the stream gets there, no call for the first GPU works in this process any more.
  void break_gpu();

  int begin_save(std::int64_t step, sf_capture capture, std::uint64_t* ticket,
                 sf_check check = SF_CHECK_SAMPLE);
  int fence(std::uint64_t ticket) { return sf_capture_fence(session_, ticket, 5'000, &error_); }
  int publish(std::uint64_t ticket);  // Waits for all of it first.
  int wait_durable(std::uint64_t ticket) {
    return sf_ticket_wait(session_, ticket, SF_DURABLE, 20'000, &error_);
  }
  int save_durable(std::int64_t step);  // Eager, filled before.
  // Reads the newest checkpoint into the host's memory. "": it holds `step`, bit for bit.
  std::string judge_newest(std::int64_t step);
  // Reads the newest checkpoint to where the tensors lie, strided ones of GPUs to nowhere; with
  // `uses_memory` from the daemon's slot.
  int restore_newest(bool uses_memory, sf_read_stats* stats);
  // Which tensor does not hold its bytes of `step` where it lies, but for strided ones; "": none.
  std::string find_other(std::int64_t step);
  // What a contiguous tensor of a GPU holds.
  std::vector<std::uint8_t> read_gpu(std::size_t tensor);
  static std::uint8_t byte_at(std::int64_t step, std::size_t tensor, std::uint64_t offset);
  int close();

  std::string describe();
  sf_session* session() noexcept { return session_; }
  const sf_error& error() const noexcept { return error_; }
  // Gives the GPU memory of a tensor back, as a careless program might.
  void free_tensor(std::size_t tensor) { memories_[tensor].on_gpu = {}; }
  // Others in their place, of the same size, with no content.
  void move_tensors();
  // Takes all memory of the first GPU that is left, until let_memory_go().
  void take_memory();
  void let_memory_go() { taken_.clear(); }

 private:
  struct Memory {
    std::vector<std::uint8_t> on_host;
    cuda::DeviceBuffer on_gpu;
    cuda::SharedBuffer shared;
    std::shared_ptr<void> pages;
    CUdeviceptr begin = 0;  // Of any of them.
    std::vector<std::uint64_t> shape;
    std::vector<std::int64_t> stride_bytes;
    std::string name;
    int gpu = -1;
  };
  void allocate(std::size_t tensor);
  std::vector<std::uint8_t> content(std::int64_t step, std::size_t tensor) const;
  // Page-locked, so that a copy from it is nobody's wait; anew after wait_gpus().
  std::byte* stage(std::uint64_t bytes);
  void copy_within(int gpu, CUdeviceptr target, CUdeviceptr source, std::uint64_t bytes);
  std::vector<sf_source> sources() const;

  std::string run_path_;
  std::string socket_path_;
  std::vector<Tensor> tensors_;
  std::vector<Memory> memories_;
  std::shared_ptr<const cuda::Context> contexts_[2];
  cuda::Stream streams_[2];
  std::vector<cuda::DeviceBuffer> taken_;
  int gpu_count_ = 0;  // 1 or 2.
  struct StagingBlock {
    cuda::HostBuffer memory;
    std::uint64_t bytes = 0;
  };
  std::deque<StagingBlock> staging_;  // What fill() copies from.
  std::size_t staging_block_ = 0;
  std::uint64_t staged_bytes_ = 0;  // Of that block.
  cuda::HostBuffer stop_word_;
  std::uint32_t stop_count_ = 0;
  cuda::DeviceBuffer scratch_[2];
  std::uint64_t delay_copies_[2] = {};
  sf_session* session_ = nullptr;
  sf_error error_{};
};

}  // namespace stillframe::testing
