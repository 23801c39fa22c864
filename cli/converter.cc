#include "cli/converter.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <utility>

#include "base/os_error.h"
#include "base/text.h"
#include "base/unique_fd.h"

extern char** environ;

namespace stillframe::cli {

namespace {

constexpr int kScratchFd = 3;
constexpr std::size_t kAnswerBytesMax = std::size_t{1} << 30;

// As `python -m stillframe.convert`, but an interpreter without the package gets a better line than
// Python's own.
constexpr const char* kStart = R"(import sys
try:
    from stillframe.convert import main
except ModuleNotFoundError as error:
    sys.exit(f"stillframe: {sys.executable} has no module {error.name}; install stillframe for it, "
             "or set STILLFRAME_PYTHON to an interpreter that has it")
sys.exit(main(sys.argv[1:]))
)";

std::string interpreter() {
  const char* wish = std::getenv("STILLFRAME_PYTHON");
  return wish != nullptr && *wish != '\0' ? wish : "python3";
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> list;
  for (std::string& text : texts) list.push_back(text.data());
  list.push_back(nullptr);
  return list;
}

// Ours, and no modules from the working directory, which may hold a run called `torch`.
std::vector<std::string> environment() {
  std::vector<std::string> list;
  for (char** entry = environ; *entry != nullptr; ++entry) list.emplace_back(*entry);
  list.emplace_back("PYTHONSAFEPATH=1");
  return list;
}

Result<pid_t> start(const std::vector<std::string>& arguments, int out, int scratch_fd) {
  std::vector<std::string> words = {interpreter(), "-c", kStart};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<std::string> variables = environment();
  posix_spawn_file_actions_t actions;
  if (const int e = ::posix_spawn_file_actions_init(&actions); e != 0) {
    return os_error("prepare the converter", e);
  }
  int failed = ::posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
  if (failed == 0 && scratch_fd >= 0) {
    failed = ::posix_spawn_file_actions_adddup2(&actions, scratch_fd, kScratchFd);
  }
  pid_t pid = -1;
  if (failed == 0) {
    failed = ::posix_spawnp(&pid, words.front().c_str(), &actions, nullptr, pointers(words).data(),
                            pointers(variables).data());
  }
  ::posix_spawn_file_actions_destroy(&actions);
  if (failed == ENOENT) {
    return Error(Code::kNotFound,
                 concat("this format needs Python, and there is no ", words.front(),
                        "; set STILLFRAME_PYTHON to one that has "
                        "stillframe and torch"));
  }
  if (failed != 0) return os_error(concat("start ", words.front()), failed);
  return pid;
}

Status read_all(int fd, std::string& text) {
  std::array<char, 65536> piece{};
  for (;;) {
    const ssize_t count = ::read(fd, piece.data(), piece.size());
    if (count == 0) return ok();
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return os_error("read from the converter", errno);
    text.append(piece.data(), static_cast<std::size_t>(count));
    if (text.size() > kAnswerBytesMax) {
      return Error(Code::kInternal, "the converter says more than 1 GiB");
    }
  }
}

}  // namespace

Result<ConverterAnswer> run_converter(const std::vector<std::string>& arguments, int scratch_fd) {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return os_error("make a pipe", errno);
  const UniqueFd reader(ends[0]);
  UniqueFd writer(ends[1]);
  auto pid = start(arguments, writer.get(), scratch_fd);
  writer = UniqueFd();
  if (!pid) return std::move(pid).error();
  ConverterAnswer answer;
  auto read = read_all(reader.get(), answer.out);
  int status = 0;
  while (::waitpid(*pid, &status, 0) < 0) {
    if (errno != EINTR) return os_error("wait for the converter", errno);
  }
  if (!read) return std::move(read).error();
  if (WIFSIGNALED(status)) {
    return Error(Code::kUnavailable, concat("the converter was ended by signal ", WTERMSIG(status),
                                            "; nothing was made"));
  }
  answer.exit_code = WEXITSTATUS(status);
  return answer;
}

}  // namespace stillframe::cli
