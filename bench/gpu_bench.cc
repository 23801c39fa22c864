// What packing tensors of a GPU costs beside a plain copy kernel, and copying to and from the host.
//
//   gpu_bench [--mib N] [--rounds N] [--void-above RATIO] [--device N] [--copy-kernel FILE]
//
// Prints JSON Lines: a header, a line per run, a summary per ratio. Each run is a batch of launches
// between two moments at which the GPU is idle. FILE: raw_copy as a fatbin, else beside the
// program. RATIO: as Plan::void_above; on a simulated driver, whose times mean nothing, a large one
// lets every round count. Exit status 1 when a hash is wrong, 3 when too few rounds were valid.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/hash.h"
#include "bench/raw/raw.h"
#include "bench/rounds.h"
#include "cuda/devices.h"
#include "cuda/resources.h"
#include "kernels/gpu_launch.h"
#include "kernels/pack_table.h"

namespace stillframe::bench {
namespace {

constexpr std::uint32_t kPackBlocks = 256;  // As client/gpu_device.cc.
constexpr std::uint32_t kCopyBlocks = 1024;
constexpr int kLaunches = 10;

template <class T>
T value_of(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "gpu_bench: %s\n", std::string(result.error().message()).c_str());
    std::exit(1);
  }
  return *std::move(result);
}

void must(const Status& status) {
  if (!status) (void)value_of<Unit>(status);
}

template <class T>
T* address(CUdeviceptr data) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(data));
}

// One GPU, its stream, and memory for all that is measured.
class Gpu {
 public:
  Gpu(int ordinal, std::uint64_t bytes, const std::string& copy_kernel)
      : driver_(value_of(cuda::Driver::load())),
        context_(value_of(cuda::Context::retain(driver_, ordinal))),
        kernels_(value_of(kernels::GpuKernels::load(context_))),
        bytes_(bytes),
        stream_(value_of(cuda::create_stream(context_))),
        event_(value_of(cuda::create_event(context_))),
        source_(value_of(cuda::allocate(context_, bytes))),
        target_(value_of(cuda::allocate(context_, bytes))),
        hashes_(value_of(cuda::allocate(context_, bytes / kExtentBytes * 8))),
        damaged_(value_of(cuda::allocate(context_, bytes / kExtentBytes * 4))),
        host_(value_of(cuda::allocate_host(context_, bytes))) {
    std::ifstream file(copy_kernel, std::ios::binary);
    const std::string image((std::istreambuf_iterator<char>(file)), {});
    if (image.empty()) raw::die(("read " + copy_kernel).c_str());
    copy_module_ = value_of(cuda::load_module(context_, std::as_bytes(std::span(image))));
    const cuda::Current current(*context_);
    must(driver_->check("find raw_copy",
                        calls().cuModuleGetFunction(&copy_, copy_module_.get(), "raw_copy")));
    std::mt19937_64 random(11);
    auto* const words = static_cast<std::uint64_t*>(host_.get());
    for (std::uint64_t i = 0; i < bytes / 8; ++i) words[i] = random();
    to_gpu();
    wait();
  }

  // The tensors of one part, as `count` neighbours in memory whose bounds are multiples of 16.
  void lay_out(std::size_t count) {
    std::vector<kernels::Piece> pieces;
    const std::uint64_t share = bytes_ / count / 16 * 16;
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint64_t offset = i * share;
      pieces.push_back({.data = address<std::byte>(source_.get() + offset),
                        .image_offset = offset,
                        .bytes = i + 1 == count ? bytes_ - offset : share});
    }
    const auto first = kernels::first_pieces(pieces, bytes_);
    tables_ = value_of(cuda::allocate(
        context_, pieces.size() * sizeof(kernels::Piece) + first.size() * sizeof first[0]));
    const CUdeviceptr first_at = tables_.get() + pieces.size() * sizeof(kernels::Piece);
    {
      const cuda::Current current(*context_);
      must(driver_->check(
          "copy descriptors",
          calls().cuMemcpyHtoDAsync(tables_.get(), pieces.data(),
                                    pieces.size() * sizeof(kernels::Piece), stream_.get())));
      must(driver_->check("copy descriptors", calls().cuMemcpyHtoDAsync(
                                                  first_at, first.data(),
                                                  first.size() * sizeof first[0], stream_.get())));
    }
    wait();
    job_ = {.pieces = address<const kernels::Piece>(tables_.get()),
            .first_piece = address<const std::uint32_t>(first_at),
            .image_bytes = bytes_,
            .first_extent = 0,
            .extent_count = bytes_ / kExtentBytes,
            .image = address<std::byte>(target_.get()),
            .extent_hashes = address<std::uint64_t>(hashes_.get()),
            .damaged = address<std::uint32_t>(damaged_.get())};
  }

  void pack() { must(kernels_.pack(job_, kPackBlocks, stream_.get())); }
  void unpack() { must(kernels_.unpack(job_, kPackBlocks, stream_.get())); }
  void copy() {
    const cuda::Current current(*context_);
    CUdeviceptr source = source_.get();
    CUdeviceptr target = target_.get();
    unsigned long long count = bytes_ / 16;
    void* arguments[] = {&source, &target, &count};
    must(driver_->check("launch raw_copy",
                        calls().cuLaunchKernel(copy_, kCopyBlocks, 1, 1, 256, 1, 1, 0,
                                               stream_.get(), arguments, nullptr)));
  }
  void memcpy_d2d() {
    const cuda::Current current(*context_);
    must(driver_->check("copy on the GPU", calls().cuMemcpyDtoDAsync(target_.get(), source_.get(),
                                                                     bytes_, stream_.get())));
  }
  void to_gpu() {
    const cuda::Current current(*context_);
    must(driver_->check("copy to the GPU", calls().cuMemcpyHtoDAsync(source_.get(), host_.get(),
                                                                     bytes_, stream_.get())));
  }
  void to_host() {
    const cuda::Current current(*context_);
    must(driver_->check("copy from the GPU", calls().cuMemcpyDtoHAsync(host_.get(), target_.get(),
                                                                       bytes_, stream_.get())));
  }
  void wait() {
    const cuda::Current current(*context_);
    must(driver_->check("record", calls().cuEventRecord(event_.get(), stream_.get())));
    while (calls().cuEventQuery(event_.get()) == CUDA_ERROR_NOT_READY) std::this_thread::yield();
  }

  // Whether the packed image and its hashes are those of the source.
  bool is_right() {
    lay_out(300);
    pack();
    std::vector<std::uint64_t> hashes(job_.extent_count);
    {
      const cuda::Current current(*context_);
      must(driver_->check("copy hashes",
                          calls().cuMemcpyDtoHAsync(hashes.data(), hashes_.get(), hashes.size() * 8,
                                                    stream_.get())));
    }
    wait();
    const ConstBytes image(static_cast<const std::byte*>(host_.get()), bytes_);
    for (std::size_t i = 0; i < hashes.size(); ++i) {
      if (hashes[i] != hash_extent(image.subspan(i * kExtentBytes, kExtentBytes))) return false;
    }
    return true;
  }
  const cuda::Driver& driver() const { return *driver_; }

 private:
  const cuda::Calls& calls() const { return driver_->calls(); }

  std::shared_ptr<const cuda::Driver> driver_;
  std::shared_ptr<const cuda::Context> context_;
  kernels::GpuKernels kernels_;
  cuda::Module copy_module_;
  CUfunction copy_ = nullptr;
  std::uint64_t bytes_;
  cuda::Stream stream_;
  cuda::Event event_;
  cuda::DeviceBuffer source_;
  cuda::DeviceBuffer target_;
  cuda::DeviceBuffer hashes_;
  cuda::DeviceBuffer damaged_;
  cuda::HostBuffer host_;
  cuda::DeviceBuffer tables_;
  kernels::PackJob job_;
};

