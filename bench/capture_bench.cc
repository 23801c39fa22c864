// How long tensors of 1 GiB take into a slot and back, hashed, against one big memcpy.
//
//   capture_bench [--mib N] [--rounds N] [--kernel NAME]
//
// Prints JSON Lines: a header, a line per run, a summary per ratio. Exit status 1 when a hash is
// wrong, 3 when too few rounds were valid; a missed target is a figure in the summary, not an
// error.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/hash.h"
#include "bench/raw/raw.h"
#include "bench/rounds.h"
#include "kernels/host_copy.h"

namespace stillframe::bench {
namespace {

constexpr std::size_t kTensorCount = 20'000;
constexpr std::size_t kTensorBytesMin = 256;
constexpr std::size_t kTensorBytesMax = std::size_t{4} << 20;
constexpr std::size_t kAlignment = 64;  // Where an allocator puts a tensor.

// Log-normal sizes, sigma 2, of `image_bytes` in all.
std::vector<std::size_t> tensor_sizes(std::size_t image_bytes, std::mt19937_64& random) {
  const std::size_t count = std::min(kTensorCount, image_bytes / (4 * kTensorBytesMin));
  std::normal_distribution<double> normal(0, 2);
  std::vector<double> shapes(count);
  for (double& shape : shapes) shape = std::exp(normal(random));
  const auto size = [](double scaled) {
    const double clamped = std::clamp(scaled, double{kTensorBytesMin}, double{kTensorBytesMax});
    return static_cast<std::size_t>(clamped) / 4 * 4;
  };
  double low = 0;
  double high = double{kTensorBytesMax};
  std::vector<std::size_t> sizes(count);
  for (int step = 0; step < 60; ++step) {
    const double scale = (low + high) / 2;
    for (std::size_t i = 0; i < count; ++i) sizes[i] = size(scale * shapes[i]);
    const auto total = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
    (total <= image_bytes ? low : high) = scale;
  }
  for (std::size_t i = 0; i < count; ++i) sizes[i] = size(low * shapes[i]);
  sizes.back() += image_bytes - std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
  return sizes;
}

// How the tensors lie in memory: as a model allocates them, in the order of the image, or in any
// other order, where each tensor begins at a place that the CPU cannot foresee.
enum class Order { kOfImage, kShuffled };

std::vector<kernels::Source> many_sources(const std::byte* memory, std::size_t image_bytes,
                                          Order memory_order) {
  std::mt19937_64 random(7);
  const std::vector<std::size_t> sizes = tensor_sizes(image_bytes, random);
  std::vector<std::size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (memory_order == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
  std::vector<kernels::Source> sources(sizes.size());
  std::size_t place = 0;
  for (const std::size_t i : order) {
    sources[i].data = memory + place;
    place += round_up(sizes[i], kAlignment);
  }
  std::uint64_t offset = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    sources[i].image_offset = offset;
    sources[i].bytes = sizes[i];
    offset += sizes[i];
  }
  return sources;
}

// One way to cut the same memory into tensors, with a slot for its image.
class Workload {
 public:
  Workload(std::string name, std::vector<kernels::Source> sources, std::size_t image_bytes,
           raw::Memory& memory)
      : name_(std::move(name)), sources_(std::move(sources)), slot_(image_bytes, 3) {
    for (const kernels::Source& source : sources_) {
      std::memcpy(slot_.data() + source.image_offset, source.data, source.bytes);
      targets_.push_back({.data = memory.data() + (source.data - memory.data()),
                          .image_offset = source.image_offset,
                          .bytes = source.bytes});
    }
    for (std::size_t begin = 0; begin < image_bytes; begin += kExtentBytes) {
      hashes_.push_back(hash_extent(extent(begin)));
    }
  }

  Contender capture(kernels::CopyKernel kernel, std::size_t thread_count) {
    return contender("capture", thread_count, [this, kernel](std::size_t index) {
      const std::uint64_t begin = index * kExtentBytes;
      return kernels::capture_extent(kernel, sources_, 0, begin, slot_.bytes(), extent(begin)) ==
             hashes_[index];
    });
  }

  Contender restore(kernels::CopyKernel kernel, std::size_t thread_count) {
    return contender("restore", thread_count, [this, kernel](std::size_t index) {
      const std::uint64_t begin = index * kExtentBytes;
      return kernels::restore_extent(kernel, extent(begin), begin, hashes_[index], targets_, 0);
    });
  }

  const raw::Memory& slot() const { return slot_; }

 private:
  Bytes extent(std::uint64_t begin) const {
    return {slot_.data() + begin, std::min(kExtentBytes, slot_.bytes() - begin)};
  }

