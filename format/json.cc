#include "format/json.h"

#include <boost/json/basic_parser_impl.hpp>
#include <boost/json/error.hpp>
#include <boost/json/parse_options.hpp>
#include <exception>
#include <new>

#include "base/text.h"

namespace stillframe::format {

namespace {

namespace json = boost::json;

// Joins the pieces in which the parser delivers texts and numbers, and hands them on.
class Handler {
 public:
  // The text is in memory already, so its own bound is bound enough.
  static constexpr std::size_t max_object_size = static_cast<std::size_t>(-1);
  static constexpr std::size_t max_array_size = static_cast<std::size_t>(-1);
  static constexpr std::size_t max_key_size = static_cast<std::size_t>(-1);
  static constexpr std::size_t max_string_size = static_cast<std::size_t>(-1);

  explicit Handler(JsonEvents& events) : events_(events) {}

  bool on_document_begin(json::error_code&) { return true; }
  bool on_document_end(json::error_code&) { return true; }
  bool on_object_begin(json::error_code& error) { return judge(events_.on_object_begin(), error); }
  bool on_object_end(std::size_t, json::error_code& error) {
    return judge(events_.on_object_end(), error);
  }
  bool on_array_begin(json::error_code& error) { return judge(events_.on_array_begin(), error); }
  bool on_array_end(std::size_t, json::error_code& error) {
    return judge(events_.on_array_end(), error);
  }
  bool on_key_part(json::string_view piece, std::size_t, json::error_code&) { return keep(piece); }
  bool on_key(json::string_view last, std::size_t, json::error_code& error) {
    return judge(events_.on_key(joined(last)), error);
  }
  bool on_string_part(json::string_view piece, std::size_t, json::error_code&) {
    return keep(piece);
  }
  bool on_string(json::string_view last, std::size_t, json::error_code& error) {
    return judge(events_.on_string(joined(last)), error);
  }
  bool on_number_part(json::string_view piece, json::error_code&) { return keep(piece); }
  bool on_int64(std::int64_t, json::string_view last, json::error_code& error) {
    return judge(events_.on_number(joined(last)), error);
  }
  bool on_uint64(std::uint64_t, json::string_view last, json::error_code& error) {
    return judge(events_.on_number(joined(last)), error);
  }
  // Boost 1.81 may round the double by more than half a unit in the last place; its text is exact.
  bool on_double(double, json::string_view last, json::error_code& error) {
    return judge(events_.on_number(joined(last)), error);
  }
  bool on_bool(bool value, json::error_code& error) { return judge(events_.on_bool(value), error); }
  bool on_null(json::error_code& error) { return judge(events_.on_null(), error); }
  bool on_comment_part(json::string_view, json::error_code&) { return true; }
  bool on_comment(json::string_view, json::error_code&) { return true; }

 private:
  bool keep(json::string_view piece) {
    if (is_handed_on_) pieces_.clear();
    is_handed_on_ = false;
    pieces_.append(piece.data(), piece.size());
    return true;
  }

  std::string_view joined(json::string_view last) {
    if (is_handed_on_) return {last.data(), last.size()};
    pieces_.append(last.data(), last.size());
    is_handed_on_ = true;
    return pieces_;
  }

  static bool judge(bool is_accepted, json::error_code& error) {
    if (!is_accepted) error = json::make_error_code(json::error::exception);
    return is_accepted;
  }

  JsonEvents& events_;
  std::string pieces_;
  bool is_handed_on_ = true;  // Nothing in pieces_ waits for its last piece.
};

Error refused(const JsonEvents& events, const json::error_code& error, std::size_t position) {
  const std::string why = events.refusal().empty() ? error.message() : events.refusal();
  return Error(Code::kDataLoss, concat("JSON, near byte ", position, ": ", why));
}

}  // namespace

Status read_json(std::string_view text, std::size_t depth_max, JsonEvents& events) try {
  json::parse_options options;
  options.max_depth = depth_max;
  options.allow_comments = false;
  options.allow_trailing_commas = false;
  options.allow_invalid_utf8 = false;

  json::basic_parser<Handler> parser(options, events);
  json::error_code error;
  const std::size_t read_bytes = parser.write_some(false, text.data(), text.size(), error);
  if (error) return refused(events, error, read_bytes);
  if (read_bytes != text.size()) {
    return Error(Code::kDataLoss, concat("JSON: trailing bytes from byte ", read_bytes));
  }
  return ok();
} catch (const std::bad_alloc&) {
  return Error(Code::kResourceExhausted,
               concat("no memory to read ", text.size(), " bytes of JSON"));
} catch (const std::exception& exception) {
  return Error(Code::kInternal, concat("JSON: ", exception.what()));
}

void append_json_string(std::string& json, std::string_view text) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  json.push_back('"');
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20) {
      json.append("\\u00");
      json.push_back(kDigits[byte >> 4U]);
      json.push_back(kDigits[byte & 15U]);
    } else {
      if (c == '"' || c == '\\') json.push_back('\\');
      json.push_back(c);
    }
  }
  json.push_back('"');
}

}  // namespace stillframe::format
