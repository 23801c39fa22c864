#include "daemon/status.h"

#include <unistd.h>

#include <boost/json.hpp>

namespace stillframe::daemon {

namespace json = boost::json;

namespace {

constexpr std::size_t kJsonBytesMax = 60'000;

std::string_view name(RankArena::SlotState state) {
  switch (state) {
    case RankArena::SlotState::kPreparing: return "preparing";
    case RankArena::SlotState::kFree: return "free";
    case RankArena::SlotState::kBusy: return "busy";
    case RankArena::SlotState::kResident: return "resident";
  }
  return "unknown";
}

json::value or_null(const std::optional<std::string>& text) {
  return text ? json::value(*text) : json::value(nullptr);
}

json::object describe(const Run& run) {
  json::object object;
  object["path"] = run.path();
  object["io_backend"] = run.io().backend_name();
  object["io_fallback_reason"] = run.io().fallback_reason().empty()
                                     ? json::value(nullptr)
                                     : json::value(run.io().fallback_reason());
  object["has_trainer"] = run.has_trainer();
  object["lane"] = run.lane();
  object["lane_reason"] = run.lane_reason();
  object["in_flight"] = run.active_save_count();
  object["durable"] = run.durable_count();
  object["failed"] = run.failed_count();
  object["last_error"] = or_null(run.last_error());
  const catalog::Checkpoint* newest = run.contents().newest();
  object["newest_sequence"] =
      newest == nullptr ? json::value(nullptr) : json::value(newest->manifest.sequence);
  json::array warnings;
  for (const std::string& warning : run.warnings()) warnings.emplace_back(warning);
  object["warnings"] = std::move(warnings);
  json::array slots;
  if (const RankArena* arena = run.arena(); arena != nullptr) {
    object["slot_bytes"] = arena->slot_bytes();
    for (const RankArena::Slot& slot : arena->slots()) {
      json::object one;
      one["state"] = name(slot.state);
      one["pages"] = shm::name(slot.page_kind);
      if (slot.state == RankArena::SlotState::kResident) one["sequence"] = slot.sequence;
      slots.push_back(std::move(one));
    }
  }
  object["slots"] = std::move(slots);
  return object;
}

}  // namespace

std::string to_json(const DaemonStatus& status) {
  json::object object;
  object["version"] = STILLFRAME_VERSION;
  object["pid"] = ::getpid();
  object["private"] = status.is_private;
  object["socket"] = status.socket_path;
  object["uptime_s"] =
      (status.environment.clock.monotonic_ns() - status.started_ns) / 1'000'000'000;
  json::array clients;
  for (const Session* session : status.sessions) {
    json::object one;
    one["pid"] = session->peer_pid();
    one["role"] = session->role();
    one["run"] = session->run_path();
    clients.push_back(std::move(one));
  }
  object["clients"] = std::move(clients);
  json::object workers;
  for (const auto& [uuid, pid] : status.gpu_workers) workers[uuid] = pid;
  object["gpu_workers"] = std::move(workers);
  object["truncated"] = false;
  object["runs"] = json::array();
  std::size_t bytes = json::serialize(object).size();
  for (const Run* run : status.runs) {
    json::object one = describe(*run);
    bytes += json::serialize(one).size() + 1;
    if (bytes > kJsonBytesMax) {
      object["truncated"] = true;
      break;
    }
    object["runs"].as_array().push_back(std::move(one));
  }
  return json::serialize(object);
}

}  // namespace stillframe::daemon