  template <class Extent>
  Contender contender(const char* what, std::size_t thread_count, Extent extent_is_right) {
    const auto run = [this, thread_count, extent_is_right] {
      std::atomic<std::size_t> next{0};
      raw::on_threads(thread_count, [&](std::size_t) {
        for (;;) {
          const std::size_t index = next.fetch_add(1, std::memory_order_relaxed);
          if (index >= hashes_.size()) return;
          if (!extent_is_right(index)) {
            std::fprintf(stderr, "capture_bench: wrong hash of extent %zu\n", index);
            std::_Exit(1);
          }
        }
      });
    };
    return {.name = std::string(what) + "_" + name_ + "_" + std::to_string(thread_count),
            .run = [run] { return timed(run); }};
  }

  std::string name_;
  std::vector<kernels::Source> sources_;
  std::vector<kernels::Target> targets_;
  std::vector<std::uint64_t> hashes_;
  raw::Memory slot_;
};

kernels::CopyKernel kernel_named(std::string_view wanted, const raw::Memory& memory,
                                 const raw::Memory& slot) {
  for (const kernels::CopyKernel kernel : kernels::runnable_kernels()) {
    if (kernels::name(kernel) == wanted) return kernel;
  }
  const std::size_t bytes = std::min(slot.bytes(), std::size_t{64} << 20);
  return kernels::choose_kernel(SystemClock(), {memory.data(), bytes}, {slot.data(), bytes});
}

int run(std::size_t image_bytes, std::size_t valid_rounds, std::string_view kernel_wanted) {
  raw::Memory memory(image_bytes + kTensorCount * kAlignment);
  const kernels::Source all = {.data = memory.data(), .image_offset = 0, .bytes = image_bytes};
  Workload one("one", {all}, image_bytes, memory);
  Workload many("many", many_sources(memory.data(), image_bytes, Order::kOfImage), image_bytes,
                memory);
  Workload scattered("scattered", many_sources(memory.data(), image_bytes, Order::kShuffled),
                     image_bytes, memory);
  // Copies and captures of `one` leave the same bytes in its slot, so nothing is reset between
  // runs.
  const kernels::CopyKernel kernel = kernel_named(kernel_wanted, memory, one.slot());
  std::memcpy(one.slot().data(), memory.data(), image_bytes);

  std::vector<Contender> calibrators;
  std::vector<Contender> contenders;
  for (const std::size_t thread_count : {std::size_t{1}, std::size_t{2}}) {
    Contender copy = {.name = "raw_copy_" + std::to_string(thread_count), .run = [&, thread_count] {
                        return with_cpu_time([&] {
                          return raw::copy_seconds(one.slot().data(), memory.data(), image_bytes,
                                                   thread_count);
                        });
                      }};
    (thread_count == 1 ? calibrators : contenders).push_back(std::move(copy));
    for (Workload* workload : {&one, &many, &scattered}) {
      contenders.push_back(workload->capture(kernel, thread_count));
      contenders.push_back(workload->restore(kernel, thread_count));
    }
  }

  header_line("capture")
      .add("bytes", image_bytes)
      .add("pages", "2 MiB by madvise, touched before")
      .add("kernel", kernels::name(kernel))
      .add("checksum", "xxh3-64 by 4 KiB leaves, fused")
      .add("many", static_cast<std::uint64_t>(kTensorCount))
      .add("pinning", "one CPU per thread with two threads, none with one")
      .print();
  Rounds rounds({.valid_rounds = valid_rounds}, std::move(calibrators), std::move(contenders));
  const bool enough = rounds.run();
  for (const char* way : {"capture", "restore"}) {
    for (const char* threads : {"1", "2"}) {
      const double target_max = *threads == '1' ? 1.3 : 1.0;
      const std::string one_name = std::string(way) + "_one_" + threads;
      (void)rounds.summarise(one_name + "/raw_copy_1", one_name, "raw_copy_1", target_max);
      for (const char* layout : {"many", "scattered"}) {
        const std::string name = std::string(way) + "_" + layout + "_" + threads;
        (void)rounds.summarise(name + "/raw_copy_1", name, "raw_copy_1", target_max);
        (void)rounds.summarise(name + "/" + one_name, name, one_name, 1.15);
      }
    }
  }
  (void)rounds.summarise("capture_one_2/raw_copy_2", "capture_one_2", "raw_copy_2", 1.0);
  return enough ? 0 : 3;
}

}  // namespace
}  // namespace stillframe::bench

int main(int argc, char** argv) {
  std::size_t mib = 1024;
  std::size_t valid_rounds = 7;
  std::string_view kernel;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view flag = argv[i];
    if (flag == "--mib") mib = std::strtoul(argv[i + 1], nullptr, 10);
    if (flag == "--rounds") valid_rounds = std::strtoul(argv[i + 1], nullptr, 10);
    if (flag == "--kernel") kernel = argv[i + 1];
  }
  return stillframe::bench::run(std::max<std::size_t>(mib, 1) << 20,
                                std::max<std::size_t>(valid_rounds, 1), kernel);
}
