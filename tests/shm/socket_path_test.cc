#include "shm/socket_path.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <optional>

#include "tests/shm/temporary_directory.h"

namespace stillframe::shm {
namespace {

// Sets a variable of the environment and puts the old value back.
class Variable {
 public:
  Variable(const char* name, const std::string& value) : Variable(name) {
    (void)::setenv(name, value.c_str(), 1);
  }
  explicit Variable(const char* name) : name_(name) {
    if (const char* const old = std::getenv(name); old != nullptr) old_ = old;
    (void)::unsetenv(name);
  }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;
  ~Variable() {
    if (old_) {
      (void)::setenv(name_, old_->c_str(), 1);
    } else {
      (void)::unsetenv(name_);
    }
  }

 private:
  const char* name_;
  std::optional<std::string> old_;
};

// A user with a runtime directory and no wish for a certain daemon.
class SocketDirectory : public testing::Test {
 protected:
  static Code Refusal() {
    const auto path = private_socket_directory();
    EXPECT_FALSE(path);
    return path ? Code::kInternal : path.error().code();
  }
  static mode_t ModeOf(const std::string& path) {
    struct stat status = {};
    EXPECT_EQ(::lstat(path.c_str(), &status), 0);
    return status.st_mode & 07777U;
  }

  const TemporaryDirectory runtime_;
  const std::string path_ = runtime_ / "stillframe";
  const Variable runtime_variable_{"XDG_RUNTIME_DIR", runtime_.path()};
  const Variable socket_variable_{kSocketVariable};
};

TEST_F(SocketDirectory, is_made_for_its_owner_alone) {
  const mode_t old = ::umask(0);
  const auto path = private_socket_directory();
  (void)::umask(old);
  ASSERT_TRUE(path) << path.error().message();
  EXPECT_EQ(*path, path_);
  EXPECT_EQ(ModeOf(path_), 0700U);
  EXPECT_EQ(*private_socket_directory(), path_) << "again";
}

TEST_F(SocketDirectory, open_to_others_is_refused) {
  ASSERT_EQ(::mkdir(path_.c_str(), 0700), 0);
  for (const mode_t mode : {0701U, 0710U, 0720U, 0755U, 0777U, 01777U}) {
    ASSERT_EQ(::chmod(path_.c_str(), mode), 0);
    EXPECT_EQ(Refusal(), Code::kInvalidArgument) << mode;
  }
}

TEST_F(SocketDirectory, of_another_user_is_refused) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a directory away";
  ASSERT_EQ(::mkdir(path_.c_str(), 0700), 0);
  ASSERT_EQ(::chown(path_.c_str(), 65534, 65534), 0);
  EXPECT_EQ(Refusal(), Code::kInvalidArgument);
}

TEST_F(SocketDirectory, that_is_a_link_is_refused) {
  const TemporaryDirectory elsewhere;
  ASSERT_EQ(::symlink(elsewhere.path().c_str(), path_.c_str()), 0);
  EXPECT_EQ(Refusal(), Code::kInvalidArgument);
}

TEST_F(SocketDirectory, that_is_a_file_or_a_pipe_is_refused) {
  std::ofstream(path_) << "x";
  ASSERT_EQ(::chmod(path_.c_str(), 0600), 0);
  EXPECT_EQ(Refusal(), Code::kInvalidArgument);
  ASSERT_EQ(::unlink(path_.c_str()), 0);
  ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
  EXPECT_EQ(Refusal(), Code::kInvalidArgument);
}

TEST_F(SocketDirectory, is_elsewhere_when_the_runtime_directory_is_not_ours) {
  const auto expect_elsewhere = [this] {
    const auto path = private_socket_directory();
    // Either one of the fixed places or, where that cannot be had, an error.
    if (path) {
      EXPECT_NE(*path, path_);
      EXPECT_TRUE(path->ends_with("/stillframe-" + std::to_string(::geteuid()))) << *path;
      (void)::rmdir(path->c_str());  // Only when it is empty.
    }
  };
  for (const std::string& runtime :
       {runtime_ / "missing", std::string("relative"), std::string()}) {
    const Variable variable("XDG_RUNTIME_DIR", runtime);
    expect_elsewhere();
  }
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(runtime_.path().c_str(), 65534, 65534), 0);
    expect_elsewhere();
  }
}

TEST(SocketNames, carry_the_protocols_version_and_the_build) {
  EXPECT_TRUE(socket_file_name().starts_with("stillframed-p1-"));
  EXPECT_TRUE(socket_file_name().ends_with(".sock"));
  const std::string stem = socket_file_name().substr(0, socket_file_name().size() - 5);
  EXPECT_EQ(lock_file_name(), stem + ".lock");
  EXPECT_EQ(log_file_name(), stem + ".log");
  const std::string build_id = stem.substr(std::string("stillframed-p1-").size());
  EXPECT_EQ(build_id.size(), 12U);
  EXPECT_EQ(build_id.find_first_not_of("0123456789abcdef"), std::string::npos) << build_id;
}

TEST_F(SocketDirectory, is_not_asked_for_when_a_socket_is_named) {
  const Variable variable(kSocketVariable, "/somewhere/else.sock");
  const auto candidates = socket_candidates();
  ASSERT_TRUE(candidates);
  EXPECT_EQ(candidates->paths, std::vector<std::string>{"/somewhere/else.sock"});
  EXPECT_FALSE(candidates->may_start);
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(SocketDirectory, is_the_last_place_to_look_and_a_daemon_may_start_there) {
  for (const bool is_empty_variable : {false, true}) {
    std::optional<Variable> variable;
    if (is_empty_variable) variable.emplace(kSocketVariable, "");
    const auto candidates = socket_candidates();
    ASSERT_TRUE(candidates) << candidates.error().message();
    ASSERT_FALSE(candidates->paths.empty());
    EXPECT_EQ(candidates->paths.back(), path_ + "/" + socket_file_name());
    EXPECT_TRUE(candidates->may_start);
    if (candidates->paths.size() == 2) {
      EXPECT_EQ(candidates->paths[0], kSystemSocket) << "a service runs on this machine";
    }
  }
}

TEST_F(SocketDirectory, that_is_not_safe_is_said_when_there_is_no_other_place) {
  if (std::filesystem::exists(kSystemSocket)) GTEST_SKIP() << "a service runs on this machine";
  ASSERT_EQ(::mkdir(path_.c_str(), 0777), 0);
  ASSERT_EQ(::chmod(path_.c_str(), 0777), 0);
  const auto candidates = socket_candidates();
  ASSERT_FALSE(candidates);
  EXPECT_EQ(candidates.error().code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace stillframe::shm
