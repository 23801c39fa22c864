#include "shm/messages.h"

#include <gtest/gtest.h>

#include <chrono>
#include <iostream>

#include "base/text.h"
#include "tests/format/seed.h"
#include "tests/fuzz/targets.h"
#include "tests/shm/example_messages.h"

namespace stillframe::shm {
namespace {

using format::pick;
using format::seeded_generator;

ConstBytes Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

std::string Finished(flatbuffers::FlatBufferBuilder& builder) {
  return {reinterpret_cast<const char*>(builder.GetBufferPointer()), builder.GetSize()};
}

Code RefusalOfMessage(const std::string& packet) {
  const auto message = decode_message(Bytes(packet));
  EXPECT_FALSE(message);
  return message ? Code::kInternal : message.error().code();
}

Code RefusalOfLayout(const std::string& blob) {
  const auto layout = decode_layout(Bytes(blob));
  EXPECT_FALSE(layout);
  return layout ? Code::kInternal : layout.error().code();
}

TEST(Messages, of_every_kind_come_back_as_they_were) {
  for (const wire::Body kind : message_kinds()) {
    const auto packet = encode(example_message(kind));
    ASSERT_TRUE(packet) << packet.error().message();
    const auto message = decode_message(Bytes(*packet));
    ASSERT_TRUE(message) << wire::EnumNameBody(kind) << ": " << message.error().message();
    EXPECT_EQ(message->request, 77U);
    EXPECT_EQ(message->body.type, kind);
    // The encoder is deterministic and every member differs from its default.
    EXPECT_EQ(encode(*message).operator*(), *packet) << wire::EnumNameBody(kind);
  }
}

TEST(Messages, keep_their_members) {
  const auto packet = encode(example_message(wire::Body::Attach));
  const auto message = decode_message(Bytes(*packet));
  ASSERT_TRUE(message);
  const wire::AttachT& attach = *message->body.AsAttach();
  EXPECT_EQ(attach.run_path, "/data/run1");
  EXPECT_EQ(attach.rank, 3U);
  EXPECT_EQ(attach.world_size, 8U);
  EXPECT_EQ(attach.keep_every, 100U);
  ASSERT_EQ(attach.best.size(), 1U);
  EXPECT_EQ(attach.best[0]->metric, "loss");
  EXPECT_TRUE(attach.best[0]->is_max);
  EXPECT_EQ(attach.best[0]->count, 2U);
  EXPECT_EQ(attach.arena_bytes_max, std::uint64_t{1} << 40);

  const auto begin_packet = encode(example_message(wire::Body::BeginSave));
  const auto begin = decode_message(Bytes(*begin_packet));
  ASSERT_TRUE(begin);
  ASSERT_EQ(begin->body.AsBeginSave()->metrics.size(), 2U);
  EXPECT_EQ(begin->body.AsBeginSave()->metrics[1]->value, -1e300);
}

TEST(Messages, may_lie_at_any_address) {
  const auto packet = encode(example_message(wire::Body::BeginSave));
  for (std::size_t shift = 0; shift < 16; ++shift) {
    const std::string shifted = std::string(shift, 'x') + *packet;
    EXPECT_TRUE(decode_message(Bytes(shifted).subspan(shift))) << shift;
  }
}

TEST(Messages, without_a_member_that_is_a_text_or_a_list_have_an_empty_one) {
  flatbuffers::FlatBufferBuilder builder;
  for (const auto type : {wire::Body::Attach, wire::Body::AttachReply, wire::Body::BeginSave,
                          wire::Body::SaveEnded, wire::Body::Failure}) {
    builder.Clear();
    const auto empty_table = builder.EndTable(builder.StartTable());
    builder.Finish(wire::CreateMessage(builder, 1, type, empty_table));
    const auto message = decode_message(Bytes(Finished(builder)));
    ASSERT_TRUE(message) << wire::EnumNameBody(type);
    EXPECT_TRUE(encode(*message));
  }
}

TEST(Messages, without_a_body_are_refused) {
  EXPECT_EQ(RefusalOfMessage(*encode(wire::MessageT())), Code::kInvalidArgument);

  // A type alone, which the verifier lets pass.
  flatbuffers::FlatBufferBuilder builder;
  wire::MessageBuilder message(builder);
  message.add_body_type(wire::Body::Hello);
  builder.Finish(message.Finish());
  EXPECT_EQ(RefusalOfMessage(Finished(builder)), Code::kInvalidArgument);
}

TEST(Messages, with_a_body_of_an_unknown_type_are_refused) {
  for (const int type : {static_cast<int>(wire::Body::MAX) + 1, 255}) {
    flatbuffers::FlatBufferBuilder builder;
    const auto table = builder.EndTable(builder.StartTable());
    builder.Finish(wire::CreateMessage(builder, 1, static_cast<wire::Body>(type), table));
    EXPECT_EQ(RefusalOfMessage(Finished(builder)), Code::kInvalidArgument);
  }
}

TEST(Messages, of_64_KiB_pass_and_larger_ones_are_refused) {
  const auto reply_of = [](std::size_t bytes) {
    wire::StatusReplyT body;
    body.json.assign(bytes, 'x');
    return make_message(1, std::move(body));
  };
  const auto empty = encode(reply_of(0));
  ASSERT_TRUE(empty);
  // The text's length, end and padding.
  const std::size_t room = kMessageBytesMax - empty->size() - 16;
  const auto largest = encode(reply_of(room));
  ASSERT_TRUE(largest) << largest.error().message();
  EXPECT_GT(largest->size(), kMessageBytesMax - 16);
  EXPECT_TRUE(decode_message(Bytes(*largest)));

  const auto larger = encode(reply_of(kMessageBytesMax));
  ASSERT_FALSE(larger);
  EXPECT_EQ(larger.error().code(), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOfMessage(*largest + std::string(kMessageBytesMax, '\0')),
            Code::kInvalidArgument);
}

TEST(Messages, that_would_unpack_to_much_more_than_they_are_get_refused) {
  // 8000 warnings that are one text of 16 KiB: 128 MiB.
  flatbuffers::FlatBufferBuilder builder;
  const auto text = builder.CreateString(std::string(std::size_t{16} << 10, 'x'));
  const auto warnings =
      builder.CreateVector(std::vector<flatbuffers::Offset<flatbuffers::String>>(8000, text));
  const auto body = wire::CreateAttachReply(builder, 0, 0, warnings).Union();
  builder.Finish(wire::CreateMessage(builder, 1, wire::Body::AttachReply, body));
  ASSERT_LE(builder.GetSize(), kMessageBytesMax);
  EXPECT_EQ(RefusalOfMessage(Finished(builder)), Code::kInvalidArgument);

  // The same with metrics, which share the table too.
  builder.Clear();
  const auto name = builder.CreateString(std::string(std::size_t{16} << 10, 'x'));
  const auto metric = wire::CreateMetric(builder, name, 1.0);
  const auto metrics =
      builder.CreateVector(std::vector<flatbuffers::Offset<wire::Metric>>(3000, metric));
  const auto save = wire::CreateBeginSave(builder, 1, metrics).Union();
  builder.Finish(wire::CreateMessage(builder, 1, wire::Body::BeginSave, save));
  ASSERT_LE(builder.GetSize(), kMessageBytesMax);
  EXPECT_EQ(RefusalOfMessage(Finished(builder)), Code::kInvalidArgument);
}

TEST(Messages, that_share_the_name_of_a_criterion_are_refused) {
  flatbuffers::FlatBufferBuilder builder;
  const auto name = builder.CreateString(std::string(std::size_t{16} << 10, 'x'));
  const auto keep = wire::CreateBestKeep(builder, name, true, 1);
  const auto best =
      builder.CreateVector(std::vector<flatbuffers::Offset<wire::BestKeep>>(3000, keep));
  wire::AttachBuilder attach(builder);
  attach.add_best(best);
  const auto body = attach.Finish().Union();
  builder.Finish(wire::CreateMessage(builder, 1, wire::Body::Attach, body));
  ASSERT_LE(builder.GetSize(), kMessageBytesMax);
  EXPECT_EQ(RefusalOfMessage(Finished(builder)), Code::kInvalidArgument);
}

// Found by the fuzzer: the verifier does not look at it, and unpacking reads them as numbers.
TEST(Messages, whose_hashes_are_not_aligned_are_refused) {
  wire::GpuChunkT chunk;
  chunk.hashes = {0x0123456789ABCDEFU, 2};
  std::string packet = *encode(make_message(1, chunk));
  ASSERT_TRUE(decode_message(Bytes(packet)));
  // The vector begins four bytes earlier: its length, then the numbers, with room behind them.
  const std::string numbers("\x02\0\0\0\xEF\xCD\xAB\x89", 8);
  const std::size_t at = packet.find(numbers);
  ASSERT_NE(at, std::string::npos);
  packet.insert(at, 4, '\0');
  const auto* root = flatbuffers::GetRoot<wire::Message>(packet.data());
  const auto* body = root->body_as_GpuChunk();
  const auto field = static_cast<std::size_t>(
      reinterpret_cast<const char*>(body) - packet.data() +
      reinterpret_cast<const flatbuffers::Table*>(body)->GetOptionalFieldOffset(
          wire::GpuChunk::VT_HASHES));
  const auto offset = static_cast<std::uint32_t>(at + 4 - field);
  std::memcpy(packet.data() + field, &offset, sizeof offset);
  EXPECT_EQ(RefusalOfMessage(packet), Code::kInvalidArgument);
}

TEST(Messages, cut_anywhere_do_no_harm) {
  for (const wire::Body kind : message_kinds()) {
    const auto packet = encode(example_message(kind));
    for (std::size_t bytes = 0; bytes < packet->size(); ++bytes) {
      // The heap copy is exactly as long as the packet, so that a sanitizer sees one byte too many.
      const std::string cut(packet->data(), bytes);
      (void)fuzz::control_message(Bytes(cut));
    }
  }
  EXPECT_EQ(RefusalOfMessage(""), Code::kInvalidArgument);
}

// Four bytes at a time, because lengths and offsets are what misleads a reader.
std::string Mutated(std::string bytes, std::mt19937_64& random) {
  for (std::uint64_t changes = 1 + pick(random, 3); changes > 0; --changes) {
    const std::size_t at = pick(random, bytes.size());
    switch (pick(random, 4)) {
      case 0: bytes[at] = static_cast<char>(bytes[at] ^ (1 << pick(random, 8))); break;
      case 1: bytes.resize(std::max<std::size_t>(at, 1)); break;
      case 2: bytes.insert(at, bytes.substr(pick(random, bytes.size()), pick(random, 16))); break;
      default: {
        const std::uint32_t interesting[] = {0,          1,          4,          0x7fffffff,
                                             0x80000000, 0xffffffff, 0xfffffffc, 0x10000};
        const std::uint32_t value = pick(random, 2) == 0
                                        ? interesting[pick(random, std::size(interesting))]
                                        : static_cast<std::uint32_t>(pick(random, bytes.size()));
        const std::size_t start = at - at % 4;
        std::memcpy(bytes.data() + start, &value, std::min<std::size_t>(4, bytes.size() - start));
      }
    }
  }
  return bytes;
}

TEST(Messages, mutated_at_random_do_no_harm) {
  std::mt19937_64 random = seeded_generator();
  std::vector<std::string> packets;
  for (const wire::Body kind : message_kinds()) {
    packets.push_back(*encode(example_message(kind)));
  }
  const std::string layout = *encode(example_layout());
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  std::uint64_t inputs = 0;
  std::uint64_t accepted = 0;
  while (std::chrono::steady_clock::now() < deadline) {
    const std::string packet = Mutated(packets[pick(random, packets.size())], random);
    if (fuzz::control_message(Bytes(packet))) ++accepted;
    if (fuzz::layout_blob(Bytes(Mutated(layout, random)))) ++accepted;
    inputs += 2;
  }
  std::cout << inputs << " inputs, " << accepted << " accepted\n";
  EXPECT_GT(inputs, 100U);
  EXPECT_GT(accepted, 0U) << "then nothing but the first check was tested";
  EXPECT_LT(accepted, inputs);
}

TEST(Layouts, come_back_as_they_were) {
  const auto blob = encode(example_layout());
  ASSERT_TRUE(blob);
  const auto layout = decode_layout(Bytes(*blob));
  ASSERT_TRUE(layout) << layout.error().message();
  ASSERT_EQ(layout->parts.size(), 2U);
  EXPECT_EQ(layout->parts[1]->name, "optimizer");
  ASSERT_EQ(layout->parts[0]->tensors.size(), 2U);
  EXPECT_EQ(layout->parts[0]->tensors[0]->shape, (std::vector<std::uint64_t>{2, 3}));
  EXPECT_EQ(layout->parts[0]->tensors[1]->shape, std::vector<std::uint64_t>());
  EXPECT_EQ(layout->parts[0]->metadata[0]->value, "pt");
  EXPECT_EQ(*encode(*layout), *blob);
}

TEST(Layouts, of_a_million_tensors_pass) {
  constexpr std::size_t kCount = 1'000'000;
  wire::LayoutT layout;
  layout.parts.push_back(std::make_unique<wire::PartT>());
  layout.parts[0]->name = "model";
  for (std::size_t i = 0; i < kCount; ++i) {
    layout.parts[0]->tensors.push_back(
        example_tensor(concat("model.layers.", i, ".mlp.down_proj.weight"), {i, 2}));
  }
  const auto blob = encode(layout);
  ASSERT_TRUE(blob) << blob.error().message();
  const auto again = decode_layout(Bytes(*blob));
  ASSERT_TRUE(again) << again.error().message();
  ASSERT_EQ(again->parts[0]->tensors.size(), kCount);
  EXPECT_EQ(again->parts[0]->tensors[kCount - 1]->shape[0], kCount - 1);
}

TEST(Layouts, that_would_unpack_to_much_more_than_they_are_get_refused) {
  // 10^5 tensors that share a name of 1 MiB: 100 GiB.
  flatbuffers::FlatBufferBuilder builder;
  const auto name = builder.CreateString(std::string(std::size_t{1} << 20, 'x'));
  const auto tensor = wire::CreateTensor(builder, name, 14);
  const auto tensors =
      builder.CreateVector(std::vector<flatbuffers::Offset<wire::Tensor>>(100'000, tensor));
  const auto part = wire::CreatePart(builder, 0, tensors);
  builder.Finish(wire::CreateLayout(
      builder, builder.CreateVector(std::vector<flatbuffers::Offset<wire::Part>>{part})));
  EXPECT_EQ(RefusalOfLayout(Finished(builder)), Code::kInvalidArgument);
}

TEST(Layouts, that_repeat_their_tables_for_ever_are_refused) {
  // 2000 parts that are one, with 2000 tensors that are one: 4 million tables in 16 KiB.
  flatbuffers::FlatBufferBuilder builder;
  const auto tensor = wire::CreateTensor(builder, 0, 14);
  const auto part = wire::CreatePart(
      builder, 0,
      builder.CreateVector(std::vector<flatbuffers::Offset<wire::Tensor>>(2000, tensor)));
  builder.Finish(wire::CreateLayout(
      builder, builder.CreateVector(std::vector<flatbuffers::Offset<wire::Part>>(2000, part))));
  EXPECT_EQ(RefusalOfLayout(Finished(builder)), Code::kInvalidArgument);
}

TEST(Layouts, whose_numbers_are_not_aligned_are_refused) {
  std::size_t refused_count = 0;
  for (const std::uint32_t padding_count : {2U, 3U}) {
    // The builder works backwards, so the padding lies behind the shape and shifts it by 4 bytes
    // each. A list of half as wide numbers gets only half the alignment.
    flatbuffers::FlatBufferBuilder builder;
    (void)builder.CreateVector(std::vector<std::uint64_t>(16, 0));
    for (std::uint32_t i = 0; i < padding_count; ++i) builder.PushElement(i);
    const auto shape = builder.CreateVector(std::vector<std::uint32_t>{1, 0, 2, 0});
    const auto tensor = wire::CreateTensor(builder, 0, 14, shape.o);
    const auto part = wire::CreatePart(
        builder, 0, builder.CreateVector(std::vector<flatbuffers::Offset<wire::Tensor>>{tensor}));
    builder.Finish(wire::CreateLayout(
        builder, builder.CreateVector(std::vector<flatbuffers::Offset<wire::Part>>{part})));
    const std::string blob = Finished(builder);
    const auto layout = decode_layout(Bytes(blob));
    if (layout) {
      EXPECT_EQ(layout->parts[0]->tensors[0]->shape.at(0), 1U);
    } else {
      EXPECT_EQ(layout.error().code(), Code::kInvalidArgument);
      ++refused_count;
    }
  }
  EXPECT_EQ(refused_count, 1U) << "one of the two shapes is aligned by chance";
}

TEST(Layouts, without_an_entry_where_one_should_be_are_not_encoded) {
  wire::LayoutT layout = example_layout();
  layout.parts[1]->tensors[0].reset();
  const auto blob = encode(layout);
  ASSERT_FALSE(blob);
  EXPECT_EQ(blob.error().code(), Code::kInvalidArgument);
}

TEST(Failures, carry_an_error_to_the_other_side) {
  const Error error(Code::kDataLoss, "extent 3", 5);
  const Error again = from_wire(to_wire(error));
  EXPECT_EQ(again.code(), Code::kDataLoss);
  EXPECT_EQ(again.message(), "extent 3");
  EXPECT_EQ(again.native(), 5);
}

TEST(Failures, of_a_code_that_we_do_not_know_are_internal) {
  wire::FailureT failure;
  failure.code = 200;
  EXPECT_EQ(from_wire(failure).code(), Code::kInternal);
}

TEST(Failures, are_cut_between_two_characters) {
  // Two bytes each, so that the limit falls inside one when they begin at an odd place.
  std::string text = "x";
  while (text.size() < 2 * kErrorMessageBytesMax) text += "\xc3\xa9";
  const std::string message = to_wire(Error(Code::kInternal, text)).message;
  EXPECT_EQ(message.size(), kErrorMessageBytesMax - 1);
  EXPECT_TRUE(text.starts_with(message));
  EXPECT_EQ(message.back(), '\xa9');
}

}  // namespace
}  // namespace stillframe::shm
