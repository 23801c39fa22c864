#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "base/check.h"
#include "catalog/run.h"
#include "cli/address.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

namespace {

namespace fs = std::filesystem;

// Directories whose names mean something else inside of a run, and links that do.
class Runs {
 public:
  Runs() {
    std::string root = (fs::temp_directory_path() / "stillframe-fuzz-XXXXXX").string();
    check(::mkdtemp(root.data()) != nullptr, "a test can make a directory");
    root_ = root;
    for (const char* const run : {"run", "best", "a@b"}) {
      fs::create_directories(fs::path(root_) / run / ".stillframe");
    }
    fs::create_directory(fs::path(root_) / "run" / "00000003-step-30");
    std::ofstream(fs::path(root_) / "run" / "00000003-step-30" / "manifest.json") << "{}";
    fs::create_directory_symlink("00000003-step-30", fs::path(root_) / "run" / "latest");
  }
  ~Runs() {
    std::error_code ignored;
    fs::remove_all(root_, ignored);
  }
  Runs(const Runs&) = delete;
  Runs& operator=(const Runs&) = delete;
  const std::string& root() const { return root_; }

 private:
  std::string root_;
};

// What a selector is looked up in: three checkpoints, two of them of one step.
catalog::RunContents contents() {
  catalog::RunContents run;
  run.run_id = "fuzz";
  for (const auto& [sequence, step] : {std::pair(1, 10), std::pair(2, 30), std::pair(3, 30)}) {
    catalog::Checkpoint checkpoint;
    checkpoint.manifest.sequence = static_cast<std::uint64_t>(sequence);
    checkpoint.manifest.step = step;
    run.checkpoints.push_back(std::move(checkpoint));
  }
  run.checkpoints[1].tags = {"v1.0"};
  return run;
}

}  // namespace

bool cli_address(ConstBytes input) {
  static const Runs runs;
  static const catalog::RunContents run = contents();
  std::string text(reinterpret_cast<const char*>(input.data()), input.size());
  // As a command line brings it.
  text.resize(std::min(text.size(), text.find('\0')));
  if (text.starts_with('~')) text.replace(0, 1, runs.root());
  const auto address = cli::read_address(text);
  if (!address) {
    check(address.error().code() == Code::kInvalidArgument, "a usage error");
    return false;
  }
  check(!address->run_path.empty(), "a run is a path");
  // Nothing but what was named: the run is the argument, or what stands before the selector.
  check(address->run_path == "." || text.starts_with(address->run_path),
        "the run is part of what was given");
  if (address->is_run_alone) {
    check(address->selector == format::Selector(), "a run alone means its latest");
  }
  const auto chosen = catalog::select(run, address->selector);
  if (!chosen) {
    check(!chosen.error().message().empty(), "a reason");
    return true;
  }
  const catalog::Checkpoint* const first = run.checkpoints.data();
  check(*chosen >= first && *chosen < first + run.checkpoints.size(), "one of the run's");
  return true;
}

}  // namespace stillframe::fuzz
