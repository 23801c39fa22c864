#pragma once

// The life of a run that the crash tests cut short everywhere: five saves that keep one, of one
// part and then of three, into fresh files and recycled ones, a pin, the newest one's removal, the
// pin's end.

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace stillframe::testing {

inline constexpr std::uint32_t kHistoryKeepLast = 1;
inline constexpr std::size_t kHistorySaveCount = 5;

// Says each deed before ("pinning", 2) and after ("pinned", 2), in the words of RunOracle::note().
using Say = std::function<void(std::string_view word, std::int64_t step)>;

// Lives it against the daemon at `socket_path`, until something fails. Returns what; empty: it came
// to its end.
std::string live_history(const std::string& run_path, const std::string& socket_path,
                         const Say& say);

}  // namespace stillframe::testing