struct Options {
  std::uint64_t mib = 1024;
  std::size_t rounds = 7;
  double void_above = Plan().void_above;
  int device = 0;
  std::string copy_kernel;
};

Options options_of(int argc, char** argv) {
  Options options;
  options.copy_kernel = (std::filesystem::path(argv[0]).parent_path() / "gpu_copy.fatbin").string();
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--mib") options.mib = std::strtoull(argv[i + 1], nullptr, 10);
    if (name == "--rounds") options.rounds = std::strtoull(argv[i + 1], nullptr, 10);
    if (name == "--void-above") options.void_above = std::strtod(argv[i + 1], nullptr);
    if (name == "--device") options.device = std::atoi(argv[i + 1]);
    if (name == "--copy-kernel") options.copy_kernel = argv[i + 1];
  }
  return options;
}

int run(const Options& options) {
  Gpu gpu(options.device, options.mib << 20, options.copy_kernel);
  const cuda::DeviceFacts device =
      value_of(cuda::list_devices(gpu.driver()))[static_cast<std::size_t>(options.device)];
  header_line("gpu_bench")
      .add("gpu", device.name)
      .add("driver_cuda", gpu.driver().version())
      .add("mib", options.mib)
      .print();
  if (!gpu.is_right()) {
    std::fprintf(stderr, "gpu_bench: a hash is wrong\n");
    return 1;
  }
  const auto batch = [&gpu](void (Gpu::*one)()) {
    return [&gpu, one] {
      return timed([&] {
        for (int i = 0; i < kLaunches; ++i) (gpu.*one)();
        gpu.wait();
      });
    };
  };
  const auto laid_out = [&gpu](std::size_t count) { return [&gpu, count] { gpu.lay_out(count); }; };
  Rounds rounds(
      {.valid_rounds = options.rounds, .void_above = options.void_above},
      {{.name = "raw_copy", .run = batch(&Gpu::copy)},
       {.name = "raw_d2h", .run = batch(&Gpu::to_host)},
       {.name = "raw_h2d", .run = batch(&Gpu::to_gpu)}},
      {{.name = "memcpy_d2d", .run = batch(&Gpu::memcpy_d2d)},
       {.name = "pack_1", .run = batch(&Gpu::pack), .prepare = laid_out(1)},
       {.name = "pack_300", .run = batch(&Gpu::pack), .prepare = laid_out(300)},
       {.name = "pack_20000", .run = batch(&Gpu::pack), .prepare = laid_out(20'000)},
       {.name = "unpack_20000", .run = batch(&Gpu::unpack), .prepare = laid_out(20'000)}});
  const bool is_enough = rounds.run();
  (void)rounds.summarise("memcpy", "memcpy_d2d", "raw_copy", 1.0);
  (void)rounds.summarise("pack, 1 tensor", "pack_1", "raw_copy", 1.0 / 0.90);
  (void)rounds.summarise("pack, 300 tensors", "pack_300", "raw_copy", 1.0 / 0.90);
  (void)rounds.summarise("pack, 20 000 tensors", "pack_20000", "pack_1", 1.1);
  (void)rounds.summarise("unpack, 20 000 tensors", "unpack_20000", "raw_copy", 1.0 / 0.90);
  return is_enough ? 0 : 3;
}

}  // namespace
}  // namespace stillframe::bench

int main(int argc, char** argv) {
  return stillframe::bench::run(stillframe::bench::options_of(argc, argv));
}
