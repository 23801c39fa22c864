// The trainer that crash_test.cc and the soak kill: attaches, saves lazily a few times and waits
// for each. Prints "begin N" before it saves step N, and "durable N" as soon as that was called
// durable.
//
//   client_crash_trainer RUN SOCKET FIRST_STEP LAST_STEP
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "client/libstillframe.h"
#include "tests/support/trainer.h"

int main(int argc, char** argv) {
  using stillframe::testing::State;
  if (argc != 5) return 64;
  State state;
  sf_error error{};
  sf_attach_options options{};
  options.struct_bytes = sizeof options;
  options.keep_last = 2;
  options.no_autostart = 1;
  options.run_path = argv[1];
  options.socket_path = argv[2];
  sf_session* session = nullptr;
  if (sf_attach(&options, &session, &error) != SF_OK ||
      sf_layout_register(session, state.parts().data(), state.parts().size(), 10'000, &error) !=
          SF_OK) {
    std::fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  for (std::int64_t step = std::atoll(argv[3]); step <= std::atoll(argv[4]); ++step) {
    state.fill(step);
    std::printf("begin %lld\n", static_cast<long long>(step));
    (void)std::fflush(stdout);
    const std::string json = "{\"format_version\": 1}";
    sf_save_options save{};
    save.struct_bytes = sizeof save;
    save.capture = step % 2 == 0 ? SF_CAPTURE_EAGER : SF_CAPTURE_LAZY;
    save.busy_timeout_ms = 10'000;
    save.step = step;
    save.state_json = json.c_str();
    save.state_bytes = json.size();
    const auto sources = state.sources(true);
    std::uint64_t ticket = 0;
    int code = sf_save_begin(session, &save, sources.data(), sources.size(), &ticket, &error);
    if (code == SF_OK && save.capture == SF_CAPTURE_LAZY) {
      code = sf_capture_wait(session, ticket, 10'000, 1, &error);
      if (code == SF_OK) code = sf_capture_publish(session, ticket, &error);
    }
    if (code == SF_OK) code = sf_ticket_wait(session, ticket, SF_DURABLE, 20'000, &error);
    if (code != SF_OK) {
      std::fprintf(stderr, "step %lld: %s\n", static_cast<long long>(step), error.message);
      return 1;
    }
    std::printf("durable %lld\n", static_cast<long long>(step));
    (void)std::fflush(stdout);
  }
  return sf_session_close(session, 5000, nullptr);
}
