// Saving and restoring 1 GiB through the C ABI and a real daemon: one tensor, 20 000 tensors,
// against one big memcpy and the raw drive of the same round.
//
//   save_bench --path DIRECTORY --daemon STILLFRAMED [--mib N] [--rounds N]
//
// Prints JSON Lines: a header, a line per run, a summary per ratio, and the figures that are no
// ratio. Exit status 1 when a call fails or bytes differ, 3 when too few rounds were valid.
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "bench/raw/raw.h"
#include "bench/rounds.h"
#include "client/libstillframe.h"

namespace stillframe::bench {
namespace {

constexpr std::size_t kTensorCount = 20'000;
constexpr std::uint32_t kU8 = 1;

void expect(const char* doing, int code, const sf_error& error) {
  if (code == SF_OK) return;
  std::fprintf(stderr, "save_bench: %s: %d: %s\n", doing, code, error.message);
  std::exit(1);
}

// Log-normal sizes that add up to `bytes`.
std::vector<std::uint64_t> tensor_sizes(std::uint64_t bytes, std::size_t count) {
  if (count == 1) return {bytes};
  std::mt19937_64 random(7);
  std::lognormal_distribution<double> shape(0, 1.5);
  std::vector<double> weights(count);
  for (double& weight : weights) weight = std::clamp(shape(random), 0.005, 80.0);
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<std::uint64_t> sizes(count);
  std::uint64_t left = bytes;
  for (std::size_t i = 0; i < count; ++i) {
    sizes[i] =
        i + 1 == count
            ? left
            : static_cast<std::uint64_t>(weights[i] / sum * static_cast<double>(bytes)) / 4 * 4;
    left -= sizes[i];
  }
  return sizes;
}

double process_cpu_seconds(const std::string& pid) {
  std::ifstream file("/proc/" + pid + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  std::vector<std::string> words{std::istream_iterator<std::string>(fields), {}};
  return (std::stod(words[11]) + std::stod(words[12])) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

std::uint64_t status_kib(const std::string& pid, const std::string& name) {
  std::ifstream file("/proc/" + pid + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name + ":"))
      return std::strtoull(line.c_str() + name.size() + 1, nullptr, 10);
  }
  return 0;
}

// All threads of this process on one CPU while it lives: what a trainer has that may use no more.
class OneCpu {
 public:
  OneCpu() {
    if (::sched_getaffinity(0, sizeof before_, &before_) != 0) raw::die("sched_getaffinity");
    cpu_set_t one;
    CPU_ZERO(&one);
    for (std::size_t cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu) {
      if (CPU_ISSET(cpu, &before_)) CPU_SET(cpu, &one);
    }
    move_all(one);
  }
  ~OneCpu() { move_all(before_); }
  OneCpu(const OneCpu&) = delete;
  OneCpu& operator=(const OneCpu&) = delete;

