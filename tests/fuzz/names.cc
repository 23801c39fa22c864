#include "format/names.h"

#include "base/check.h"
#include "format/utf8.h"
#include "tests/fuzz/targets.h"

namespace stillframe::fuzz {

using namespace format;

namespace {

void check_plain(std::string_view name) {
  check(name.find('/') == std::string_view::npos && name != "." && name != "..", "no way out");
  check(is_plain_utf8(name), "a name can be printed");
}

void check_selector(const Selector& selector) {
  const auto again = parse_selector(to_text(selector));
  check(again && *again == selector, "a selector has a text");
  if (selector.kind == Selector::Kind::kTag) check_plain(selector.tag);
}

}  // namespace

bool names(ConstBytes input) {
  const std::string_view text(reinterpret_cast<const char*>(input.data()), input.size());
  bool is_accepted = false;

  if (const auto name = parse_checkpoint_directory_name(text)) {
    check(checkpoint_directory_name(*name) == text, "exact inverse");
    check_plain(text);
    is_accepted = true;
  }
  if (const auto name = parse_temporary_directory_name(text)) {
    check(temporary_directory_name(*name) == text, "exact inverse");
    check_plain(text);
    is_accepted = true;
  }
  for (const std::uint32_t world_size : {1U, 2U, 8U, 100'000U}) {
    if (const auto file = parse_part_file_name(text, world_size)) {
      check(part_file_name(file->part, file->rank, world_size) == text, "exact inverse");
      check(file->rank < world_size, "a rank of its world");
      check_plain(text);
      is_accepted = true;
    }
    if (const auto rank = parse_state_file_name(text, world_size)) {
      check(state_file_name(*rank, world_size) == text && *rank < world_size, "exact inverse");
      is_accepted = true;
    }
  }
  if (const auto selector = parse_selector(text)) {
    check_selector(*selector);
    is_accepted = true;
  }
  if (const auto address = parse_address(text)) {
    check(!address->run_path.empty(), "a run is a path");
    check(address->run_path.find('\0') == std::string::npos, "a path has no NUL");
    check_selector(address->selector);
    is_accepted = true;
  }
  if (check_name("name", text)) check_plain(text);
  if (check_tag(text)) {
    const auto selector = parse_selector(text);
    check(selector && selector->kind == Selector::Kind::kTag, "a tag reads as a tag");
  }
  if (check_tensor_name(text)) check(is_plain_utf8(text), "a tensor's name can be printed");
  check(is_plain_utf8(printable(text)), "whatever is shown can be printed");
  return is_accepted;
}

}  // namespace stillframe::fuzz
