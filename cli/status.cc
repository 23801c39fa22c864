#include <boost/json.hpp>
#include <string>
#include <vector>

#include "base/text.h"
#include "cli/commands.h"
#include "cli/daemon_call.h"
#include "cli/text.h"

namespace stillframe::cli {

namespace {

namespace json = boost::json;

constexpr int kStatusTimeoutMs = 5'000;

// The daemon may be of another version: what it does not say is left out, never an error.
std::string text_of(const json::object& object, std::string_view key) {
  const json::value* value = object.if_contains(key);
  if (value == nullptr || value->is_null()) return {};
  if (value->is_string()) return one_line(value->as_string());
  return json::serialize(*value);
}

const json::array& array_of(const json::object& object, std::string_view key) {
  static const json::array kNone;
  const json::value* value = object.if_contains(key);
  return value != nullptr && value->is_array() ? value->as_array() : kNone;
}

std::string slots_text(const json::object& run) {
  std::vector<std::string> pieces;
  for (const json::value& slot : array_of(run, "slots")) {
    if (!slot.is_object()) continue;
    const std::string sequence = text_of(slot.as_object(), "sequence");
    pieces.push_back(concat(text_of(slot.as_object(), "state"),
                            sequence.empty() ? "" : concat(" with ", sequence), " (",
                            text_of(slot.as_object(), "pages"), " pages)"));
  }
  return pieces.empty() ? "none" : joined(pieces, ", ");
}

void print_run(Tool& tool, const json::object& run) {
  tool.print("\nrun       {}\n", text_of(run, "path"));
  tool.print("  trainer   {}\n", text_of(run, "has_trainer") == "true" ? "attached" : "none");
  tool.print("  lane      {}\n", text_of(run, "lane"));
  const std::string fallback = text_of(run, "io_fallback_reason");
  tool.print("  I/O       {}{}\n", text_of(run, "io_backend"),
             fallback.empty() ? "" : concat(" (", fallback, ")"));
  tool.print("  slots     {}\n", slots_text(run));
  tool.print("  in flight {}\n", text_of(run, "in_flight"));
  tool.print("  saves     {} durable, {} failed\n", text_of(run, "durable"),
             text_of(run, "failed"));
  const std::string newest = text_of(run, "newest_sequence");
  tool.print("  newest    {}\n", newest.empty() ? "none" : newest);
  const std::string error = text_of(run, "last_error");
  tool.print("  error     {}\n", error.empty() ? "none" : tool.bad(error));
  for (const json::value& warning : array_of(run, "warnings")) {
    if (warning.is_string()) tool.print("  warning   {}\n", one_line(warning.as_string()));
  }
}

void print_as_text(Tool& tool, const json::object& status) {
  tool.print("daemon    {}, process {}, up {}\n", text_of(status, "version"),
             text_of(status, "pid"), concat(text_of(status, "uptime_s"), " s"));
  tool.print("socket    {}\n", text_of(status, "socket"));
  tool.print("kind      {}\n", text_of(status, "private") == "true"
                                   ? "private: started by a trainer, ends when nobody needs it"
                                   : "service");
  for (const json::value& client : array_of(status, "clients")) {
    if (!client.is_object()) continue;
    const std::string run = text_of(client.as_object(), "run");
    tool.print("client    {}, process {}{}\n", text_of(client.as_object(), "role"),
               text_of(client.as_object(), "pid"), run.empty() ? "" : concat(", ", run));
  }
  for (const json::value& run : array_of(status, "runs")) {
    if (run.is_object()) print_run(tool, run.as_object());
  }
}

}  // namespace

Result<Exit> status(Tool& tool) {
  auto answer = call_daemon(tool, shm::make_message(0, shm::wire::StatusT()), kStatusTimeoutMs);
  if (!answer) return std::move(answer).error();
  const shm::wire::StatusReplyT* reply = answer->message.body.AsStatusReply();
  boost::system::error_code failed;
  const json::value document = reply == nullptr ? json::value() : json::parse(reply->json, failed);
  if (failed || !document.is_object()) {
    return Error(Code::kInternal, concat("the daemon at ", answer->socket_path,
                                         " did not answer with a status; is it of this version?"));
  }
  if (tool.options().as_json) {
    tool.write(json::serialize(document) + "\n");
  } else {
    print_as_text(tool, document.as_object());
  }
  return Exit::kDone;
}

}  // namespace stillframe::cli
