// What this machine offers. Answers the commonest question: why is it not faster, or why not at
// all.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <atomic>
#include <boost/json.hpp>
#include <cerrno>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "base/os_error.h"
#include "base/text.h"
#include "base/unique_fd.h"
#include "catalog/run_lock.h"
#include "cli/commands.h"
#include "cli/daemon_call.h"
#include "cli/json.h"
#include "cli/text.h"
#include "cuda/devices.h"
#include "kernels/gpu_image.h"
#include "shm/arena.h"

namespace stillframe::cli {

namespace {

enum class Grade : std::uint8_t { kGood, kSlower, kBroken, kInfo };

struct Finding {
  std::string subject;
  Grade grade = Grade::kInfo;
  std::string fact;
  std::string advice{};  // The next step to take; empty when there is none.
};

constexpr std::string_view name(Grade grade) noexcept {
  switch (grade) {
    case Grade::kGood: return "ok";
    case Grade::kSlower: return "slower";
    case Grade::kBroken: return "broken";
    case Grade::kInfo: return "info";
  }
  return "unknown";
}

Finding look_at_system() {
  utsname system{};
  if (::uname(&system) != 0) return {.subject = "system", .grade = Grade::kInfo, .fact = "unknown"};
  return {.subject = "system",
          .grade = Grade::kInfo,
          .fact = concat(system.sysname, ' ', system.release, ", ", system.machine, ", ",
                         std::thread::hardware_concurrency(), " CPUs")};
}

Finding look_at_uring() {
  auto created = uring::create_backend({.choice = uring::BackendOptions::Choice::kUring});
  if (created) return {.subject = "io_uring", .grade = Grade::kGood, .fact = "available"};
  return {.subject = "io_uring",
          .grade = Grade::kSlower,
          .fact = concat(created.error().message(), "; the threads backend is used"),
          .advice =
              "allow io_uring in the container's seccomp profile, or in "
              "/proc/sys/kernel/io_uring_disabled"};
}

Finding look_at_memlock() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_max == RLIM_INFINITY) {
    return {.subject = "memlock", .grade = Grade::kGood, .fact = "unlimited"};
  }
  if (::geteuid() == 0) {
    return {.subject = "memlock",
            .grade = Grade::kInfo,
            .fact = concat(human_bytes(limit.rlim_max), ", which does not bind root")};
  }
  return {.subject = "memlock",
          .grade = Grade::kSlower,
          .fact = concat(human_bytes(limit.rlim_max), ": a larger arena cannot be registered"),
          .advice = "raise it (ulimit -l, limits.conf) to the size of the arena: saves CPU time"};
}

// Tries it out: the setting alone does not tell what MADV_COLLAPSE may do.
Finding look_at_huge_pages() {
  Finding finding{.subject = "huge pages", .grade = Grade::kBroken, .fact = ""};
  auto arena = shm::Arena::create(kHugePageBytes);
  if (!arena) {
    finding.fact = arena.error().message();
    finding.advice = "free memory, or raise the memory limit of the container";
    return finding;
  }
  const std::atomic<bool> never = false;
  auto pages = arena->prefault(0, kHugePageBytes, never);
  if (!pages) {
    finding.fact = pages.error().message();
    return finding;
  }
  finding.fact = concat("shared memory gets ", shm::name(*pages), " pages");
  finding.grade = *pages == shm::PageKind::kSmall ? Grade::kSlower : Grade::kGood;
  if (finding.grade == Grade::kSlower) {
    finding.advice = "needs Linux 6.1 or newer with transparent huge pages, or a hugetlb pool";
  }
  return finding;
}

Finding look_at_memory() {
  const std::uint64_t bytes = shm::arena_bytes_limit(0);
  return {.subject = "memory",
          .grade = bytes == 0 ? Grade::kBroken : Grade::kInfo,
          .fact = concat("an arena may take ", human_bytes(bytes)),
          .advice = bytes == 0 ? "free memory, or raise the memory limit of the container" : ""};
}

std::filesystem::path nearest_existing(std::filesystem::path path) {
  std::error_code ignored;
  path = std::filesystem::absolute(path, ignored);
  while (!std::filesystem::exists(path, ignored) && path.has_parent_path() &&
         path != path.parent_path()) {
    path = path.parent_path();
  }
  return path;
}

