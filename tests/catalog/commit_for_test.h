#pragma once

// Commits small checkpoints by C2 to C10 of the protocol, without a daemon.

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"
#include "catalog/run.h"
#include "format/manifest.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

inline constexpr char kTestRunId[] = "00112233445566778899aabbccddeeff";

struct TestCommit {
  std::uint64_t sequence = 1;
  std::int64_t step = 0;
  std::string run_id = kTestRunId;
  std::uint64_t nonce = 0x1111;
  // Of each part's one tensor; parts are "part0", "part1", ... Their bytes follow from sequence,
  // step and run id, so no two checkpoints share any.
  std::vector<std::uint64_t> tensor_bytes = {5000, 70000};
  std::size_t header_tensor_count = 0;  // Empty tensors with long names, in every part.
  std::map<std::string, double> metrics = {};
  std::vector<format::BestRule> best_rules = {};
};

// The bytes of part `index` as the file should hold them.
std::string part_bytes_for_test(const TestCommit& commit, std::size_t index);
std::string state_for_test(const TestCommit& commit);

// Takes spool files where there are any.
Result<Checkpoint> commit_for_test(uring::IoBackend& io, const std::string& run_path,
                                   const TestCommit& commit);

}  // namespace stillframe::catalog
