#include "tests/support/gpu_trainer.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <span>
#include <thread>
#include <utility>

#include "base/check.h"
#include "format/tensor.h"
#include "tests/support/break_gpu.h"

namespace stillframe::testing {

namespace {

constexpr std::uint64_t kColumns = 8;  // Of a strided tensor.
constexpr std::uint64_t kStagingBytes = std::uint64_t{16} << 20U;
constexpr std::uint64_t kScratchBytes = std::uint64_t{16} << 20U;

constexpr std::uint64_t kPageBytes = std::uint64_t{2} << 20U;

// Addresses, at which memory is mapped as frameworks' allocators do: `piece_bytes` by each handle,
// somewhere among more addresses than are used.
class MappedPages {
 public:
  MappedPages(std::shared_ptr<const cuda::Context> context, std::uint64_t bytes,
              std::uint64_t piece_bytes, CUmemAllocationHandleType handle_type)
      : context_(std::move(context)), piece_bytes_(piece_bytes) {
    const cuda::Calls& calls = context_->calls();
    const cuda::Current current(*context_);
    CUmemAllocationProp wanted = {};
    wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.requestedHandleTypes = handle_type;
    wanted.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = context_->device()};
    CUmemAccessDesc access = {.location = wanted.location,
                              .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    const std::uint64_t used_bytes = round_up(bytes, piece_bytes_);
    reserved_bytes_ = used_bytes + 2 * kPageBytes;
    check(calls.cuMemAddressReserve(&reserved_, reserved_bytes_, 0, 0, 0) == CUDA_SUCCESS,
          "a GPU has addresses");
    for (std::uint64_t at = 0; at < used_bytes; at += piece_bytes_) {
      CUmemGenericAllocationHandle memory = 0;
      check(calls.cuMemCreate(&memory, piece_bytes_, &wanted, 0) == CUDA_SUCCESS,
            "a GPU has memory");
      check(calls.cuMemMap(begin() + at, piece_bytes_, 0, memory, 0) == CUDA_SUCCESS &&
                calls.cuMemSetAccess(begin() + at, piece_bytes_, &access, 1) == CUDA_SUCCESS &&
                calls.cuMemRelease(memory) == CUDA_SUCCESS,
            "a GPU's memory can be mapped");
      mapped_bytes_ += piece_bytes_;
    }
  }
  ~MappedPages() {
    const cuda::Current current(*context_);
    for (std::uint64_t at = 0; at < mapped_bytes_; at += piece_bytes_) {
      (void)context_->calls().cuMemUnmap(begin() + at, piece_bytes_);
    }
    (void)context_->calls().cuMemAddressFree(reserved_, reserved_bytes_);
  }
  MappedPages(const MappedPages&) = delete;
  MappedPages& operator=(const MappedPages&) = delete;
  CUdeviceptr begin() const { return reserved_ + kPageBytes; }

