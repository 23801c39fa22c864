// Loaded into a program with LD_PRELOAD: its `operator new` fails at the call that the environment
// names, from 0, and at the program's end the number of calls is written where it says.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace {

std::atomic<long> call_count{0};

long failing_call() noexcept {
  static const char* const text = std::getenv("STILLFRAME_TEST_FAILING_NEW");
  static const long call = text == nullptr ? -1 : std::atol(text);
  return call;
}

[[gnu::destructor]] void write_count() {
  const char* const path = std::getenv("STILLFRAME_TEST_NEW_COUNT_FILE");
  std::FILE* const file = path == nullptr ? nullptr : std::fopen(path, "w");
  if (file == nullptr) return;
  (void)std::fprintf(file, "%ld\n", call_count.load());
  (void)std::fclose(file);
}

}  // namespace

[[gnu::visibility("default")]] void* operator new(std::size_t bytes) {
  const bool fails = call_count.fetch_add(1) == failing_call();
  void* const memory = fails ? nullptr : std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::visibility("default")]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::visibility("default")]] void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
