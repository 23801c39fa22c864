#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "bench/json_line.h"

// How everything is measured here: this machine's speed swings by a factor of two within minutes,
// so only ratios of one round count (docs/BENCHMARKS.md).
//
// A round runs every calibrator, then every contender once, in an order that rotates from round to
// round, then every calibrator again. A round in which one calibrator's two runs differ by more
// than 20 % is void and repeated; nothing else is ever left out.
namespace stillframe::bench {

struct Sample {
  double seconds = 0;
  double cpu_seconds = 0;  // User and system, of all processes that took part.
};

// Runs `work` and takes the wall time and the CPU time of this process.
Sample timed(const std::function<void()>& work);
// The same around work that takes its own wall time, as the calibrators do.
Sample with_cpu_time(const std::function<double()>& work);

struct Contender {
  std::string name;
  std::function<Sample()> run;
  std::function<void()> prepare = nullptr;  // Untimed, right before each run.
};

struct Plan {
  std::size_t valid_rounds = 7;
  std::size_t attempts_per_round = 3;  // At most valid_rounds x this many rounds in all.
  double void_above = 1.20;            // Slower over faster run of one calibrator.
  std::uint64_t seed = 1;              // Of the bootstrap.
};

struct Round {
  bool valid = false;
  std::vector<Sample> before, after;  // By calibrator.
  std::vector<Sample> samples;        // By contender.
  std::vector<std::size_t> order;     // Contenders as they ran.
};

// The median of the valid rounds' ratios, with a percentile bootstrap interval: 10 000 resamples of
// whole rounds. All zero when no round was valid.
struct Ratio {
  double median = 0, min = 0, max = 0, low95 = 0, high95 = 0;
};

class Rounds {
 public:
  Rounds(Plan plan, std::vector<Contender> calibrators, std::vector<Contender> contenders)
      : plan_(plan), calibrators_(std::move(calibrators)), contenders_(std::move(contenders)) {}

  // Runs until plan.valid_rounds are valid or the attempts are used up, and prints a line of JSON
  // for each run of a contender. False: too few valid rounds.
  [[nodiscard]] bool run();

  // Seconds of `name` over those of `base`, which may each be a contender or a calibrator; a
  // calibrator counts as the mean of its two runs in the round.
  Ratio ratio(std::string_view name, std::string_view base) const;

  // Prints the summary line of ratio(name, base): the rounds, valid and void, the ratio, the
  // medians of seconds and CPU seconds, and whether the ratio's median keeps to `target_max`.
  bool summarise(std::string_view metric, std::string_view name, std::string_view base,
                 double target_max) const;

  std::size_t valid_count() const;
  std::size_t void_count() const { return rounds_.size() - valid_count(); }

 private:
  Round run_round(std::size_t number);
  void print_round(std::size_t number, const Round& round) const;
  // The sample of every valid round.
  std::vector<Sample> samples_of(std::string_view name) const;

  Plan plan_;
  std::vector<Contender> calibrators_;
  std::vector<Contender> contenders_;
  std::vector<Round> rounds_;
};

double median(std::vector<double> values);
Ratio summarised(std::vector<double> ratios, std::uint64_t seed);

// The first line of a result file: benchmark, schema, host facts. The caller adds its parameters.
JsonLine header_line(std::string_view benchmark);

}  // namespace stillframe::bench
