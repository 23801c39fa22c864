#pragma once

#include <cstdint>
#include <functional>
#include <thread>

#include "base/result.h"

namespace stillframe::client {

// Starts a thread in somebody else's process: every signal is blocked in it, so that the host's
// handlers never run there, and it has a name of at most 15 characters. The caller joins it.
// kResourceExhausted: no more threads here.
Result<std::thread> start_quiet_thread(const char* name, std::function<void()> body);

// How many CPUs this process may use; at least 1.
std::uint32_t usable_cpu_count();

}  // namespace stillframe::client
