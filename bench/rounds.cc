#include "bench/rounds.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>

namespace stillframe::bench {

namespace {

double cpu_seconds_of_self() {
  rusage usage = {};
  (void)::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

Sample run_once(const Contender& contender) {
  if (contender.prepare) contender.prepare();
  return contender.run();
}

std::vector<Sample> run_all(const std::vector<Contender>& contenders) {
  std::vector<Sample> samples;
  for (const Contender& contender : contenders) samples.push_back(run_once(contender));
  return samples;
}

bool agree(const std::vector<Sample>& before, const std::vector<Sample>& after, double void_above) {
  for (std::size_t i = 0; i < before.size(); ++i) {
    const auto [faster, slower] = std::minmax(before[i].seconds, after[i].seconds);
    if (slower > faster * void_above) return false;
  }
  return true;
}

std::size_t index_of(const std::vector<Contender>& contenders, std::string_view name) {
  const auto found =
      std::find_if(contenders.begin(), contenders.end(),
                   [name](const Contender& contender) { return contender.name == name; });
  return static_cast<std::size_t>(found - contenders.begin());
}

}  // namespace

Sample with_cpu_time(const std::function<double()>& work) {
  const double cpu_before = cpu_seconds_of_self();
  const double seconds = work();
  return {.seconds = seconds, .cpu_seconds = cpu_seconds_of_self() - cpu_before};
}

Sample timed(const std::function<void()>& work) {
  return with_cpu_time([&work] {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  });
}

bool Rounds::run() {
  const std::size_t attempts_max = plan_.valid_rounds * plan_.attempts_per_round;
  while (valid_count() < plan_.valid_rounds && rounds_.size() < attempts_max) {
    const std::size_t number = rounds_.size();
    rounds_.push_back(run_round(number));
    print_round(number, rounds_.back());
  }
  return valid_count() >= plan_.valid_rounds;
}

Round Rounds::run_round(std::size_t number) {
  Round round;
  round.samples.resize(contenders_.size());
  round.before = run_all(calibrators_);
  for (std::size_t i = 0; i < contenders_.size(); ++i) {
    const std::size_t index = (i + number) % contenders_.size();
    round.order.push_back(index);
    round.samples[index] = run_once(contenders_[index]);
  }
  round.after = run_all(calibrators_);
  round.valid = agree(round.before, round.after, plan_.void_above);
  return round;
}

void Rounds::print_round(std::size_t number, const Round& round) const {
  const auto line = [&](std::string_view kind) {
    JsonLine json;
    json.add("kind", kind).add("round", number).add("valid", round.valid);
    return json;
  };
  for (std::size_t i = 0; i < calibrators_.size(); ++i) {
    line("calibrator")
        .add("name", calibrators_[i].name)
        .add("seconds_before", round.before[i].seconds)
        .add("seconds_after", round.after[i].seconds)
        .add("cpu_seconds", (round.before[i].cpu_seconds + round.after[i].cpu_seconds) / 2)
        .print();
  }
  for (std::size_t place = 0; place < round.order.size(); ++place) {
    const Sample& sample = round.samples[round.order[place]];
    line("round")
        .add("name", contenders_[round.order[place]].name)
        .add("position", place)
        .add("seconds", sample.seconds)
        .add("cpu_seconds", sample.cpu_seconds)
        .print();
  }
}

std::size_t Rounds::valid_count() const {
  return static_cast<std::size_t>(std::count_if(rounds_.begin(), rounds_.end(),
                                                [](const Round& round) { return round.valid; }));
}

std::vector<Sample> Rounds::samples_of(std::string_view name) const {
  const std::size_t contender = index_of(contenders_, name);
  const std::size_t calibrator = index_of(calibrators_, name);
  std::vector<Sample> samples;
  for (const Round& round : rounds_) {
    if (!round.valid) continue;
    if (contender < contenders_.size()) {
      samples.push_back(round.samples[contender]);
    } else if (calibrator < calibrators_.size()) {
      const Sample& before = round.before[calibrator];
      const Sample& after = round.after[calibrator];
      samples.push_back({.seconds = (before.seconds + after.seconds) / 2,
                         .cpu_seconds = (before.cpu_seconds + after.cpu_seconds) / 2});
    }
  }
  return samples;
}

Ratio Rounds::ratio(std::string_view name, std::string_view base) const {
  const std::vector<Sample> above = samples_of(name);
  const std::vector<Sample> below = samples_of(base);
  std::vector<double> ratios;
  for (std::size_t i = 0; i < std::min(above.size(), below.size()); ++i) {
    ratios.push_back(above[i].seconds / below[i].seconds);
  }
  return summarised(std::move(ratios), plan_.seed);
}

bool Rounds::summarise(std::string_view metric, std::string_view name, std::string_view base,
                       double target_max) const {
  const Ratio found = ratio(name, base);
  std::vector<double> seconds;
  std::vector<double> cpu_seconds;
  for (const Sample& sample : samples_of(name)) {
    seconds.push_back(sample.seconds);
    cpu_seconds.push_back(sample.cpu_seconds);
  }
  const bool met = !seconds.empty() && found.median <= target_max;
  JsonLine()
      .add("kind", "summary")
      .add("metric", metric)
      .add("name", name)
      .add("base", base)
      .add("median", found.median)
      .add("min", found.min)
      .add("max", found.max)
      .add("low95", found.low95)
      .add("high95", found.high95)
      .add("target_max", target_max)
      .add("met", met)
      .add("seconds", median(seconds))
      .add("cpu_seconds", median(cpu_seconds))
      .add("valid_rounds", valid_count())
      .add("void_rounds", void_count())
      .print();
  return met;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

Ratio summarised(std::vector<double> ratios, std::uint64_t seed) {
  if (ratios.empty()) return {};
  constexpr std::size_t kResamples = 10'000;
  std::mt19937_64 random(seed);
  std::vector<double> medians(kResamples);
  std::vector<double> resample(ratios.size());
  for (double& one : medians) {
    for (double& value : resample) value = ratios[random() % ratios.size()];
    one = median(resample);
  }
  std::sort(medians.begin(), medians.end());
  const auto [min, max] = std::minmax_element(ratios.begin(), ratios.end());
  return {.median = median(ratios),
          .min = *min,
          .max = *max,
          .low95 = medians[kResamples / 40],
          .high95 = medians[kResamples - 1 - kResamples / 40]};
}

}  // namespace stillframe::bench