 private:
  static void move_all(const cpu_set_t& cpus) {
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
      const auto thread = static_cast<pid_t>(std::stol(task.path().filename()));
      if (::sched_setaffinity(thread, sizeof cpus, &cpus) != 0) raw::die("sched_setaffinity");
    }
  }
  cpu_set_t before_;
};

// One run over one buffer cut into tensors.
class Workload {
 public:
  Workload(const std::string& directory, const std::string& daemon, std::string name,
           std::byte* memory, std::uint64_t bytes, std::size_t count)
      : name_(std::move(name)), run_path_(directory + "/" + name_), bytes_(bytes) {
    sizes_ = tensor_sizes(bytes, count);
    std::uint64_t offset = 0;
    for (std::size_t i = 0; i < sizes_.size(); ++i) {
      // Of one length, so that the image has them in this order too.
      names_.push_back("layer." + std::to_string(100'000 + i) + ".weight");
    }
    for (std::size_t i = 0; i < sizes_.size(); ++i) {
      tensors_.push_back(
          {.name = names_[i].c_str(), .shape = &sizes_[i], .dimension_count = 1, .dtype = kU8});
      sources_.push_back(
          {.data = memory + offset, .stride_bytes = nullptr, .lazy = 0, .memory = SF_MEMORY_HOST});
      targets_.push_back({.part_index = 0,
                          .name = names_[i].c_str(),
                          .data = memory + offset,
                          .bytes = sizes_[i],
                          .stride_bytes = nullptr,
                          .memory = SF_MEMORY_HOST,
                          .reserved = 0});
      offset += sizes_[i];
    }
    sf_attach_options options{};
    options.struct_bytes = sizeof options;
    options.world_size = 1;
    options.keep_last = 1;
    options.run_path = run_path_.c_str();
    options.daemon_path = daemon.c_str();
    options.timeout_ms = 30'000;
    sf_error error{};
    expect("attach", sf_attach(&options, &session_, &error), error);
    const sf_part part{.name = "model",
                       .tensors = tensors_.data(),
                       .tensor_count = tensors_.size(),
                       .metadata = nullptr,
                       .metadata_count = 0};
    expect("layout", sf_layout_register(session_, &part, 1, 60'000, &error), error);
    for (int i = 0; i < 4; ++i) (void)save();  // Arena, files and spool are warm.
  }
  ~Workload() { (void)sf_session_close(session_, 5'000, nullptr); }
  Workload(const Workload&) = delete;
  Workload& operator=(const Workload&) = delete;

  sf_ticket save() {
    const std::string state = "{\"format_version\": 1}";
    sf_save_options options{};
    options.struct_bytes = sizeof options;
    options.capture = SF_CAPTURE_EAGER;
    options.busy_timeout_ms = 30'000;
    options.step = ++step_;
    options.state_json = state.c_str();
    options.state_bytes = state.size();
    sf_error error{};
    std::uint64_t ticket = 0;
    expect("save",
           sf_save_begin(session_, &options, sources_.data(), sources_.size(), &ticket, &error),
           error);
    expect("durable", sf_ticket_wait(session_, ticket, SF_DURABLE, 60'000, &error), error);
    sf_ticket info{};
    info.struct_bytes = sizeof info;
    expect("ticket", sf_ticket_get(session_, ticket, &info, &error), error);
    return info;
  }

  // Seconds of the reading itself, and whether it came from the daemon's memory.
  double restore(bool from_memory) {
    sf_error error{};
    sf_checkpoint* checkpoint = nullptr;
    expect("open",
           sf_checkpoint_open(run_path_.c_str(), "latest", from_memory ? session_ : nullptr,
                              &checkpoint, &error),
           error);
    sf_read_stats stats{};
    stats.struct_bytes = sizeof stats;
    expect("read", sf_checkpoint_read(checkpoint, targets_.data(), targets_.size(), &stats, &error),
           error);
    sf_checkpoint_close(checkpoint);
    if ((stats.from_memory != 0) != from_memory) {
      std::fprintf(stderr, "save_bench: restored from the wrong place\n");
      std::exit(1);
    }
    return static_cast<double>(stats.duration_ns) / 1e9;
  }

  Contender capture() {
    return {.name = "capture_" + name_, .run = [this] {
              return Sample{.seconds = static_cast<double>(save().begin_call_ns) / 1e9,
                            .cpu_seconds = 0};
            }};
  }
  Contender capture_on_one_cpu() {
    return {.name = "capture_one_cpu_" + name_, .run = [this] {
              const OneCpu one_cpu;
              return Sample{.seconds = static_cast<double>(save().begin_call_ns) / 1e9,
                            .cpu_seconds = 0};
            }};
  }
  // From the end of the capture to DURABLE would leave out what was written meanwhile.
  Contender durable() {
    return {.name = "durable_" + name_, .run = [this] {
              const sf_ticket info = save();
              return Sample{.seconds = static_cast<double>(info.durable_ns - info.begin_ns) / 1e9,
                            .cpu_seconds = 0};
            }};
  }
  Contender restored(bool from_memory) {
    return {
        .name = (from_memory ? "restore_memory_" : "restore_disk_") + name_,
        .run = [this, from_memory] { return with_cpu_time([&] { return restore(from_memory); }); }};
  }

  // The only part of the newest checkpoint.
  std::string newest_part() const {
    std::string newest;
    for (const auto& entry : std::filesystem::directory_iterator(run_path_)) {
      const std::string path = entry.path() / "model.safetensors";
      if (entry.is_directory() && std::filesystem::exists(path)) newest = std::max(newest, path);
    }
    return newest;
  }

  std::string daemon_pid() {
    char* json = nullptr;
    sf_error error{};
    expect("status", sf_daemon_status(nullptr, &json, &error), error);
    const std::string text = json;
    sf_free(json);
    const std::size_t at = text.find("\"pid\":") + 6;
    return text.substr(at, text.find_first_of(",}", at) - at);
  }
  std::string describe() {
    char* json = nullptr;
    sf_error error{};
    expect("describe", sf_session_describe(session_, &json, &error), error);
    std::string text = json;
    sf_free(json);
    return text;
  }
  std::uint64_t bytes() const { return bytes_; }

 private:
  std::string name_;
  std::string run_path_;
  std::uint64_t bytes_;
  std::vector<std::uint64_t> sizes_;
  std::vector<std::string> names_;
  std::vector<sf_tensor> tensors_;
  std::vector<sf_source> sources_;
  std::vector<sf_target> targets_;
  sf_session* session_ = nullptr;
  std::int64_t step_ = 0;
};

int run(const std::string& directory, const std::string& daemon, std::uint64_t mib,
        std::size_t valid_rounds) {
  const std::uint64_t bytes = mib << 20;
  const raw::Memory memory(bytes);
  raw::Memory target(bytes, 2);
  // As long as the part of one tensor: its header takes one block.
  raw::Memory part_target(bytes + 4096, 3);
  Workload one(directory, daemon, "one", memory.data(), bytes, 1);
  Workload many(directory, daemon, "many", memory.data(), bytes, kTensorCount);
  const std::string raw_path = directory + "/raw";

  header_line("save").add("bytes", bytes).add_json("session", one.describe()).print();
  const auto raw_copy = [&] {
    return with_cpu_time([&] { return raw::copy_seconds(target.data(), memory.data(), bytes); });
  };
  const auto raw_write = [&] {
    return with_cpu_time(
        [&] { return raw::write_seconds(raw_path, memory, raw::FileState::kReused); });
  };
  // The very file that is restored: two files of one size may differ by 10 % on one drive.
  const auto raw_read = [&] {
    const std::string part = one.newest_part();
    return with_cpu_time([&] { return raw::read_seconds(part, part_target); });
  };
  (void)raw_write();
  Rounds rounds({.valid_rounds = valid_rounds}, {{.name = "raw_copy", .run = raw_copy}},
                {{.name = "raw_write", .run = raw_write},
                 one.capture(),
                 many.capture(),
                 one.capture_on_one_cpu(),
                 many.durable(),
                 one.durable(),
                 {.name = "raw_read", .run = raw_read},
                 one.restored(false),
                 many.restored(false),
                 one.restored(true),
                 many.restored(true)});
  const bool enough = rounds.run();
  (void)rounds.summarise("capture_one/raw_copy", "capture_one", "raw_copy", 1.0);
  (void)rounds.summarise("capture_one_cpu_one/raw_copy", "capture_one_cpu_one", "raw_copy", 1.3);
  (void)rounds.summarise("capture_many/capture_one", "capture_many", "capture_one", 1.15);
  (void)rounds.summarise("durable_one/raw_write", "durable_one", "raw_write", 1.3);
  (void)rounds.summarise("durable_many/durable_one", "durable_many", "durable_one", 1.15);
  (void)rounds.summarise("restore_disk_one/raw_read", "restore_disk_one", "raw_read", 1 / 0.90);
  (void)rounds.summarise("restore_disk_many/restore_disk_one", "restore_disk_many",
                         "restore_disk_one", 1.15);
  (void)rounds.summarise("restore_memory_one/raw_copy", "restore_memory_one", "raw_copy", 1 / 0.8);
  (void)rounds.summarise("restore_memory_many/restore_memory_one", "restore_memory_many",
                         "restore_memory_one", 1.15);

  const std::string daemon_pid = one.daemon_pid();
  const std::string self_pid = std::to_string(::getpid());
  const double before = process_cpu_seconds(self_pid) + process_cpu_seconds(daemon_pid);
  constexpr int kSaveCount = 4;
  for (int i = 0; i < kSaveCount; ++i) (void)one.save();
  const double spent = process_cpu_seconds(self_pid) + process_cpu_seconds(daemon_pid) - before;
  JsonLine()
      .add("figure", "cpu_seconds_per_gib")
      .add("value", spent / (kSaveCount * static_cast<double>(bytes) / (1 << 30)))
      .add("target_max", 0.40)
      .print();
  JsonLine()
      .add("figure", "daemon_mib_beyond_arena")
      .add("value", static_cast<double>(status_kib(daemon_pid, "RssAnon")) / 1024)
      .add("target_max", 64)
      .print();
  (void)::kill(static_cast<pid_t>(std::stol(daemon_pid)), SIGTERM);
  return enough ? 0 : 3;
}

}  // namespace
}  // namespace stillframe::bench

int main(int argc, char** argv) {
  std::string path;
  std::string daemon;
  std::uint64_t mib = 1024;
  std::size_t rounds = 5;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--path") path = argv[i + 1];
    if (name == "--daemon") daemon = argv[i + 1];
    if (name == "--mib") mib = std::strtoull(argv[i + 1], nullptr, 10);
    if (name == "--rounds") rounds = std::strtoull(argv[i + 1], nullptr, 10);
  }
  if (path.empty() || daemon.empty()) {
    std::fputs("usage: save_bench --path DIRECTORY --daemon STILLFRAMED [--mib N] [--rounds N]\n",
               stderr);
    return 2;
  }
  // A daemon of its own, so that nobody's is measured or ended.
  (void)::setenv("XDG_RUNTIME_DIR", path.c_str(), 1);
  return stillframe::bench::run(path, daemon, mib, rounds);
}
