// Clients that lie to a GPU's worker. Built twice, for the simulated driver and for a real GPU
// (scripts/gpu-bundle).
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "cuda/context.h"
#include "cuda/devices.h"
#include "cuda/resources.h"
#include "cuda/shared_buffer.h"
#include "shm/gpu_plan.h"
#include "shm/sealed_memory.h"
#include "tests/daemon/hostile_client.h"

namespace stillframe::testing {
namespace {

#ifdef STILLFRAME_SIMULATED_CUDA
const DaemonProcess::Variables kVariables = {{"LD_LIBRARY_PATH", STILLFRAME_SIMULATED_CUDA}};
// Whoever asks for libcuda.so.1 from now on gets this one.
void find_driver() { (void)::dlopen(STILLFRAME_SIMULATED_CUDA "/libcuda.so.1", RTLD_LAZY); }
std::string first_gpu() { return "GPU-50505050-5050-5050-5050-505050505050"; }
#else
const DaemonProcess::Variables kVariables;
void find_driver() {}
std::string first_gpu() {
  auto driver = cuda::Driver::load();
  EXPECT_TRUE(driver);
  const auto devices = driver ? cuda::list_devices(**driver) : std::move(driver).error();
  return devices && !devices->empty() ? devices->front().uuid : "";
}
#endif
constexpr std::uint64_t kRingBytes = 4U << 20U;

class HostileGpuClient : public HostileClient {
 protected:
  DaemonProcess::Variables variables() const override { return kVariables; }
  std::optional<shm::Packet> ask_for_worker(Peer& peer, const std::string& uuid) {
    wire::OpenGpuWorkerT request;
    request.gpu_uuid = uuid;
    return peer.ask(std::move(request));
  }
  // A client with a layout, and its connection to the worker.
  std::unique_ptr<Peer> with_worker(Peer& peer) {
    EXPECT_TRUE(peer.register_layout(2'500'000));
    auto answered = ask_for_worker(peer, first_gpu());
    EXPECT_TRUE(answered && answered->fds.size() == 1);
    if (!answered || answered->fds.size() != 1) return nullptr;
    return std::make_unique<Peer>(std::move(answered->fds[0]));
  }
  static wire::MakeGpuRingT ring_of(std::uint64_t bytes) {
    wire::MakeGpuRingT request;
    request.bytes = bytes;
    request.bytes_min = bytes;
    return request;
  }
};

TEST_F(HostileGpuClient, without_a_layout_is_refused) {
  auto peer = attached();
  auto answered = ask_for_worker(*peer, first_gpu());
  ASSERT_TRUE(answered);
  EXPECT_EQ(answered->message.body.type, wire::Body::Failure);
}

TEST_F(HostileGpuClient, that_names_no_gpu_is_refused) {
  auto peer = attached();
  ASSERT_TRUE(peer->register_layout(1'000));
  for (const std::string& uuid :
       {std::string(), std::string("0"), std::string("GPU-/../x"),
        std::string("GPU-0 --io=threads"), "GPU-" + std::string(100, 'a'),
        std::string("MIG-50505050"), std::string("GPU-00000000-0000-0000-0000-000000000000")}) {
    auto answered = ask_for_worker(*peer, uuid);
    ASSERT_TRUE(answered) << uuid;
    EXPECT_EQ(answered->message.body.type, wire::Body::Failure) << uuid;
  }
}

TEST_F(HostileGpuClient, that_wants_more_than_the_gpu_has_is_refused) {
  auto peer = attached();
  auto worker = with_worker(*peer);
  ASSERT_TRUE(worker);
  auto answered = worker->ask(ring_of(std::uint64_t{1} << 40U));
  ASSERT_TRUE(answered);
  EXPECT_EQ(answered->message.body.type, wire::Body::Failure);
  // And may ask for less.
  answered = worker->ask(ring_of(kRingBytes));
  ASSERT_TRUE(answered);
  EXPECT_EQ(answered->message.body.type, wire::Body::GpuRingReply);
}

TEST_F(HostileGpuClient, that_sends_what_is_not_for_a_worker_is_dropped) {
  auto peer = attached();
  auto worker = with_worker(*peer);
  ASSERT_TRUE(worker);
  worker->send(wire::StatusT());
  EXPECT_TRUE(worker->is_dropped());
}

TEST_F(HostileGpuClient, that_drains_before_it_has_a_ring_is_dropped) {
  auto peer = attached();
  auto worker = with_worker(*peer);
  ASSERT_TRUE(worker);
  wire::DrainGpuRingT drain;
  drain.bytes = 1;
  worker->send(std::move(drain));
  EXPECT_TRUE(worker->is_dropped());
}

TEST_F(HostileGpuClient, that_drains_outside_of_its_ring_or_a_slot_is_dropped) {
  struct Lie {
    std::uint64_t ring_offset, arena_offset, bytes;
  };
  constexpr std::uint64_t kFar = ~std::uint64_t{0};
  const std::uint64_t slot_bytes = 4U << 20U;  // Of a layout of 2.5 MB.
  for (const Lie& lie : {Lie{kRingBytes, 0, 1}, Lie{1, 0, kRingBytes}, Lie{kFar, 0, 2},
                         Lie{0, kFar, 2}, Lie{0, 0, kFar}, Lie{0, 0, 0}, Lie{0, 2 * slot_bytes, 1},
                         Lie{0, slot_bytes - 1, 2}, Lie{0, 1, slot_bytes}}) {
    auto peer = attached();
    auto worker = with_worker(*peer);
    ASSERT_TRUE(worker);
    auto made = worker->ask(ring_of(kRingBytes));
    ASSERT_TRUE(made);
    ASSERT_EQ(made->message.body.type, wire::Body::GpuRingReply);
    wire::DrainGpuRingT drain;
    drain.ring_offset = lie.ring_offset;
    drain.arena_offset = lie.arena_offset;
    drain.bytes = lie.bytes;
    worker->send(std::move(drain));
    EXPECT_TRUE(worker->is_dropped())
        << lie.ring_offset << ' ' << lie.arena_offset << ' ' << lie.bytes;
    // The worker serves others on.
    wire::DetachT detach;
    EXPECT_TRUE(peer->ask(std::move(detach)));
  }
}

TEST_F(HostileGpuClient, that_goes_during_its_copies_leaves_nothing_behind) {
  auto peer = attached();
  auto worker = with_worker(*peer);
  ASSERT_TRUE(worker);
  for (int round = 0; round < 20; ++round) {
    auto made = worker->ask(ring_of(kRingBytes));
    ASSERT_TRUE(made);
    ASSERT_EQ(made->message.body.type, wire::Body::GpuRingReply) << "round " << round;
    for (int i = 0; i < 10; ++i) {
      wire::DrainGpuRingT drain;
      drain.bytes = 2'000'000;
      drain.is_hurried = true;
      worker->send(std::move(drain));
    }
    auto answered = ask_for_worker(*peer, first_gpu());
    ASSERT_TRUE(answered && answered->fds.size() == 1);
    worker = std::make_unique<Peer>(std::move(answered->fds[0]));
  }
}

// --- Lane ipc ------------------------------------------------------------------------------------

class HostileLender : public HostileGpuClient {
 protected:
  // One allocation of 8 KiB, packed to an image of as much.
  static shm::GpuPlan small_plan() {
    return {.parts = {{.image_bytes = 8192, .slot_offset = 0, .piece_count = 1}},
            .chunks = {{.part = 0, .first_extent = 0, .extent_count = 1}},
            .allocation_bytes = {0, 8192},
            .pieces = {{.allocation = 1, .offset = 0, .image_offset = 0, .bytes = 8192}}};
  }
  std::optional<shm::Packet> ask_plan(Peer& worker, const shm::GpuPlan& plan,
                                      std::uint32_t word = 0) {
    const std::string blob = shm::encode(plan);
    auto memory = shm::make_sealed_memfd("plan", blob);
    auto words = shm::make_memfd("words");
    EXPECT_TRUE(memory && words);
    EXPECT_TRUE(shm::set_length_and_seal(words->get(), 4096, shm::kLengthSeals));
    wire::PlanGpuT request;
    request.plan_bytes = blob.size();
    request.words_bytes = 4096;
    request.word = word;
    return worker.ask(std::move(request), {memory->get(), words->get()});
  }
  static wire::LeaseGpuT lease_of(std::size_t bytes, std::uint8_t value) {
    wire::LeaseGpuT lease;
    lease.handles.assign(bytes, value);
    return lease;
  }
};

TEST_F(HostileLender, whose_plan_does_not_fit_is_refused_and_may_plan_again) {
  auto peer = attached();
  auto worker = with_worker(*peer);
  ASSERT_TRUE(worker);
  shm::GpuPlan beyond_slot = small_plan();
  beyond_slot.parts[0].slot_offset = std::uint64_t{1} << 40U;
  shm::GpuPlan beyond_allocation = small_plan();
  beyond_allocation.pieces[0].offset = 1;
  shm::GpuPlan with_gap = small_plan();
  with_gap.pieces[0].bytes = 8000;
  shm::GpuPlan of_own_memory = small_plan();
  of_own_memory.allocation_bytes[0] = 4096;
  for (const shm::GpuPlan& plan :
       {beyond_slot, beyond_allocation, with_gap, of_own_memory, shm::GpuPlan()}) {
    auto answered = ask_plan(*worker, plan);
    ASSERT_TRUE(answered);
    EXPECT_EQ(answered->message.body.type, wire::Body::Failure);
  }
  auto answered = ask_plan(*worker, small_plan(), 1024);
  ASSERT_TRUE(answered);
  EXPECT_EQ(answered->message.body.type, wire::Body::Failure);
  answered = ask_plan(*worker, small_plan());
  ASSERT_TRUE(answered);
  EXPECT_EQ(answered->message.body.type, wire::Body::Done);
}

TEST_F(HostileLender, whose_handles_are_nobodys_is_refused) {
  auto peer = attached();
  auto worker = with_worker(*peer);
  ASSERT_TRUE(worker);
  ASSERT_TRUE(ask_plan(*worker, small_plan()));
  // Not one, a part of one, too many, random, and with a descriptor of something else.
  for (const std::size_t bytes :
       {std::size_t{0}, std::size_t{63}, std::size_t{64}, std::size_t{128}, std::size_t{6400}}) {
    for (const std::uint8_t value : {std::uint8_t{0}, std::uint8_t{0x5A}, std::uint8_t{0xFF}}) {
      worker->send(lease_of(bytes, value));
      wire::CaptureGpuT capture;
      auto answered = worker->ask(std::move(capture));
      ASSERT_TRUE(answered) << bytes;
      EXPECT_EQ(answered->message.body.type, wire::Body::Failure) << bytes;
    }
  }
  auto other = shm::make_sealed_memfd("other", std::string(8192, 'x'));
  ASSERT_TRUE(other);
  worker->send(wire::LeaseGpuT(), {other->get()});
  auto answered = worker->ask(wire::CaptureGpuT());
  ASSERT_TRUE(answered);
  EXPECT_EQ(answered->message.body.type, wire::Body::Failure);
}

// As a client's cache of handles would have them (GPU-2).
TEST_F(HostileLender, whose_handle_is_of_memory_that_was_freed_is_refused) {
  constexpr std::uint64_t kBytes = 8U << 20U;  // No neighbours in what the driver maps for it.
  find_driver();
  const auto driver = cuda::Driver::load();
  ASSERT_TRUE(driver) << driver.error().message();
  const auto context = cuda::Context::retain(*driver, 0);
  ASSERT_TRUE(context) << context.error().message();
  auto peer = attached();
  auto worker = with_worker(*peer);
  ASSERT_TRUE(worker);
  shm::GpuPlan plan = small_plan();
  plan.allocation_bytes[1] = kBytes;
  ASSERT_TRUE(ask_plan(*worker, plan));
  const auto answer_to = [&worker](const cuda::IpcHandle& handle) {
    wire::LeaseGpuT lease;
    lease.handles.resize(sizeof handle);
    std::memcpy(lease.handles.data(), &handle, sizeof handle);
    worker->send(std::move(lease));
    wire::CaptureGpuT capture;
    capture.is_trial = true;
    auto answered = worker->ask(std::move(capture));
    return answered ? answered->message.body.type : wire::Body::NONE;
  };
  for (int round = 0; round < 3; ++round) {
    auto memory = cuda::allocate(*context, kBytes);
    ASSERT_TRUE(memory) << memory.error().message();
    const auto handle = cuda::ipc_handle_of(**context, memory->get());
    ASSERT_TRUE(handle) << handle.error().message();
    EXPECT_EQ(answer_to(*handle), wire::Body::Done);
    memory = cuda::DeviceBuffer();
    EXPECT_EQ(answer_to(*handle), wire::Body::Failure);
  }
}

TEST_F(HostileLender, that_leases_or_captures_without_a_plan_is_dropped) {
  auto peer = attached();
  auto worker = with_worker(*peer);
  ASSERT_TRUE(worker);
  worker->send(lease_of(64, 1));
  EXPECT_TRUE(worker->is_dropped());
  auto answered = ask_for_worker(*peer, first_gpu());
  ASSERT_TRUE(answered && answered->fds.size() == 1);
  worker = std::make_unique<Peer>(std::move(answered->fds[0]));
  worker->send(wire::CaptureGpuT());
  EXPECT_TRUE(worker->is_dropped());
}

}  // namespace
}  // namespace stillframe::testing
