// The trainer that crash tests and the soak kill: attaches, saves lazily a few times and waits for
// each; or lives the history of tests/support/run_history.h. Prints "begin N" before it saves step
// N, "durable N" as soon as that was called durable, and so on, in the words of RunOracle::note().
//
//   client_crash_trainer RUN SOCKET FIRST_STEP LAST_STEP
//   client_crash_trainer RUN SOCKET history
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "client/libstillframe.h"
#include "tests/support/run_history.h"
#include "tests/support/trainer.h"

namespace {

void say(std::string_view word, std::int64_t step) {
  std::printf("%.*s %lld\n", static_cast<int>(word.size()), word.data(),
              static_cast<long long>(step));
  (void)std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  using stillframe::testing::State;
  if (argc == 4 && std::string_view(argv[3]) == "history") {
    const std::string failure = stillframe::testing::live_history(argv[1], argv[2], say);
    std::fprintf(stderr, "%s\n", failure.c_str());
    return failure.empty() ? 0 : 1;
  }
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
    say("begin", step);
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
    say("durable", step);
  }
  return sf_session_close(session, 5000, nullptr);
}
