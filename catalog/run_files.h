#pragma once

// The small files of a run and the paths to them; shared by the sources of this folder.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"
#include "uring/io_backend.h"

namespace stillframe::catalog {

// No run gets there by counting; a name that claims more is not ours and must not use the numbers
// up.
inline constexpr std::uint64_t kSequenceMax = std::uint64_t{1} << 62;
// The highest sequence that was ever removed while it was the newest: .stillframe/sequence.
inline constexpr std::string_view kSequenceFloorName = "sequence";
// Ends the name of a file that is not yet in force. No tag or other file of ours contains it.
inline constexpr char kUnfinishedMark = '~';

std::string private_path(const std::string& run_path);  // RUN/.stillframe
std::string spool_path(const std::string& run_path);
std::string tags_path(const std::string& run_path);

// "a/b/" -> "b", "a/b" -> "a", "b" -> ".", "/b" -> "/".
std::string last_component(std::string_view path);
std::string parent_of(std::string_view path);

// Of a directory, or of a link to one: a run's own path may be a link, nothing inside it may.
// kInvalidArgument: something else.
Result<uring::FileStatus> directory_status(uring::IoBackend& io, const std::string& path);

// kNotFound, or kDataLoss when it is larger than `bytes_max`.
Result<std::string> read_small_file(uring::IoBackend& io, const std::string& path,
                                    std::uint64_t bytes_max);
// Creates the file, which must not exist, writes and fsyncs it. Its directory is the caller's to
// sync.
Status write_small_file(uring::IoBackend& io, const std::string& path, std::string_view bytes);
// The file holds the old bytes or the new ones, whatever happens; the new ones durably on return.
Status replace_file(uring::IoBackend& io, const std::string& directory, std::string_view name,
                    std::string_view bytes);
// Makes a directory and those above it, each durable before the next is made; what is there stays.
Status make_directories(uring::IoBackend& io, const std::string& path);
// Removes a directory and the files in it, as far as the drive lets it: of what never was, or no
// longer is, anybody's checkpoint.
void remove_files(uring::IoBackend& io, const std::string& directory);
// As unlink, but a file that is already gone is no error.
Status unlink_if_there(uring::IoBackend& io, const std::string& path);

// Running out of memory or descriptors says nothing about what was to be read: never damage, never
// absence.
inline bool says_nothing(const Error& error) { return error.code() == Code::kResourceExhausted; }

// "12\n", as in tags and the floor.
std::string sequence_text(std::uint64_t sequence);
std::optional<std::uint64_t> parse_sequence_text(std::string_view text);

// 0: none was recorded. kDataLoss: the file is damaged.
Result<std::uint64_t> read_sequence_floor(uring::IoBackend& io, const std::string& run_path);
Status raise_sequence_floor(uring::IoBackend& io, const std::string& run_path,
                            std::uint64_t sequence);

}  // namespace stillframe::catalog
