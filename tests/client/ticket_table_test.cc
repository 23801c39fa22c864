#include "client/ticket_table.h"

#include <gtest/gtest.h>

namespace stillframe::client {
namespace {

SaveInfo save_of(std::uint64_t daemon_ticket) {
  SaveInfo save;
  save.daemon_ticket = daemon_ticket;
  return save;
}

TEST(TicketTable, a_save_only_goes_forward) {
  TicketTable tickets;
  const std::uint64_t ticket = tickets.add(save_of(5));
  tickets.set_captured(ticket, 10);
  EXPECT_EQ(tickets.find(ticket)->state, SaveState::kCaptured);
  EXPECT_EQ(tickets.set_ended(5, std::nullopt, 20), ticket);
  tickets.set_captured(ticket, 30);
  tickets.set_failed(ticket, Error(Code::kInternal, "too late"));
  tickets.set_all_failed(Error(Code::kUnavailable, "too late"));
  const SaveInfo save = *tickets.find(ticket);
  EXPECT_EQ(save.state, SaveState::kDurable);
  EXPECT_EQ(save.captured_ns, 10);
  EXPECT_EQ(save.durable_ns, 20);
  EXPECT_FALSE(save.failure);
  EXPECT_EQ(tickets.counts().durable, 1U);
  EXPECT_EQ(tickets.counts().failed, 0U);
}

TEST(TicketTable, an_end_that_comes_before_the_save_is_known_is_kept_for_it) {
  TicketTable tickets;
  EXPECT_EQ(tickets.set_ended(7, Error(Code::kResourceExhausted, "disk full"), 0), 0U);
  const std::uint64_t ticket = tickets.add(save_of(7));
  EXPECT_EQ(tickets.find(ticket)->state, SaveState::kFailed);
  EXPECT_EQ(tickets.find(ticket)->failure->code(), Code::kResourceExhausted);
  EXPECT_EQ(tickets.find(tickets.add(save_of(8)))->state, SaveState::kAccepted);
}

TEST(TicketTable, numbers_of_another_daemon_do_not_touch_the_saves_of_the_one_before) {
  TicketTable tickets;
  const std::uint64_t before = tickets.add(save_of(1));
  tickets.set_all_failed(Error(Code::kUnavailable, "it died"));
  const std::uint64_t after = tickets.add(save_of(1));
  EXPECT_EQ(tickets.set_ended(1, std::nullopt, 9), after);
  EXPECT_EQ(tickets.find(before)->state, SaveState::kFailed);
  EXPECT_EQ(tickets.find(after)->state, SaveState::kDurable);
}

TEST(TicketTable, the_first_failure_stays) {
  TicketTable tickets;
  const std::uint64_t ticket = tickets.add(save_of(1));
  tickets.set_failed(ticket, Error(Code::kDataLoss, "torn"));
  EXPECT_EQ(tickets.set_ended(1, Error(Code::kCancelled, "torn"), 0), 0U);
  EXPECT_EQ(tickets.find(ticket)->failure->code(), Code::kDataLoss);
  EXPECT_EQ(tickets.counts().failed, 1U);
}

}  // namespace
}  // namespace stillframe::client
