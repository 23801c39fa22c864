#include <algorithm>
#include <string>
#include <vector>

#include "base/text.h"
#include "catalog/block_reader.h"
#include "cli/address.h"
#include "cli/commands.h"
#include "cli/json.h"
#include "cli/run_access.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

namespace json = boost::json;

struct Verdict {
  std::string path;
  std::uint64_t sequence = 0;
  std::int64_t step = 0;
  std::uint64_t bytes = 0;
  std::vector<std::string> damage;  // Empty: every byte is as it was written.
};

// Reads all of one checkpoint. An error that is no damage (the drive cannot be read) ends the
// command; what only this checkpoint lacks is its damage.
Result<Verdict> verify_one(Tool& tool, const catalog::Checkpoint& checkpoint) {
  Verdict verdict{.path = checkpoint.path,
                  .sequence = checkpoint.manifest.sequence,
                  .step = checkpoint.manifest.step,
                  .bytes = checkpoint.bytes(),
                  .damage = {}};
  auto io = tool.io();
  if (!io) return std::move(io).error();
  auto staging = tool.staging();
  if (!staging) return std::move(staging).error();
  auto damage = catalog::verify_checkpoint(**io, checkpoint, *staging);
  if (damage) {
    verdict.damage = *std::move(damage);
  } else if (damage.error().code() == Code::kResourceExhausted ||
             damage.error().code() == Code::kInternal) {
    return std::move(damage).error();
  } else {
    verdict.damage.emplace_back(damage.error().message());
  }
  return verdict;
}

// Whether retention took the checkpoint away while it was read: then nothing is wrong with it.
bool was_removed(Tool& tool, const std::string& run_path, const Verdict& verdict) {
  auto run = open_run(tool, run_path);
  if (!run) return false;
  const auto is_it = [&](const auto& other) { return other.path == verdict.path; };
  return std::none_of(run->checkpoints.begin(), run->checkpoints.end(), is_it) &&
         std::none_of(run->damaged.begin(), run->damaged.end(), is_it);
}

void print_verdict(Tool& tool, const Verdict& verdict) {
  if (tool.options().as_json) return;
  if (verdict.damage.empty()) {
    tool.print("{} {}  {}\n", tool.good("ok     "), verdict.path, human_bytes(verdict.bytes));
    return;
  }
  tool.print("{} {}\n", tool.bad("DAMAGED"), verdict.path);
  for (const std::string& reason : verdict.damage) tool.print("          {}\n", one_line(reason));
}

void print_as_json(Tool& tool, const std::string& run_path, const std::vector<Verdict>& verdicts,
                   const std::vector<std::string>& damaged_tags, bool is_good) {
  json::array checkpoints;
  for (const Verdict& verdict : verdicts) {
    checkpoints.push_back(json::object{{"sequence", verdict.sequence},
                                       {"step", verdict.step},
                                       {"path", verdict.path},
                                       {"bytes", verdict.bytes},
                                       {"ok", verdict.damage.empty()},
                                       {"damage", strings_json(verdict.damage)}});
  }
  print_json(tool, json::object{{"run", run_path},
                                {"ok", is_good},
                                {"checkpoints", std::move(checkpoints)},
                                {"damaged_tags", strings_json(damaged_tags)}});
}

}  // namespace

Result<Exit> verify(Tool& tool, const std::string& text) {
  auto address = read_address(text);
  if (!address) return std::move(address).error();
  auto run = open_run(tool, address->run_path);
  if (!run) return std::move(run).error();

  std::vector<catalog::Checkpoint> wanted = run->checkpoints;
  std::vector<Verdict> verdicts;
  if (address->is_run_alone) {
    for (const catalog::DamagedCheckpoint& damaged : run->damaged) {
      verdicts.push_back({.path = damaged.path,
                          .sequence = damaged.name.sequence,
                          .step = damaged.name.step,
                          .bytes = 0,
                          .damage = {std::string(damaged.reason.message())}});
    }
  } else {
    auto found = catalog::select(*run, address->selector);
    if (!found) return std::move(found).error();
    wanted = {**found};
    run->damaged_tags.clear();
  }
  for (const Verdict& verdict : verdicts) print_verdict(tool, verdict);
  for (const catalog::Checkpoint& checkpoint : wanted) {
    auto verdict = verify_one(tool, checkpoint);
    if (!verdict) return std::move(verdict).error();
    if (!verdict->damage.empty() && was_removed(tool, address->run_path, *verdict)) continue;
    print_verdict(tool, *verdict);
    verdicts.push_back(*std::move(verdict));
  }

  const auto bad_count = std::count_if(verdicts.begin(), verdicts.end(),
                                       [](const Verdict& one) { return !one.damage.empty(); });
  const bool is_good = bad_count == 0 && run->damaged_tags.empty();
  if (tool.options().as_json) {
    print_as_json(tool, address->run_path, verdicts, run->damaged_tags, is_good);
  }
  if (is_good) return Exit::kDone;
  if (bad_count == 0) {
    return Error(Code::kDataLoss, concat("the file of tag ", run->damaged_tags.front(),
                                         " is damaged; set the tag again: stillframe tag"));
  }
  return Error(Code::kDataLoss,
               concat(bad_count, " of ", verdicts.size(), " checkpoints of ", address->run_path,
                      " are damaged; the others restore, and stillframe rm removes a damaged one"));
}

}  // namespace stillframe::cli
