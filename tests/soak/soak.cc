// Trainers that save, are killed and start again, over one daemon that is killed now and then, for
// as long as asked; afterwards nothing may be lost, left behind or grown.
//
//   soak MINUTES SEED TRAINERS DIRECTORY
//
// Prints a table and ends with 1 if anything is wrong. scripts/soak builds and runs it.
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/unique_fd.h"
#include "tests/oracle/run_oracle.h"
#include "tests/support/process_facts.h"
#include "tests/support/trainer.h"

extern char** environ;  // NOLINT: POSIX has no header for it.

namespace stillframe::testing {
namespace {

using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

constexpr std::uint32_t kKeepLast = 2;  // As client_crash_trainer asks for.
// Two checkpoints, one being written, their spool: of 2.7 MB each.
constexpr std::uint64_t kRunBytesMax = std::uint64_t{40} << 20;
constexpr std::int64_t kGrowthKibMax = 8 * 1024;

// The daemon that everybody uses; killed and started again by one thread.
class SharedDaemon {
 public:
  explicit SharedDaemon(std::string socket_path) : socket_path_(std::move(socket_path)) {}
  bool start() {
    const std::lock_guard lock(mutex_);
    daemon_ = std::make_unique<DaemonProcess>(socket_path_);
    return daemon_->wait_listening();
  }
  void kill() {
    const std::lock_guard lock(mutex_);
    daemon_->kill_now();
  }
  int stop() {
    const std::lock_guard lock(mutex_);
    return daemon_->stop();
  }
  pid_t pid() {
    const std::lock_guard lock(mutex_);
    return daemon_->pid();
  }
  const std::string& socket_path() const noexcept { return socket_path_; }

 private:
  const std::string socket_path_;
  std::mutex mutex_;
  std::unique_ptr<DaemonProcess> daemon_;
};

std::uint64_t bytes_below(const std::string& path) {
  std::uint64_t bytes = 0;
  std::error_code ignored;
  for (auto entry = fs::recursive_directory_iterator(path, ignored);
       entry != fs::recursive_directory_iterator(); entry.increment(ignored)) {
    if (ignored) break;
    if (entry->is_regular_file(ignored)) bytes += entry->file_size(ignored);
  }
  return bytes;
}

// One run and the trainers that write it, one after the other.
class RunUnderTest {
 public:
  RunUnderTest(std::string path, SharedDaemon& daemon, std::uint64_t seed)
      : path_(std::move(path)), daemon_(daemon), random_(seed) {}

  void work(Clock::time_point end) {
    while (Clock::now() < end) {
      train_until_killed();
      judge_beside(RunOracle::Retention::kMayLag);
      most_bytes_ = std::max(most_bytes_, bytes_below(path_));
    }
  }

  // In good order: whatever was kept for a restart of the trainer is given back.
  void finish() {
    Trainer trainer(path_, daemon_.socket_path(), kKeepLast);
    const std::int64_t step = oracle_.newest_begun() + 1;
    oracle_.began(step);
    if (trainer.attach() != SF_OK || trainer.save_durable(step) != SF_OK ||
        trainer.close() != SF_OK) {
      complain(std::string("the last save: ") + trainer.error().message);
      return;
    }
    oracle_.acknowledged(step);
  }
  void judge_settled() { judge_once(RunOracle::Retention::kSettled, complaints_); }

  const RunOracle& oracle() const noexcept { return oracle_; }
  const std::vector<std::string>& complaints() const noexcept { return complaints_; }
  std::uint64_t most_bytes() const noexcept { return most_bytes_; }
  std::uint64_t kill_count() const noexcept { return kill_count_; }
  std::uint64_t judged_count() const noexcept { return judged_count_; }

 private:
  void complain(const std::string& what) { complaints_.push_back(path_ + ": " + what); }

