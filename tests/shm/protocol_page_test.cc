// Decodes the worked examples of docs/PROTOCOL.md from the page itself, so that the page cannot
// drift from the code. On a difference it prints the block as the code would have it.

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>

#include "base/hash.h"
#include "base/text.h"
#include "shm/channel.h"
#include "shm/messages.h"
#include "shm/ring.h"
#include "tests/shm/example_messages.h"

namespace stillframe::shm {
namespace {

std::string ReadPage() {
  std::ifstream page(STILLFRAME_SOURCE_DIR "/docs/PROTOCOL.md", std::ios::binary);
  return {std::istreambuf_iterator<char>(page), std::istreambuf_iterator<char>()};
}

// The text between "```<label>\n" and "```".
std::string Block(std::string_view label) {
  const std::string page = ReadPage();
  const std::string fence = concat("```", label, "\n");
  const std::size_t start = page.find(fence);
  EXPECT_NE(start, std::string::npos) << "no block " << label;
  if (start == std::string::npos) return {};
  const std::size_t text = start + fence.size();
  return page.substr(text, page.find("```", text) - text);
}

// An offset and up to 16 bytes a line.
std::string Dump(std::string_view bytes) {
  std::string text;
  for (std::size_t offset = 0; offset < bytes.size(); offset += 16) {
    text += to_hex(std::uint64_t{offset}).substr(12) + " ";
    for (const char byte : bytes.substr(offset, 16)) {
      text += " " + to_hex(std::uint64_t{static_cast<unsigned char>(byte)}).substr(14);
    }
    text += '\n';
  }
  return text;
}

std::string Undump(const std::string& dump) {
  std::string bytes;
  std::istringstream lines(dump);
  for (std::string line; std::getline(lines, line);) {
    EXPECT_EQ(std::stoull(line.substr(0, 4), nullptr, 16), bytes.size()) << line;
    std::istringstream digits(line.substr(4));
    for (std::string pair; digits >> pair;) {
      bytes.push_back(static_cast<char>(std::stoul(pair, nullptr, 16)));
    }
  }
  return bytes;
}

void ExpectBlock(std::string_view label, const std::string& bytes) {
  EXPECT_EQ(Block(label), Dump(bytes)) << "write this:\n```" << label << '\n'
                                       << Dump(bytes) << "```";
}

wire::MessageT ExampleHello() {
  wire::HelloT body;
  body.protocol_version = 1;
  body.version = "0.1.0";
  body.role = "trainer";
  return make_message(1, std::move(body));
}

TEST(ProtocolPage, shows_the_hello_that_the_code_writes) {
  const auto packet = encode(ExampleHello());
  ASSERT_TRUE(packet);
  ExpectBlock("hex Hello", *packet);
}

TEST(ProtocolPage, shows_a_hello_that_decodes_to_its_members) {
  const std::string packet = Undump(Block("hex Hello"));
  const auto message = decode_message(std::as_bytes(std::span(packet)));
  ASSERT_TRUE(message) << message.error().message();
  EXPECT_EQ(message->request, 1U);
  const wire::HelloT* const hello = message->body.AsHello();
  ASSERT_NE(hello, nullptr);
  EXPECT_EQ(hello->protocol_version, kProtocolVersion);
  EXPECT_EQ(hello->version, "0.1.0");
  EXPECT_EQ(hello->role, "trainer");
}

TEST(ProtocolPage, shows_the_ring_that_the_code_writes) {
  auto ring = RingConsumer::create(64);
  ASSERT_TRUE(ring);
  const UniqueFd memory(::dup(ring->memory_fd()));
  auto producer =
      RingProducer::open(UniqueFd(::dup(memory.get())), UniqueFd(::dup(ring->event_fd())), 64);
  ASSERT_TRUE(producer);
  const ExtentRecord record = {.ticket = 6, .part = 1, .extent = 1023, .hash = 0x0123456789abcdef};
  ASSERT_TRUE(producer->publish(record));
  std::string bytes(160, '\0');
  ASSERT_EQ(::pread(memory.get(), bytes.data(), bytes.size(), 0), 160);
  ExpectBlock("hex ring", bytes);

  const std::string shown = Undump(Block("hex ring"));
  ASSERT_EQ(shown.size(), 160U);
  ExtentRecord read;
  std::memcpy(&read, shown.data() + 128, sizeof read);
  EXPECT_EQ(read, record);
  EXPECT_EQ(ring->take()->at(0), read);
}

TEST(ProtocolPage, names_every_message_and_its_number) {
  const std::string page = ReadPage();
  for (const wire::Body kind : message_kinds()) {
    const std::string row = concat("| ", static_cast<int>(kind), " | `", wire::EnumNameBody(kind));
    EXPECT_NE(page.find(row), std::string::npos) << row;
  }
}

TEST(ProtocolPage, names_the_bounds_of_the_code) {
  const std::string page = ReadPage();
  static_assert(kProtocolVersion == 1 && kMessageBytesMax == 65536 &&
                kLayoutBytesMax == std::size_t{1} << 30 && kErrorMessageBytesMax == 2048 &&
                kFdsPerMessageMax == 4);
  for (const char* const bound : {"# The protocol between client and daemon, version 1",
                                  "65,536 bytes", "4 descriptors", "2^30 bytes", "2048 bytes"}) {
    EXPECT_NE(page.find(bound), std::string::npos) << bound;
  }
}

}  // namespace
}  // namespace stillframe::shm