Finding look_at_filesystem(const std::string& path) {
  Finding finding{.subject = "file system", .grade = Grade::kBroken, .fact = ""};
  auto verdict = catalog::judge_filesystem(path);
  if (!verdict) {
    finding.fact = verdict.error().message();
    return finding;
  }
  using Kind = catalog::FilesystemVerdict::Kind;
  struct statvfs space {};
  const std::string free =
      ::statvfs(nearest_existing(path).c_str(), &space) == 0
          ? concat(", ", human_bytes(std::uint64_t{space.f_bavail} * space.f_frsize), " free")
          : "";
  finding.fact = concat(path, " is on ", verdict->name, free);
  switch (verdict->kind) {
    case Kind::kDurable: finding.grade = Grade::kGood; break;
    case Kind::kWarned:
      finding.grade = Grade::kSlower;
      finding.fact += "; a power cut may lose checkpoints that were durable";
      finding.advice = "put runs on local ext4 or XFS";
      break;
    case Kind::kRefused:
      finding.advice = "put runs on local ext4 or XFS; network file systems are refused";
      break;
  }
  return finding;
}

// With an unnamed file: nothing is left behind whatever happens.
Finding look_at_direct_io(const std::string& path) {
  const std::filesystem::path directory = nearest_existing(path);
  const UniqueFd file(::open(directory.c_str(), O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600));
  if (file) {
    return {.subject = "direct I/O",
            .grade = Grade::kGood,
            .fact = concat("works in ", directory.string())};
  }
  const int number = errno;
  const bool is_only_unknown = number == EOPNOTSUPP || number == EISDIR;
  return {.subject = "direct I/O",
          .grade = is_only_unknown ? Grade::kInfo : Grade::kBroken,
          .fact = std::string(os_error(concat("try it in ", directory.string()), number).message()),
          .advice = is_only_unknown ? "" : "make the directory writable, or choose another"};
}

Finding look_at_daemon(Tool& tool) {
  constexpr int kTimeoutMs = 2'000;
  auto answer = call_daemon(tool, shm::make_message(0, shm::wire::StatusT()), kTimeoutMs);
  if (answer) {
    return {.subject = "daemon",
            .grade = Grade::kGood,
            .fact = concat("answers at ", answer->socket_path)};
  }
  const bool is_absent = answer.error().code() == Code::kNotFound;
  return {.subject = "daemon",
          .grade = is_absent ? Grade::kInfo : Grade::kBroken,
          .fact = std::string(answer.error().message())};
}

// The GPUs, and with them what CUDA tensors can go through. Makes no context on any.
void look_at_gpus(std::vector<Finding>& findings) {
  Finding lane{.subject = "lane pinned", .grade = Grade::kInfo, .fact = ""};
  const auto driver = cuda::Driver::load();
  if (!driver) {
    lane.fact = concat("for CUDA tensors: ", driver.error().message());
    findings.push_back(std::move(lane));
    return;
  }
  const auto devices = cuda::list_devices(**driver);
  if (!devices) {
    lane.grade = Grade::kSlower;
    lane.fact = devices.error().message();
    findings.push_back(std::move(lane));
    return;
  }
  int ordinal = 0;
  for (const cuda::DeviceFacts& device : *devices) {
    findings.push_back(
        {.subject = concat("GPU ", ordinal++),
         .grade = Grade::kInfo,
         .fact = concat(device.name, ", ", human_bytes(device.bytes), ", compute capability ",
                        device.major, '.', device.minor, ", ", device.uuid, "; driver for CUDA ",
                        (*driver)->version() / 1000, '.', (*driver)->version() % 1000 / 10)});
  }
  const bool has_kernels = !kernels::gpu_image().empty();
  lane.grade = has_kernels ? Grade::kGood : Grade::kSlower;
  lane.fact = has_kernels ? "CUDA tensors of all these GPUs"
                          : "this build has no GPU kernels: CUDA tensors are refused";
  if (!has_kernels) {
    lane.advice = "pip install -r python/requirements-gpu.txt, which brings nvcc; build again";
  }
  findings.push_back(std::move(lane));
  ordinal = 0;
  for (const cuda::DeviceFacts& device : *devices) {
    const auto shared = cuda::may_be_shared(device);
    findings.push_back({.subject = concat("lanes hbm, ipc of GPU ", ordinal++),
                        .grade = Grade::kInfo,
                        .fact = shared ? "where they are asked for: lane=\"hbm\""
                                       : std::string(shared.error().message())});
  }
}

