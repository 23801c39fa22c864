// Clients that come in crowds, fall silent, freeze, or change the memory that they share: a good
// trainer beside them is served as before, and what they held is given back (F15 to F18).
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/rng.h"
#include "base/unique_fd.h"
#include "shm/sealed_memory.h"
#include "tests/daemon/hostile_client.h"
#include "tests/support/freezer.h"
#include "tests/support/process_facts.h"

namespace stillframe::testing {
namespace {

constexpr int kPatienceMs = 20'000;
constexpr uid_t kNobody = 65'534;
constexpr std::size_t kDescriptorsPerRunMax = 8;

class HostileCrowd : public HostileClient {
 protected:
  std::size_t descriptor_count() const {
    return stillframe::testing::descriptor_count(daemon_->pid());
  }
  std::size_t mapping_count() const {
    std::ifstream maps("/proc/" + std::to_string(daemon_->pid()) + "/maps");
    std::size_t count = 0;
    for (std::string line; std::getline(maps, line);) count += line.find("memfd") != line.npos;
    return count;
  }
  std::int64_t own_memory_kib() const {
    return stillframe::testing::own_memory_kib(daemon_->pid());
  }
  // The daemon notices the end of a client when it does.
  void expect_given_back(std::size_t descriptors, std::size_t mappings) const {
    for (int i = 0; i < kPatienceMs / 10; ++i) {
      if (descriptor_count() <= descriptors && mapping_count() <= mappings) return;
      (void)::usleep(10'000);
    }
    EXPECT_LE(descriptor_count(), descriptors) << "descriptors were kept";
    EXPECT_LE(mapping_count(), mappings) << "shared memory was kept";
  }
  // An attached one whose run is its own.
  std::unique_ptr<Peer> attached_as(int number) {
    auto peer = connected();
    EXPECT_TRUE(peer->hello());
    EXPECT_TRUE(peer->attach(scratch_.path("bad" + std::to_string(number))));
    return peer;
  }
  // The median time that the good trainer spends in one save(), durations of the disk left out.
  std::chrono::microseconds median_save_time(std::int64_t first) {
    constexpr int kSaveCount = 21;
    std::vector<std::chrono::microseconds> times;
    for (int i = 0; i < kSaveCount; ++i) {
      std::uint64_t ticket = 0;
      good_->state().fill(first + i);
      const auto begin = std::chrono::steady_clock::now();
      EXPECT_EQ(good_->begin_save(first + i, &ticket, kPatienceMs), SF_OK)
          << good_->error().message;
      times.push_back(std::chrono::duration_cast<std::chrono::microseconds>(
          std::chrono::steady_clock::now() - begin));
      sf_error error{};
      EXPECT_EQ(sf_ticket_wait(good_->session(), ticket, SF_DURABLE, 20'000, &error), SF_OK)
          << error.message;
    }
    std::nth_element(times.begin(), times.begin() + kSaveCount / 2, times.end());
    return times[kSaveCount / 2];
  }
  void save_beside(std::int64_t first, std::int64_t last) {
    for (std::int64_t step = first; step <= last; ++step) {
      ASSERT_EQ(good_->save_durable(step), SF_OK) << step << ": " << good_->error().message;
    }
  }
  void expect_others_are_served() {
    save_beside(2, 12);
    char* json = nullptr;
    sf_error error{};
    EXPECT_EQ(sf_daemon_status(scratch_.path("socket").c_str(), &json, &error), SF_OK)
        << error.message;
    sf_free(json);
  }
  // Where a run or a place among the daemon's clients is about to become free.
  void expect_served(const std::string& run, std::int64_t step) {
    Trainer trainer(scratch_.path(run), scratch_.path("socket"), 1);
    int attached = SF_UNAVAILABLE;
    for (int i = 0; i < kPatienceMs / 50 && attached != SF_OK; ++i) {
      attached = trainer.attach();
      if (attached != SF_OK) (void)::usleep(50'000);
    }
    ASSERT_EQ(attached, SF_OK) << trainer.error().message;
    EXPECT_EQ(trainer.save_durable(step), SF_OK) << trainer.error().message;
  }
};

TEST_F(HostileCrowd, that_floods_with_descriptors_is_dropped_and_they_are_closed) {
  ASSERT_EQ(good_->save_durable(1), SF_OK);
  const std::size_t descriptors = descriptor_count();
  const std::size_t mappings = mapping_count();
  const UniqueFd null(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  for (int i = 0; i < 20; ++i) {
    const UniqueFd socket = connect_raw();
    ASSERT_TRUE(socket);
    constexpr std::size_t kFdCount = 253;  // The kernel's limit for one message.
    const std::vector<int> fds(kFdCount, null.get());
    std::vector<char> control(CMSG_SPACE(kFdCount * sizeof(int)));
    char byte = 'x';
    iovec part{.iov_base = &byte, .iov_len = 1};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = control.size();
    cmsghdr* const rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(kFdCount * sizeof(int));
    std::memcpy(CMSG_DATA(rights), fds.data(), kFdCount * sizeof(int));
    ASSERT_EQ(::sendmsg(socket.get(), &header, MSG_NOSIGNAL), 1);
    EXPECT_EQ(::recv(socket.get(), &byte, 1, 0), 0) << "not dropped";
  }
  expect_given_back(descriptors, mappings);
}

TEST_F(HostileCrowd, of_silent_connections_makes_room_after_a_while) {
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 100; ++i) silent.push_back(connect_raw());
  save_beside(1, 3);
  // As many as the daemon serves are taken by those that say nothing, until it has enough of them.
  expect_served("late", 1);
}

TEST_F(HostileCrowd, in_every_state_beside_a_good_trainer_costs_it_no_save) {
  ASSERT_EQ(good_->save_durable(1), SF_OK);
  const std::size_t descriptors = descriptor_count();
  std::chrono::microseconds beside_idle{};
  {
    std::vector<std::unique_ptr<Peer>> idle;
    for (int i = 0; i < 60; ++i) {
      idle.push_back(connected());
      EXPECT_TRUE(idle.back()->hello());
    }
    beside_idle = median_save_time(2);
  }
  {
    std::vector<std::unique_ptr<Peer>> crowd;
    for (int i = 0; i < 60; ++i) {
      if (i % 10 == 0) save_beside(100 + i, 100 + i);
      if (HasFatalFailure()) return;
      auto peer = i % 5 < 2 ? connected() : attached_as(i);
      if (i % 5 == 1) {
        EXPECT_TRUE(peer->hello());
      } else if (i % 5 == 3) {
        // Captures, publishes a part of it, and falls silent.
        EXPECT_TRUE(peer->register_layout(2'500'000));
        EXPECT_TRUE(peer->begin_save());
        EXPECT_TRUE(peer->ring().publish(
            {.ticket = peer->ticket(), .part = 0, .extent = 1, .hash = 1, .reserved = 0}));
      } else if (i % 5 == 4) {
        EXPECT_TRUE(peer->register_layout(2'500'000));
        EXPECT_TRUE(peer->begin_save());
        peer->publish(1);
        peer->end_capture();
        const auto ended = peer->ended();
        EXPECT_TRUE(ended && ended->failure) << "wrong hashes were taken";
      }
      crowd.push_back(std::move(peer));
    }
    // More than the daemon serves.
    std::vector<UniqueFd> silent;
    for (int i = 0; i < 40; ++i) silent.push_back(connect_raw());
    const auto beside_hostile = median_save_time(200);
    std::printf("median save() beside 60 idle clients %ld us, beside 100 hostile ones %ld us\n",
                static_cast<long>(beside_idle.count()), static_cast<long>(beside_hostile.count()));
  }
  // What a dead trainer captured is kept a while for its successor; its connection is not.
  const std::size_t kept = descriptors + 60 * kDescriptorsPerRunMax;
  for (int i = 0; i < kPatienceMs / 10 && descriptor_count() > kept; ++i) (void)::usleep(10'000);
  EXPECT_LE(descriptor_count(), kept);
  save_beside(300, 302);
}

// Of one that lives a few milliseconds and dies in one of six states.
TEST_F(HostileCrowd, that_dies_again_and_again_leaves_nothing_behind) {
  constexpr int kRunCount = 6;
  constexpr int kWarmUpCount = 5 * kRunCount;
  [[maybe_unused]] constexpr std::int64_t kGrowthKibMax = 4 * 1024;
  const char* const wanted = std::getenv("STILLFRAME_DEATHS");
  const int death_count = wanted != nullptr ? std::atoi(wanted) : 200;
  ASSERT_EQ(good_->save_durable(1), SF_OK);

  const auto die_once = [this](int i) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      // Each state in each run, so that whatever is kept for a restart is kept from the start.
      const int state = (i + i / kRunCount) % 6;
      if (state == 0) {
        (void)connect_raw();
      } else {
        Peer peer(scratch_.path("socket"));
        (void)peer.hello();
        if (state > 1) (void)peer.attach(scratch_.path("dying" + std::to_string(i % kRunCount)));
        if (state > 2) (void)peer.register_layout(2'500'000);
        if (state > 3 && peer.begin_save()) {
          if (state == 4) {
            (void)peer.ring().publish(
                {.ticket = peer.ticket(), .part = 0, .extent = 1, .hash = 1, .reserved = 0});
          } else {
            peer.publish(0);
            peer.end_capture();
          }
        }
        (void)::raise(SIGKILL);
      }
      (void)::raise(SIGKILL);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "state of death " << i;
  };
  for (int i = 0; i < kWarmUpCount; ++i) die_once(i);
  ASSERT_EQ(good_->save_durable(2), SF_OK);
  const std::size_t descriptors = descriptor_count();
  const std::size_t mappings = mapping_count();
  const std::int64_t memory_kib = own_memory_kib();
  for (int i = 0; i < death_count; ++i) {
    die_once(i);
    if (HasFatalFailure()) return;
  }
  EXPECT_EQ(good_->save_durable(3), SF_OK) << good_->error().message;
  expect_given_back(descriptors, mappings);
  const std::int64_t grown_kib = own_memory_kib() - memory_kib;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT_LE(grown_kib, kGrowthKibMax);  // A sanitizer keeps what was freed, for a while.
#endif
  std::printf(
      "%d deaths: descriptors %zu to %zu, shared mappings %zu to %zu, own memory +%ld KiB\n",
      death_count, descriptors, descriptor_count(), mappings, mapping_count(),
      static_cast<long>(grown_kib));
}

// A trainer, one of whose captures has begun and does not end.
class CapturingTrainer {
 public:
  CapturingTrainer(const std::string& run_path, const std::string& socket_path) {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    const UniqueFd output(ends[0]);
    UniqueFd input(ends[1]);
    pid_ = ::fork();
    if (pid_ == 0) {
      // Only what it inherits of the daemon's and the trainer's matters; it leaves by a signal.
      Trainer trainer(run_path, socket_path, 1);
      if (trainer.attach() == SF_OK && trainer.save_durable(1) == SF_OK && begin(trainer) &&
          ::write(input.get(), "x", 1) == 1) {
        (void)::pause();
      }
      ::_exit(1);
    }
    EXPECT_GT(pid_, 0);
    input = UniqueFd();
    char byte = 0;
    has_begun_ = ::read(output.get(), &byte, 1) == 1;
  }
  ~CapturingTrainer() { kill_and_reap(); }
  CapturingTrainer(const CapturingTrainer&) = delete;
  CapturingTrainer& operator=(const CapturingTrainer&) = delete;

  bool has_begun() const noexcept { return has_begun_; }
  pid_t pid() const noexcept { return pid_; }
  void kill_and_reap() {
    if (pid_ <= 0) return;
    (void)::kill(pid_, SIGKILL);
    (void)::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  // Lazily, and it never says that it is through.
  static bool begin(Trainer& trainer) {
    sf_save_options options{};
    options.struct_bytes = sizeof options;
    options.capture = SF_CAPTURE_LAZY;
    options.step = 2;
    options.state_json = "{\"format_version\": 1}";
    options.state_bytes = std::strlen(options.state_json);
    const auto sources = trainer.state().sources(true);
    std::uint64_t ticket = 0;
    return sf_save_begin(trainer.session(), &options, sources.data(), sources.size(), &ticket,
                         nullptr) == SF_OK;
  }

  pid_t pid_ = -1;
  bool has_begun_ = false;
};

TEST_F(HostileCrowd, frozen_by_a_signal_in_its_capture_holds_up_nobody) {
  ASSERT_EQ(good_->save_durable(1), SF_OK);
  CapturingTrainer frozen(scratch_.path("frozen"), scratch_.path("socket"));
  ASSERT_TRUE(frozen.has_begun());
  ASSERT_EQ(::kill(frozen.pid(), SIGSTOP), 0);
  int status = 0;
  ASSERT_EQ(::waitpid(frozen.pid(), &status, WUNTRACED), frozen.pid());
  ASSERT_TRUE(WIFSTOPPED(status));
  expect_others_are_served();
  frozen.kill_and_reap();
  expect_served("frozen", 3);
}

TEST_F(HostileCrowd, frozen_by_the_freezer_in_its_capture_holds_up_nobody) {
  Freezer freezer;
  if (!freezer.missing().empty()) GTEST_SKIP() << freezer.missing();
  ASSERT_EQ(good_->save_durable(1), SF_OK);
  CapturingTrainer frozen(scratch_.path("frozen"), scratch_.path("socket"));
  ASSERT_TRUE(frozen.has_begun());
  ASSERT_TRUE(freezer.freeze(frozen.pid()));
  expect_others_are_served();
  // Before it is thawed, for it would not die in the freezer of every kernel.
  ASSERT_EQ(::kill(frozen.pid(), SIGKILL), 0);
  ASSERT_TRUE(freezer.thaw());
  frozen.kill_and_reap();
  expect_served("frozen", 3);
}

TEST_F(HostileCrowd, that_punches_holes_in_its_slot_gets_no_checkpoint) {
  auto peer = capturing();
  ASSERT_GE(peer->arena_fd(), 0);
  std::memset(peer->slot().data(), 7, peer->plan().bytes);
  // Its hashes are those of the bytes that it takes away afterwards.
  peer->publish(0);
  ASSERT_EQ(::fallocate(peer->arena_fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                        static_cast<off_t>(peer->slot().size())),
            0);
  EXPECT_NE(::ftruncate(peer->arena_fd(), 0), 0) << "the length is sealed";
  peer->end_capture();
  const auto ended = peer->ended();
  ASSERT_TRUE(ended);
  // Written before the hole was punched it is whole; never anything between.
  if (ended->failure == nullptr) {
    const Verdict verdict = judge(scratch_.path("bad"));
    EXPECT_TRUE(verdict.complaints.empty()) << verdict.complaints.front();
  }
}

TEST_F(HostileCrowd, whose_second_thread_scribbles_over_the_ring_harms_only_itself) {
  SystemRng rng;
  const std::uint64_t seed = rng.next();
  std::printf("seed %lu\n", static_cast<unsigned long>(seed));
  for (int round = 0; round < 10; ++round) {
    auto peer = attached_as(round);
    ASSERT_TRUE(peer->register_layout(2'500'000));
    ASSERT_TRUE(peer->begin_save());
    std::atomic<bool> is_over = false;
    std::thread scribbler([&] {
      std::uint64_t state = seed + static_cast<std::uint64_t>(round);
      struct stat status {};
      (void)::fstat(peer->ring_fd(), &status);
      const auto bytes = static_cast<std::size_t>(status.st_size);
      void* const memory =
          ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, peer->ring_fd(), 0);
      if (memory == MAP_FAILED) return;
      auto* const words = static_cast<volatile std::uint64_t*>(memory);
      while (!is_over) {
        state = state * 6'364'136'223'846'793'005U + 1'442'695'040'888'963'407U;
        // Small values are the dangerous ones: they look like counters and indices.
        words[(state >> 33U) % (bytes / 8)] = (state >> 20U) % 8;
      }
      (void)::munmap(memory, bytes);
    });
    for (std::uint32_t extent = 0; extent < 3; ++extent) {
      (void)peer->ring().publish(
          {.ticket = peer->ticket(), .part = 0, .extent = extent, .hash = 1, .reserved = 0});
      (void)::usleep(5'000);
    }
    EXPECT_EQ(good_->save_durable(round + 1), SF_OK) << good_->error().message;
    is_over = true;
    scribbler.join();
    ASSERT_TRUE(daemon_->is_alive());
  }
}

TEST_F(HostileCrowd, of_another_user_is_refused) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can become another user";
  const pid_t stranger = ::fork();
  ASSERT_GE(stranger, 0);
  if (stranger == 0) {
    // Its socket's directory is open to us both, so that the daemon has to tell us apart.
    if (::setgid(kNobody) != 0 || ::setuid(kNobody) != 0) ::_exit(2);
    const UniqueFd socket = connect_raw();
    if (!socket) ::_exit(0);  // Not even a way to it.
    char byte = 0;
    ::_exit(::recv(socket.get(), &byte, 1, 0) <= 0 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(stranger, &status, 0), stranger);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace stillframe::testing