  void train_until_killed() {
    int ends[2] = {-1, -1};
    if (::pipe2(ends, O_CLOEXEC) != 0) return complain("no pipe");
    const UniqueFd output(ends[0]);
    UniqueFd input(ends[1]);
    posix_spawn_file_actions_t actions;
    (void)::posix_spawn_file_actions_init(&actions);
    (void)::posix_spawn_file_actions_adddup2(&actions, input.get(), 1);
    (void)::posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
    std::vector<std::string> words = {STILLFRAME_CRASH_TRAINER, path_, daemon_.socket_path(),
                                      std::to_string(oracle_.newest_begun() + 1), "1000000000"};
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    pid_t pid = 0;
    const int spawned = ::posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), environ);
    (void)::posix_spawn_file_actions_destroy(&actions);
    if (spawned != 0) return complain("the trainer did not start");
    input = UniqueFd();
    const int life_ms = std::uniform_int_distribution<int>(5, 600)(random_);
    const auto death = Clock::now() + std::chrono::milliseconds(life_ms);
    std::string text;
    bool is_killed = false;
    for (;;) {
      const auto rest = std::chrono::ceil<std::chrono::milliseconds>(death - Clock::now()).count();
      pollfd readable{.fd = output.get(), .events = POLLIN, .revents = 0};
      const int wait_ms = is_killed ? -1 : static_cast<int>(std::max<std::int64_t>(rest, 0));
      if (::poll(&readable, 1, wait_ms) == 0) {
        (void)::kill(pid, SIGKILL);
        is_killed = true;
        ++kill_count_;
        continue;
      }
      char buffer[4096];
      const ssize_t count = ::read(output.get(), buffer, sizeof buffer);
      if (count <= 0) break;
      text.append(buffer, static_cast<std::size_t>(count));
    }
    (void)::waitpid(pid, nullptr, 0);
    read_words(text);
  }

  void read_words(const std::string& text) {
    std::size_t at = 0;
    for (std::size_t end = text.find('\n'); end != text.npos; end = text.find('\n', at)) {
      const std::string line = text.substr(at, end - at);
      at = end + 1;
      const std::size_t space = line.find(' ');
      if (!oracle_.note(line.substr(0, space), std::stoll(line.substr(space + 1)))) {
        complain("a trainer says " + line);
      }
    }
  }

