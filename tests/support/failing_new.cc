#include "tests/support/failing_new.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

// Not members: they must be there before the first static object asks for memory.
std::atomic<bool> is_armed{false};
std::atomic<bool> is_for_ever{false};
std::atomic<bool> has_failed{false};
std::atomic<std::int64_t> failing_call{0};
std::atomic<std::int64_t> call_count{0};

bool fails_now() noexcept {
  if (!is_armed.load(std::memory_order_acquire)) return false;
  const std::int64_t call = call_count.fetch_add(1);
  const bool fails = is_for_ever.load() ? call >= failing_call.load() : call == failing_call.load();
  if (fails) has_failed.store(true);
  return fails;
}

}  // namespace

namespace stillframe::testing {

FailingNew::FailingNew(std::int64_t nth, How how) {
  call_count = 0;
  has_failed = false;
  failing_call = nth;
  is_for_ever = how == How::kForEver;
  is_armed.store(true, std::memory_order_release);
}

FailingNew::~FailingNew() { is_armed.store(false); }

std::int64_t seen_new_count() { return call_count; }
bool has_new_failed() { return has_failed; }

}  // namespace stillframe::testing

// The other forms call these. Kept out of line: GCC takes a malloc() that it sees freed by delete
// for a mistake.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  void* const memory = fails_now() ? nullptr : std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
