#pragma once

// One message of each kind, with every member set to something that is not its default.

#include <vector>

#include "base/check.h"
#include "shm/messages.h"

namespace stillframe::shm {

inline std::unique_ptr<wire::MetricT> example_metric(std::string name, double value) {
  auto metric = std::make_unique<wire::MetricT>();
  metric->name = std::move(name);
  metric->value = value;
  return metric;
}

// No `default:`, so that a new kind of message does not compile without an example.
inline wire::MessageT example_message(wire::Body kind) {
  constexpr std::uint64_t kRequest = 77;
  switch (kind) {
    case wire::Body::NONE: break;
    case wire::Body::Failure: {
      wire::FailureT body;
      body.code = 2;
      body.native = 28;
      body.message = "write part: No space left on device";
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::Hello: {
      wire::HelloT body;
      body.protocol_version = kProtocolVersion;
      body.version = "0.1.0";
      body.role = "trainer";
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::HelloReply: {
      wire::HelloReplyT body;
      body.protocol_version = kProtocolVersion;
      body.version = "0.1.0";
      body.daemon_nonce = 0xfedcba9876543210;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::Attach: {
      wire::AttachT body;
      body.run_path = "/data/run1";
      body.rank = 3;
      body.world_size = 8;
      body.keep_last = 5;
      body.keep_every = 100;
      body.best.push_back(std::make_unique<wire::BestKeepT>());
      body.best.back()->metric = "loss";
      body.best.back()->is_max = true;
      body.best.back()->count = 2;
      body.force_filesystem = true;
      body.framework = "torch 2.13.0";
      body.python_version = "3.11.7";
      body.arena_bytes_max = std::uint64_t{1} << 40;
      body.slot_count = 3;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::AttachReply: {
      wire::AttachReplyT body;
      body.run_id = "00112233445566778899aabbccddeeff";
      body.newest_sequence = 12;
      body.warnings = {"tmpfs does not survive a power cut", ""};
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::RegisterLayout: {
      wire::RegisterLayoutT body;
      body.layout_bytes = 4711;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::LayoutReply: {
      wire::LayoutReplyT body;
      body.layout_id = ~std::uint64_t{0};
      body.slot_count = 2;
      body.slot_bytes = std::uint64_t{1} << 33;
      body.ring_capacity = 16384;
      body.arena_kept = true;
      body.capture_window_bytes = 1;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::SlotReady: {
      wire::SlotReadyT body;
      body.layout_id = 9;
      body.slot = 1;
      body.page_kind = "2 MiB";
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::BeginSave: {
      wire::BeginSaveT body;
      body.step = -1;
      body.metrics.push_back(example_metric("loss", 0.25));
      body.metrics.push_back(example_metric("accuracy", -1e300));
      body.state_bytes = 45;
      body.has_pickle = true;
      body.busy_timeout_ms = 30'000;
      body.state = {'{', '}'};
      body.offered_ticket = 5;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::BeginSaveReply: {
      wire::BeginSaveReplyT body;
      body.ticket = 6;
      body.slot = 1;
      body.sequence = 13;
      body.busy_wait_ns = 1'000'000;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::SlotOffer: {
      wire::SlotOfferT body;
      body.layout_id = 9;
      body.ticket = 6;
      body.slot = 1;
      body.sequence = 13;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::OpenGpuWorker: {
      wire::OpenGpuWorkerT body;
      body.gpu_uuid = "GPU-01234567-89ab-cdef-0123-456789abcdef";
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::GpuWorkerReply: {
      wire::GpuWorkerReplyT body;
      body.pid = 4711;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::LaneInUse: {
      wire::LaneInUseT body;
      body.lane = "hbm";
      body.reason = "it was asked for";
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::ServeClient: {
      wire::ServeClientT body;
      body.arena_bytes = std::uint64_t{1} << 34;
      body.slot_bytes = std::uint64_t{1} << 33;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::GpuWorkerReady: {
      wire::GpuWorkerReadyT body;
      body.failure = std::make_unique<wire::FailureT>();
      body.failure->code = 3;
      body.failure->native = 100;
      body.failure->message = "no NVIDIA driver";
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::GpuWorkerIdle: {
      wire::GpuWorkerIdleT body;
      body.served_count = 3;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::MakeGpuRing: {
      wire::MakeGpuRingT body;
      body.bytes = std::uint64_t{1} << 33;
      body.bytes_min = std::uint64_t{1} << 27;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::GpuRingReply: {
      wire::GpuRingReplyT body;
      body.bytes = std::uint64_t{1} << 32;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::DrainGpuRing: {
      wire::DrainGpuRingT body;
      body.ring_offset = 4096;
      body.arena_offset = std::uint64_t{1} << 33;
      body.bytes = std::uint64_t{1} << 26;
      body.is_hurried = true;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::PlanGpu: {
      wire::PlanGpuT body;
      body.plan_bytes = 640;
      body.words_bytes = 4096;
      body.word = 7;
      body.ring_bytes = std::uint64_t{1} << 30;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::LeaseGpu: {
      wire::LeaseGpuT body;
      body.handles.assign(64, 0x5a);
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::CaptureGpu: {
      wire::CaptureGpuT body;
      body.arena_offset = std::uint64_t{1} << 33;
      body.fence_value = 9;
      body.is_trial = true;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::GpuChunk: {
      wire::GpuChunkT body;
      body.chunk = 2;
      body.hashes = {0x0123456789abcdef, 1};
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::HurryGpu: {
      wire::HurryGpuT hurry;
      hurry.is_for_all = true;
      return make_message(kRequest, std::move(hurry));
    }
    case wire::Body::EndCapture: {
      wire::EndCaptureT body;
      body.ticket = 6;
      body.complete = true;
      body.reason = "CUDA error 700";
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::SaveEnded: {
      wire::SaveEndedT body;
      body.ticket = 6;
      body.sequence = 13;
      body.failure = std::make_unique<wire::FailureT>();
      body.failure->code = 4;
      body.failure->native = 5;
      body.failure->message = "fsync part: Input/output error";
      body.durable_ns = 123'456'789;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::Settle: {
      wire::SettleT body;
      body.timeout_ms = 60'000;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::SettleReply: {
      wire::SettleReplyT body;
      body.newest_sequence = 13;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::LendSlot: {
      wire::LendSlotT body;
      body.sequence = 13;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::LendSlotReply: {
      wire::LendSlotReplyT body;
      body.found = true;
      body.slot = 1;
      body.layout_id = 9;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::ReturnSlot: {
      wire::ReturnSlotT body;
      body.slot = 1;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::Retire: {
      wire::RetireT body;
      body.run_path = "/data/run1";
      body.sequence = 4;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::SetTag: {
      wire::SetTagT body;
      body.run_path = "/data/run1";
      body.tag = "paper";
      body.sequence = 4;
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::Done: return make_message(kRequest, wire::DoneT());
    case wire::Body::Status: return make_message(kRequest, wire::StatusT());
    case wire::Body::StatusReply: {
      wire::StatusReplyT body;
      body.json = R"({"runs": []})";
      return make_message(kRequest, std::move(body));
    }
    case wire::Body::Detach: return make_message(kRequest, wire::DetachT());
  }
  check(false, "there is an example of each kind");
  return {};
}

// Every kind of message there is.
inline std::vector<wire::Body> message_kinds() {
  std::vector<wire::Body> kinds;
  for (const wire::Body kind : wire::EnumValuesBody()) {
    if (kind != wire::Body::NONE) kinds.push_back(kind);
  }
  return kinds;
}

inline std::unique_ptr<wire::TensorT> example_tensor(std::string name,
                                                     std::vector<std::uint64_t> shape) {
  auto tensor = std::make_unique<wire::TensorT>();
  tensor->name = std::move(name);
  tensor->dtype = 14;  // F32
  tensor->shape = std::move(shape);
  return tensor;
}

inline wire::LayoutT example_layout() {
  wire::LayoutT layout;
  for (const char* const name : {"model", "optimizer"}) {
    auto part = std::make_unique<wire::PartT>();
    part->name = name;
    part->tensors.push_back(example_tensor("weight", {2, 3}));
    part->tensors.push_back(example_tensor("step", {}));
    part->metadata.push_back(std::make_unique<wire::MetadataEntryT>());
    part->metadata.back()->key = "format";
    part->metadata.back()->value = "pt";
    layout.parts.push_back(std::move(part));
  }
  return layout;
}

}  // namespace stillframe::shm
