#pragma once

#include <string>
#include <vector>

#include "tests/oracle/run_oracle.h"

namespace stillframe::testing {

// What is wrong with a run directory that recovery has been through, or that a daemon left in good
// order: damage, wrong bytes, leftovers, and all that the oracle does not allow.
std::vector<std::string> judge_recovered(const std::string& run_path, const RunOracle& oracle,
                                         RunOracle::Retention retention);

}  // namespace stillframe::testing
