#include "catalog/run_lock.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>

#include "tests/catalog/catalog_test.h"

namespace stillframe::catalog {
namespace {

// A process that holds the lock of a run until it is killed.
class Holder {
 public:
  explicit Holder(const std::string& run_path) {
    int ready[2];
    check(::pipe(ready) == 0, "a test can make a pipe");
    pid_ = ::fork();
    check(pid_ >= 0, "a test can fork");
    if (pid_ == 0) {
      auto lock = RunLock::acquire(run_path, 7);
      const char word = lock ? 'y' : 'n';
      (void)!::write(ready[1], &word, 1);
      for (;;) ::pause();
    }
    (void)::close(ready[1]);
    char word = 'n';
    check(::read(ready[0], &word, 1) == 1, "the child says whether it has the lock");
    has_lock_ = word == 'y';
    (void)::close(ready[0]);
  }
  ~Holder() {
    if (pid_ > 0) kill();
  }
  void kill() {
    (void)::kill(pid_, SIGKILL);
    (void)::waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }
  bool has_lock() const { return has_lock_; }
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = 0;
  bool has_lock_ = false;
};

class Lock : public testing::Test {
 protected:
  void SetUp() override {
    run_ = directory_.path() + "/run";
    std::filesystem::create_directories(run_ + "/.stillframe");
  }
  TemporaryDirectory directory_;
  std::string run_;
};

TEST_F(Lock, a_second_process_is_refused_and_told_who_holds_it) {
  const Holder holder(run_);
  ASSERT_TRUE(holder.has_lock());
  auto second = RunLock::acquire(run_, 8);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code(), Code::kUnavailable);
  EXPECT_NE(second.error().message().find(concat("process ", holder.pid())), std::string_view::npos)
      << second.error().message();
}

TEST_F(Lock, is_free_right_after_its_holder_was_killed) {
  for (int i = 0; i < 20; ++i) {
    Holder holder(run_);
    ASSERT_TRUE(holder.has_lock());
    ASSERT_FALSE(RunLock::acquire(run_, 8));
    holder.kill();
    ASSERT_OK(RunLock::acquire(run_, 8));
  }
}

TEST_F(Lock, a_second_owner_in_the_same_process_is_refused) {
  auto first = RunLock::acquire(run_, 1);
  ASSERT_OK(first);
  EXPECT_FALSE(RunLock::acquire(run_, 2));
}

TEST_F(Lock, opening_and_closing_the_file_does_not_drop_it) {
  auto first = RunLock::acquire(run_, 1);
  ASSERT_OK(first);
  (void)read_file(run_ + "/.stillframe/lock");
  EXPECT_FALSE(RunLock::acquire(run_, 2));
}

TEST_F(Lock, ends_with_its_object) {
  {
    auto first = RunLock::acquire(run_, 1);
    ASSERT_OK(first);
  }
  EXPECT_OK(RunLock::acquire(run_, 2));
}

TEST_F(Lock, holds_pid_and_nonce_as_text) {
  auto lock = RunLock::acquire(run_, 0xabcdef);
  ASSERT_OK(lock);
  EXPECT_EQ(read_file(run_ + "/.stillframe/lock"), concat(::getpid(), " 0000000000abcdef\n"));
}

TEST_F(Lock, a_planted_link_or_directory_is_refused) {
  std::filesystem::create_symlink(directory_.path() + "/victim", run_ + "/.stillframe/lock");
  EXPECT_FALSE(RunLock::acquire(run_, 1));
  EXPECT_FALSE(exists(directory_.path() + "/victim"));
  std::filesystem::remove(run_ + "/.stillframe/lock");
  std::filesystem::create_directory(run_ + "/.stillframe/lock");
  EXPECT_FALSE(RunLock::acquire(run_, 1));
}

TEST_F(Lock, needs_a_run) {
  auto lock = RunLock::acquire(directory_.path() + "/nowhere", 1);
  ASSERT_FALSE(lock);
  EXPECT_EQ(lock.error().code(), Code::kNotFound);
}

using Kind = FilesystemVerdict::Kind;

TEST(Filesystem, local_ones_are_durable_layers_are_warned_of_and_networks_refused) {
  EXPECT_EQ(judge_filesystem_magic(0xEF53).kind, Kind::kDurable);
  EXPECT_EQ(judge_filesystem_magic(0x58465342).name, "xfs");
  EXPECT_EQ(judge_filesystem_magic(0x9123683E).kind, Kind::kDurable);
  EXPECT_EQ(judge_filesystem_magic(0x794C7630).kind, Kind::kWarned);
  EXPECT_EQ(judge_filesystem_magic(0x01021994).name, "tmpfs");
  EXPECT_EQ(judge_filesystem_magic(0x65735546).kind, Kind::kWarned);
  EXPECT_EQ(judge_filesystem_magic(0x6969).kind, Kind::kRefused);
  EXPECT_EQ(judge_filesystem_magic(0xFF534D42).name, "cifs");
  EXPECT_EQ(judge_filesystem_magic(0x0BD00BD0).kind, Kind::kRefused);
}

TEST(Filesystem, an_unknown_one_is_warned_of_by_its_number) {
  const FilesystemVerdict verdict = judge_filesystem_magic(0x12345);
  EXPECT_EQ(verdict.kind, Kind::kWarned);
  EXPECT_NE(verdict.name.find("74565"), std::string::npos);
}

TEST(Filesystem, a_path_that_is_yet_to_be_made_is_judged_by_its_parent) {
  auto there = judge_filesystem("/proc");
  auto below = judge_filesystem("/proc/no/such/run");
  ASSERT_OK(there);
  ASSERT_OK(below);
  EXPECT_EQ(there->name, below->name);
  EXPECT_OK(judge_filesystem("relative/and/absent"));
}

}  // namespace
}  // namespace stillframe::catalog
