#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace stillframe::cli {

std::string human_bytes(std::uint64_t bytes);  // "512 B", "1.5 MiB"
std::string human_age(std::int64_t age_ns);    // "3 min"; "?" when it is negative.
std::string human_metrics(const std::map<std::string, double>& metrics);  // "loss=0.25 acc=0.9"
std::string human_time(std::int64_t wall_ns);                             // "2026-03-01T12:00:00Z"
std::string joined(const std::vector<std::string>& pieces, std::string_view separator);

// One line that is safe on a terminal: control characters become '?'.
std::string one_line(std::string_view text);

// Columns padded to their widest cell, two spaces apart. `alignment` has '<' or '>' for each
// column, every row a cell for each.
std::string table(const std::vector<std::vector<std::string>>& rows, std::string_view alignment);

}  // namespace stillframe::cli
