#include "tests/support/judge_run.h"

#include "tests/support/trainer.h"

namespace stillframe::testing {

std::vector<std::string> judge_recovered(const std::string& run_path, const RunOracle& oracle,
                                         RunOracle::Retention retention) {
  const Verdict verdict = judge(run_path);
  std::vector<std::string> complaints = verdict.complaints;
  for (const std::string& name : verdict.leftovers) complaints.push_back("left behind: " + name);
  for (const std::string& complaint : oracle.judge(verdict.steps, retention)) {
    complaints.push_back(complaint);
  }
  for (const std::string& complaint : oracle.judge_pins(verdict.pinned)) {
    complaints.push_back(complaint);
  }
  return complaints;
}

}  // namespace stillframe::testing