  // The daemon may still be writing, retiring or recovering; what is wrong stays wrong.
  void judge_beside(RunOracle::Retention retention) {
    std::vector<std::string> complaints;
    for (int i = 0; i < 50; ++i) {
      complaints.clear();
      judge_once(retention, complaints);
      if (complaints.empty()) break;
      (void)::usleep(100'000);
    }
    complaints_.insert(complaints_.end(), complaints.begin(), complaints.end());
    ++judged_count_;
  }

  void judge_once(RunOracle::Retention retention, std::vector<std::string>& complaints) {
    const Verdict verdict = judge(path_);
    for (const std::string& complaint : verdict.complaints) {
      complaints.push_back(path_ + ": " + complaint);
    }
    if (retention == RunOracle::Retention::kSettled) {
      for (const std::string& name : verdict.leftovers) {
        complaints.push_back(path_ + ": left behind: " + name);
      }
    }
    for (const std::string& complaint : oracle_.judge(verdict.steps, retention)) {
      complaints.push_back(path_ + ": " + complaint);
    }
  }

  const std::string path_;
  SharedDaemon& daemon_;
  std::mt19937_64 random_;
  RunOracle oracle_{kKeepLast};
  std::vector<std::string> complaints_;
  std::uint64_t most_bytes_ = 0;
  std::uint64_t kill_count_ = 0;
  std::uint64_t judged_count_ = 0;
};

// Own memory of a daemon that nobody kills, at the begin and at the end of its time.
struct Growth {
  std::int64_t first_kib = 0;
  std::int64_t last_kib = 0;
};

Growth watch_memory(SharedDaemon& daemon, Clock::time_point end) {
  std::vector<std::int64_t> samples;
  while (Clock::now() < end) {
    samples.push_back(own_memory_kib(daemon.pid()));
    (void)::usleep(200'000);
  }
  if (samples.size() < 8) return {};
  // The first quarter warms up: pools, arenas' bookkeeping, the allocator.
  const auto median = [](std::vector<std::int64_t> some) {
    std::nth_element(some.begin(), some.begin() + static_cast<std::ptrdiff_t>(some.size() / 2),
                     some.end());
    return some[some.size() / 2];
  };
  const auto quarter = static_cast<std::ptrdiff_t>(samples.size() / 4);
  return {.first_kib = median({samples.begin() + quarter, samples.begin() + 2 * quarter}),
          .last_kib = median({samples.end() - quarter, samples.end()})};
}

int soak(double minutes, std::uint64_t seed, int trainer_count, const std::string& directory) {
  std::printf("seed %lu, %d trainers, %.1f minutes, in %s\n", static_cast<unsigned long>(seed),
              trainer_count, minutes, directory.c_str());
  std::vector<std::string> complaints;
  SharedDaemon daemon(directory + "/socket");
  if (!daemon.start()) {
    std::fprintf(stderr, "the daemon does not start\n");
    return 1;
  }
  std::mt19937_64 random(seed);
  const auto begin = Clock::now();
  const auto length = std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double, std::ratio<60>>(minutes));
  const auto end = begin + length;
  std::vector<std::unique_ptr<RunUnderTest>> runs;
  std::vector<std::thread> threads;
  for (int i = 0; i < trainer_count; ++i) {
    runs.push_back(
        std::make_unique<RunUnderTest>(directory + "/run" + std::to_string(i), daemon, random()));
    threads.emplace_back([&run = *runs.back(), end] { run.work(end); });
  }
  // Two thirds of the time the daemon dies too, and then no more, so that its growth shows.
  int daemon_kill_count = 0;
  std::uniform_int_distribution<int> life_ms(200, 3000);
  while (Clock::now() + std::chrono::seconds(3) < begin + 2 * length / 3) {
    (void)::usleep(static_cast<useconds_t>(1000 * life_ms(random)));
    daemon.kill();
    ++daemon_kill_count;
    if (!daemon.start()) complaints.emplace_back("the daemon did not start again");
  }
  const Growth growth = watch_memory(daemon, end);
  for (std::thread& thread : threads) thread.join();

  for (const auto& run : runs) run->finish();
  // One that has served and has nothing left to serve, against a fresh one.
  std::size_t descriptors = 0;
  const std::size_t fresh_descriptors = [&] {
    SharedDaemon fresh(directory + "/fresh");
    if (!fresh.start()) return std::size_t{0};
    const std::size_t count = descriptor_count(fresh.pid());
    (void)fresh.stop();
    return count;
  }();
  for (int i = 0; i < 100; ++i) {
    descriptors = descriptor_count(daemon.pid());
    if (descriptors <= fresh_descriptors) break;
    (void)::usleep(100'000);
  }
  if (descriptors > fresh_descriptors) {
    complaints.push_back(std::to_string(descriptors) + " descriptors are open, of a fresh daemon " +
                         std::to_string(fresh_descriptors));
  }
  if (growth.last_kib - growth.first_kib > kGrowthKibMax) {
    complaints.push_back("the daemon grew from " + std::to_string(growth.first_kib) + " to " +
                         std::to_string(growth.last_kib) + " KiB");
  }
  if (daemon.stop() != 0) complaints.emplace_back("the daemon did not end in good order");

  std::uint64_t begun = 0;
  std::uint64_t kills = 0;
  std::uint64_t judged = 0;
  std::uint64_t most_bytes = 0;
  for (const auto& run : runs) {
    run->judge_settled();
    complaints.insert(complaints.end(), run->complaints().begin(), run->complaints().end());
    begun += run->oracle().acknowledged_count();
    kills += run->kill_count();
    judged += run->judged_count();
    most_bytes = std::max(most_bytes, run->most_bytes());
  }
  if (most_bytes > kRunBytesMax) {
    complaints.push_back("a run took " + std::to_string(most_bytes) + " bytes");
  }
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("run") && !name.ends_with(".lock") && !name.ends_with(".log")) {
      complaints.push_back("left behind: " + name);
    }
  }
  if (begun == 0 || judged == 0) complaints.emplace_back("nothing was saved");
  std::printf(
      "| saves durable | trainers killed | daemons killed | directories judged | "
      "daemon's own memory, KiB | descriptors | largest run, bytes | wrong |\n"
      "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
      "| %lu | %lu | %d | %lu | %ld to %ld | %zu of %zu | %lu | %zu |\n",
      static_cast<unsigned long>(begun), static_cast<unsigned long>(kills), daemon_kill_count,
      static_cast<unsigned long>(judged), static_cast<long>(growth.first_kib),
      static_cast<long>(growth.last_kib), descriptors, fresh_descriptors,
      static_cast<unsigned long>(most_bytes), complaints.size());
  for (const std::string& complaint : complaints) std::printf("WRONG %s\n", complaint.c_str());
  return complaints.empty() ? 0 : 1;
}

}  // namespace
}  // namespace stillframe::testing

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "soak MINUTES SEED TRAINERS DIRECTORY\n");
    return 2;
  }
  return stillframe::testing::soak(std::atof(argv[1]), std::strtoull(argv[2], nullptr, 10),
                                   std::atoi(argv[3]), argv[4]);
}