// Each client takes about 12 of the daemon's, and lane ipc one for each mapping of a tensor.
Finding look_at_descriptors() {
  constexpr rlim_t kEnough = 4096;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) {
    return {.subject = "descriptors", .grade = Grade::kInfo, .fact = "the limit is not known"};
  }
  const bool is_enough = limit.rlim_max == RLIM_INFINITY || limit.rlim_max >= kEnough;
  return {.subject = "descriptors",
          .grade = is_enough ? Grade::kGood : Grade::kSlower,
          .fact = limit.rlim_max == RLIM_INFINITY ? "no limit" : concat("up to ", limit.rlim_max),
          .advice = is_enough ? "" : concat("raise the hard limit of open files to ", kEnough)};
}

// Legacy handles of lane ipc name a process, which another PID namespace does not have.
Finding look_at_namespaces(Tool& tool) {
  constexpr int kTimeoutMs = 2'000;
  Finding finding{.subject = "namespaces", .grade = Grade::kInfo, .fact = "no daemon to compare"};
  auto answer = call_daemon(tool, shm::make_message(0, shm::wire::StatusT()), kTimeoutMs);
  const auto* const reply = answer ? answer->message.body.AsStatusReply() : nullptr;
  if (reply == nullptr) return finding;
  boost::system::error_code failed;
  const boost::json::value status = boost::json::parse(reply->json, failed);
  const auto* const pid =
      failed || !status.is_object() ? nullptr : status.get_object().if_contains("pid");
  if (pid == nullptr || !pid->is_int64()) return finding;
  std::error_code unseen;
  const auto ours = std::filesystem::read_symlink("/proc/self/ns/pid", unseen);
  const auto its =
      std::filesystem::read_symlink(concat("/proc/", pid->as_int64(), "/ns/pid"), unseen);
  const bool is_shared = !unseen && ours == its;
  finding.grade = is_shared ? Grade::kGood : Grade::kInfo;
  finding.fact = is_shared ? "the daemon is in our PID namespace"
                           : "the daemon is in another PID namespace, where lane ipc may not work";
  return finding;
}

std::vector<Finding> examine(Tool& tool, const std::string& path) {
  std::vector<Finding> findings = {
      look_at_system(),
      look_at_uring(),
      look_at_memlock(),
      look_at_descriptors(),
      look_at_huge_pages(),
      look_at_memory(),
      look_at_filesystem(path),
      look_at_direct_io(path),
      look_at_daemon(tool),
      look_at_namespaces(tool),
      {.subject = "lane host", .grade = Grade::kGood, .fact = "CPU tensors, any machine"}};
  look_at_gpus(findings);
  return findings;
}

}  // namespace

Result<Exit> doctor(Tool& tool, const std::string& path) {
  const std::vector<Finding> findings = examine(tool, path);
  bool is_broken = false;
  boost::json::array list;
  std::vector<std::vector<std::string>> rows;
  for (const Finding& finding : findings) {
    is_broken = is_broken || finding.grade == Grade::kBroken;
    list.push_back(boost::json::object{{"subject", finding.subject},
                                       {"grade", name(finding.grade)},
                                       {"fact", finding.fact},
                                       {"advice", finding.advice}});
    rows.push_back({std::string(name(finding.grade)), finding.subject, one_line(finding.fact)});
    if (!finding.advice.empty()) rows.push_back({"", "", concat("-> ", finding.advice)});
  }
  if (tool.options().as_json) {
    print_json(tool, boost::json::object{{"ok", !is_broken}, {"findings", std::move(list)}});
  } else {
    tool.write(table(rows, "<<<"));
  }
  if (!is_broken) return Exit::kDone;
  return Error(Code::kUnavailable, "saving cannot work here; follow the advice beside 'broken'");
}

}  // namespace stillframe::cli