 private:
  std::shared_ptr<const cuda::Context> context_;
  std::uint64_t piece_bytes_;
  std::uint64_t reserved_bytes_ = 0;
  std::uint64_t mapped_bytes_ = 0;
  CUdeviceptr reserved_ = 0;
};

}  // namespace

std::vector<GpuTrainer::Tensor> GpuTrainer::mixed_tensors() {
  return {{.place = Place::kGpu0, .bytes = 1'500'000, .is_lazy = true},
          {.place = Place::kHost, .bytes = 4},
          {.place = Place::kGpu0, .bytes = 333, .misalignment = 3},
          {.place = Place::kGpu1, .bytes = 700'001, .is_lazy = true, .misalignment = 1},
          {.place = Place::kGpu0, .bytes = 80'000, .is_lazy = true, .is_strided = true},
          {.place = Place::kHost, .bytes = 1'200'000, .is_lazy = true},
          {.place = Place::kGpu1, .bytes = 0},
          {.place = Place::kHost, .bytes = 900'000},
          {.place = Place::kGpu1, .bytes = 1'300'000, .is_lazy = true},
          {.place = Place::kGpu1, .bytes = 64}};
}

GpuTrainer::GpuTrainer(std::string run_path, std::string socket_path, std::vector<Tensor> tensors)
    : run_path_(std::move(run_path)),
      socket_path_(std::move(socket_path)),
      tensors_(std::move(tensors)) {
  const auto driver = cuda::Driver::load();
  check(driver.has_value(), "there is a driver");
  check((*driver)->calls().cuDeviceGetCount(&gpu_count_) == CUDA_SUCCESS && gpu_count_ > 0,
        "there is a GPU");
  gpu_count_ = std::min(gpu_count_, 2);
  for (int i = 0; i < gpu_count_; ++i) {
    auto context = cuda::Context::retain(*driver, i);
    check(context.has_value(), "a GPU has a context");
    contexts_[i] = *context;
    auto stream = cuda::create_stream(*context);
    check(stream.has_value(), "a GPU has streams");
    streams_[i] = *std::move(stream);
  }
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& tensor = tensors_[i];
    Memory memory;
    memory.name = "tensor" + std::to_string(i);
    memory.shape = {tensor.bytes};
    if (tensor.is_strided) {
      const std::uint64_t rows = tensor.bytes / kColumns;
      memory.shape = {rows, kColumns};
      memory.stride_bytes = {1, static_cast<std::int64_t>(rows)};
    }
    const std::uint64_t bytes = tensor.bytes + tensor.misalignment;
    if (tensor.place == Place::kHost) {
      memory.on_host.resize(bytes);
    } else {
      memory.gpu = tensor.place == Place::kGpu0 ? 0 : gpu_count_ - 1;
    }
    memories_.push_back(std::move(memory));
    if (tensor.place != Place::kHost) allocate(i);
  }
}

void GpuTrainer::allocate(std::size_t tensor) {
  Memory& memory = memories_[tensor];
  const std::uint64_t bytes =
      std::max<std::uint64_t>(tensors_[tensor].bytes + tensors_[tensor].misalignment, 1);
  if (tensors_[tensor].allocator == Allocator::kPlain) {
    auto buffer = cuda::allocate(contexts_[memory.gpu], bytes);
    check(buffer.has_value(), "a GPU has memory");
    memory.on_gpu = *std::move(buffer);
    memory.begin = memory.on_gpu.get();
    return;
  }
  if (tensors_[tensor].allocator != Allocator::kShareable) {
    const bool is_private = tensors_[tensor].allocator == Allocator::kPrivate;
    auto pages = std::make_shared<MappedPages>(
        contexts_[memory.gpu], bytes, is_private ? round_up(bytes, kPageBytes) : kPageBytes,
        is_private ? CU_MEM_HANDLE_TYPE_NONE : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    memory.begin = pages->begin();
    memory.pages = std::move(pages);
    return;
  }
  auto made = cuda::SharedBuffer::make(contexts_[memory.gpu], bytes);
  check(made.has_value(), "a GPU has memory");
  memory.shared = std::move(made->buffer);
  memory.begin = memory.shared.get();
}

void GpuTrainer::move_tensors() {
  std::vector<Memory> before(memories_.size());
  for (std::size_t i = 0; i < memories_.size(); ++i) {
    if (memories_[i].gpu < 0) continue;
    before[i].on_gpu = std::move(memories_[i].on_gpu);
    before[i].shared = std::move(memories_[i].shared);
    before[i].pages = std::move(memories_[i].pages);
    allocate(i);
  }
}

GpuTrainer::~GpuTrainer() {
  if (session_ != nullptr) (void)sf_session_close(session_, 1'000, nullptr);
  wait_gpus();
}

int GpuTrainer::attach(const Lane& lane) {
  sf_attach_options options{};
  options.struct_bytes = sizeof options;
  options.world_size = 1;
  options.keep_last = 3;
  options.gpu_window_bytes = lane.window_bytes;
  options.gpu_ring_bytes = lane.ring_bytes;
  options.lane = lane.name.c_str();
  options.no_autostart = 1;
  options.run_path = run_path_.c_str();
  options.socket_path = socket_path_.c_str();
  const int attached = sf_attach(&options, &session_, &error_);
  if (attached != SF_OK) return attached;
  std::vector<sf_tensor> tensors;
  for (const Memory& memory : memories_) {
    tensors.push_back({.name = memory.name.c_str(),
                       .shape = memory.shape.data(),
                       .dimension_count = static_cast<std::uint32_t>(memory.shape.size()),
                       .dtype = static_cast<std::uint32_t>(format::Dtype::kU8)});
  }
  // Two parts, so that the second begins with a header of its own.
  const std::size_t half = tensors.size() / 2;
  const sf_part parts[2] = {{.name = "model",
                             .tensors = tensors.data(),
                             .tensor_count = half,
                             .metadata = nullptr,
                             .metadata_count = 0},
                            {.name = "optimizer",
                             .tensors = tensors.data() + half,
                             .tensor_count = tensors.size() - half,
                             .metadata = nullptr,
                             .metadata_count = 0}};
  return sf_layout_register(session_, parts, 2, 10'000, &error_);
}

std::uint8_t GpuTrainer::byte_at(std::int64_t step, std::size_t tensor, std::uint64_t offset) {
  const std::uint64_t mixed = (offset * 0x9E3779B97F4A7C15U) ^ (tensor * 0xBF58476D1CE4E5B9U) ^
                              (static_cast<std::uint64_t>(step) * 0x94D049BB133111EBU);
  return static_cast<std::uint8_t>(mixed >> 29U);
}

// In the order of the image.
std::vector<std::uint8_t> GpuTrainer::content(std::int64_t step, std::size_t tensor) const {
  std::vector<std::uint8_t> bytes(tensors_[tensor].bytes);
  for (std::uint64_t i = 0; i < bytes.size(); ++i) bytes[i] = byte_at(step, tensor, i);
  return bytes;
}

void GpuTrainer::fill(std::int64_t step, Which which) {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& tensor = tensors_[i];
    if (tensor.bytes == 0) continue;
    if (which != Which::kAll && tensor.is_lazy != (which == Which::kLazy)) continue;
    std::vector<std::uint8_t> bytes = content(step, i);
    if (tensor.is_strided) {
      std::vector<std::uint8_t> stored(bytes.size());
      const std::uint64_t rows = bytes.size() / kColumns;
      for (std::uint64_t at = 0; at < bytes.size(); ++at) {
        stored[at % kColumns * rows + at / kColumns] = bytes[at];
      }
      bytes = std::move(stored);
    }
    Memory& memory = memories_[i];
    if (memory.gpu < 0) {
      std::ranges::copy(bytes,
                        memory.on_host.begin() + static_cast<std::ptrdiff_t>(tensor.misalignment));
      continue;
    }
    std::byte* const staged = stage(tensor.bytes);
    std::ranges::copy(std::as_bytes(std::span(bytes)), staged);
    const cuda::Current current(*contexts_[memory.gpu]);
    const CUresult copied = contexts_[memory.gpu]->calls().cuMemcpyHtoDAsync(
        memory.begin + tensor.misalignment, staged, tensor.bytes, streams_[memory.gpu].get());
    check(copied == CUDA_SUCCESS, "the trainer computes");
  }
}

std::byte* GpuTrainer::stage(std::uint64_t bytes) {
  while (staging_block_ < staging_.size() &&
         staging_[staging_block_].bytes - staged_bytes_ < bytes) {
    ++staging_block_;
    staged_bytes_ = 0;
  }
  if (staging_block_ == staging_.size()) {
    const std::uint64_t block_bytes = std::max(bytes, kStagingBytes);
    auto memory = cuda::allocate_host(contexts_[0], block_bytes);
    check(memory.has_value(), "there is page-locked memory");
    staging_.push_back({.memory = *std::move(memory), .bytes = block_bytes});
  }
  auto* const begin = static_cast<std::byte*>(staging_[staging_block_].memory.get());
  return begin + std::exchange(staged_bytes_, staged_bytes_ + bytes);
}

void GpuTrainer::copy_within(int gpu, CUdeviceptr target, CUdeviceptr source, std::uint64_t bytes) {
  const cuda::Current current(*contexts_[gpu]);
  const CUresult copied =
      contexts_[gpu]->calls().cuMemcpyDtoDAsync(target, source, bytes, streams_[gpu].get());
  check(copied == CUDA_SUCCESS, "the trainer computes");
}

void GpuTrainer::delay() {
  constexpr std::uint64_t kHalf = kScratchBytes / 2;
  for (int gpu = 0; gpu < gpu_count_; ++gpu) {
    if (delay_copies_[gpu] == 0) {
      auto scratch = cuda::allocate(contexts_[gpu], kScratchBytes);
      check(scratch.has_value(), "a GPU has memory");
      scratch_[gpu] = *std::move(scratch);
      wait_gpus();
      const auto begin = std::chrono::steady_clock::now();
      copy_within(gpu, scratch_[gpu].get(), scratch_[gpu].get() + kHalf, kHalf);
      wait_gpus();
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      delay_copies_[gpu] = 1 + static_cast<std::uint64_t>(0.01 / taken.count());
    }
    for (std::uint64_t i = 0; i < delay_copies_[gpu]; ++i) {
      copy_within(gpu, scratch_[gpu].get(), scratch_[gpu].get() + kHalf, kHalf);
    }
  }
}

void GpuTrainer::stop() {
  const std::shared_ptr<const cuda::Context>& context = contexts_[0];
  if (!stop_word_) {
    auto word = cuda::allocate_host(context, sizeof(std::uint32_t));
    check(word.has_value(), "there is page-locked memory");
    stop_word_ = *std::move(word);
    *static_cast<std::uint32_t*>(stop_word_.get()) = 0;
  }
  const auto address = cuda::device_address(*context, stop_word_.get());
  check(address.has_value(), "a GPU finds page-locked memory");
  const cuda::Current current(*context);
  check(context->calls().cuStreamWaitValue32(streams_[0].get(), *address, ++stop_count_,
                                             CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS,
        "a stream waits for memory");
}

void GpuTrainer::go_on() {
  std::atomic_ref(*static_cast<std::uint32_t*>(stop_word_.get())).store(stop_count_);
}

void GpuTrainer::spoil() {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const Tensor& tensor = tensors_[i];
    if (memories_[i].gpu < 0 || !tensor.is_lazy || tensor.bytes == 0) continue;
    check(tensor.bytes <= kScratchBytes && delay_copies_[memories_[i].gpu] > 0,
          "delay() comes before spoil()");
    copy_within(memories_[i].gpu, memories_[i].begin + tensor.misalignment,
                scratch_[memories_[i].gpu].get(), tensor.bytes);
  }
}

void GpuTrainer::wait_gpus() {
  for (int i = 0; i < gpu_count_; ++i) {
    const auto event = cuda::create_event(contexts_[i]);
    if (!event) continue;  // The simulated driver is broken, on purpose.
    const cuda::Calls& calls = contexts_[i]->calls();
    if (calls.cuEventRecord(event->get(), streams_[i].get()) != CUDA_SUCCESS) continue;
    while (calls.cuEventQuery(event->get()) == CUDA_ERROR_NOT_READY) std::this_thread::yield();
  }
  staging_block_ = 0;
  staged_bytes_ = 0;
}

void GpuTrainer::break_gpu() { testing::break_gpu(contexts_[0], streams_[0].get()); }

std::vector<sf_source> GpuTrainer::sources() const {
  std::vector<sf_source> sources;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const Memory& memory = memories_[i];
    const void* const data =
        memory.gpu < 0 ? static_cast<const void*>(memory.on_host.data() + tensors_[i].misalignment)
                       : reinterpret_cast<const void*>(memory.begin + tensors_[i].misalignment);
    sources.push_back(
        {.data = data,
         .stride_bytes = memory.stride_bytes.empty() ? nullptr : memory.stride_bytes.data(),
         .lazy = tensors_[i].is_lazy ? 1U : 0U,
         .memory = static_cast<std::uint32_t>(memory.gpu < 0 ? SF_MEMORY_HOST : SF_MEMORY_CUDA)});
  }
  return sources;
}

void GpuTrainer::take_memory() {
  constexpr std::uint64_t kLeast = 64 << 10;
  for (std::uint64_t bytes = std::uint64_t{1} << 36; bytes >= kLeast;) {
    auto taken = cuda::allocate(contexts_[0], bytes);
    if (taken) {
      taken_.push_back(*std::move(taken));
    } else {
      bytes /= 2;
    }
  }
}

int GpuTrainer::begin_save(std::int64_t step, sf_capture capture, std::uint64_t* ticket,
                           sf_check check) {
  const sf_stream streams[2] = {{.stream = streams_[0].get(), .device = 0, .reserved = 0},
                                {.stream = streams_[1].get(), .device = 1, .reserved = 0}};
  sf_save_options options{};
  options.struct_bytes = sizeof options;
  options.capture = capture;
  options.check = check;
  options.busy_timeout_ms = 10'000;
  options.step = step;
  const std::string state = "{\"format_version\": 1}";
  options.state_json = state.c_str();
  options.state_bytes = state.size();
  options.streams = streams;
  options.stream_count = static_cast<std::uint64_t>(gpu_count_);
  const std::vector<sf_source> given = sources();
  return sf_save_begin(session_, &options, given.data(), given.size(), ticket, &error_);
}

int GpuTrainer::publish(std::uint64_t ticket) {
  const int waited = sf_capture_wait(session_, ticket, 10'000, 1, &error_);
  // Publishing what failed tells the library that its capture is over.
  const int published = sf_capture_publish(session_, ticket, &error_);
  return waited != SF_OK ? waited : published;
}

int GpuTrainer::save_durable(std::int64_t step) {
  std::uint64_t ticket = 0;
  const int begun = begin_save(step, SF_CAPTURE_EAGER, &ticket);
  return begun != SF_OK ? begun : wait_durable(ticket);
}

std::string GpuTrainer::judge_newest(std::int64_t step) {
  sf_checkpoint* checkpoint = nullptr;
  if (sf_checkpoint_open(run_path_.c_str(), "latest", nullptr, &checkpoint, &error_) != SF_OK) {
    return error_.message;
  }
  std::vector<std::vector<std::uint8_t>> read;
  std::vector<sf_target> targets;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    read.emplace_back(tensors_[i].bytes);
    targets.push_back({.part_index = i < tensors_.size() / 2 ? 0U : 1U,
                       .name = memories_[i].name.c_str(),
                       .data = read.back().data(),
                       .bytes = tensors_[i].bytes,
                       .stride_bytes = nullptr,
                       .memory = SF_MEMORY_HOST,
                       .reserved = 0});
  }
  const int filled =
      sf_checkpoint_read(checkpoint, targets.data(), targets.size(), nullptr, &error_);
  sf_checkpoint_close(checkpoint);
  if (filled != SF_OK) return error_.message;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const std::vector<std::uint8_t> expected = content(step, i);
    const auto [at, ignored] = std::ranges::mismatch(read[i], expected);
    if (at != read[i].end()) {
      return memories_[i].name + " differs from byte " + std::to_string(at - read[i].begin());
    }
  }
  return "";
}

int GpuTrainer::restore_newest(bool uses_memory, sf_read_stats* stats) {
  sf_checkpoint* checkpoint = nullptr;
  const int opened = sf_checkpoint_open(run_path_.c_str(), "latest",
                                        uses_memory ? session_ : nullptr, &checkpoint, &error_);
  if (opened != SF_OK) return opened;
  std::vector<sf_target> targets;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    if (tensors_[i].is_strided) continue;
    Memory& memory = memories_[i];
    void* const data = memory.gpu < 0
                           ? static_cast<void*>(memory.on_host.data() + tensors_[i].misalignment)
                           : reinterpret_cast<void*>(memory.begin + tensors_[i].misalignment);
    targets.push_back(
        {.part_index = i < tensors_.size() / 2 ? 0U : 1U,
         .name = memory.name.c_str(),
         .data = data,
         .bytes = tensors_[i].bytes,
         .stride_bytes = nullptr,
         .memory = static_cast<std::uint32_t>(memory.gpu < 0 ? SF_MEMORY_HOST : SF_MEMORY_CUDA),
         .reserved = 0});
  }
  stats->struct_bytes = sizeof *stats;
  const int read = sf_checkpoint_read(checkpoint, targets.data(), targets.size(), stats, &error_);
  sf_checkpoint_close(checkpoint);
  return read;
}

std::string GpuTrainer::find_other(std::int64_t step) {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const Memory& memory = memories_[i];
    if (tensors_[i].is_strided || tensors_[i].bytes == 0) continue;
    std::vector<std::uint8_t> found(tensors_[i].bytes);
    if (memory.gpu < 0) {
      std::copy_n(memory.on_host.begin() + static_cast<std::ptrdiff_t>(tensors_[i].misalignment),
                  found.size(), found.begin());
    } else {
      found = read_gpu(i);
    }
    if (found != content(step, i)) return memory.name;
  }
  return "";
}

std::vector<std::uint8_t> GpuTrainer::read_gpu(std::size_t tensor) {
  const Memory& memory = memories_[tensor];
  std::vector<std::uint8_t> held(tensors_[tensor].bytes);
  {
    const cuda::Current current(*contexts_[memory.gpu]);
    const CUresult copied = contexts_[memory.gpu]->calls().cuMemcpyDtoHAsync(
        held.data(), memory.begin + tensors_[tensor].misalignment, held.size(),
        streams_[memory.gpu].get());
    check(copied == CUDA_SUCCESS, "the trainer computes");
  }
  wait_gpus();
  return held;
}

std::string GpuTrainer::describe() {
  char* json = nullptr;
  if (sf_session_describe(session_, &json, &error_) != SF_OK) return error_.message;
  std::string text = json;
  sf_free(json);
  return text;
}

int GpuTrainer::close() {
  return sf_session_close(std::exchange(session_, nullptr), 5'000, &error_);
}

}  // namespace stillframe::testing
