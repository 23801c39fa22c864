#pragma once

// One function per decoder of format/ and shm/, one for the arguments of the command, and one for
// the recovery of a run: it feeds bytes from anywhere to the decoder, and ends the process when
// what the decoder accepts breaks the decoder's promises. libFuzzer drives it (preset "fuzz"), and
// fuzz_replay_test runs the committed corpus and mutations of it in every build.

#include "base/bytes.h"

namespace stillframe::fuzz {

// Each returns whether the decoder accepted the input, so that a replay can tell a corpus that
// reaches the far side of the checks from one that does not.

// u64 length of the file, then its head.
bool part_header(ConstBytes input);
// A manifest, or one without its tail, which then gets a true checksum.
bool manifest(ConstBytes input);
// One byte of flags, one count of parts, a u64 length for each, then manifest.sums.
bool sums(ConstBytes input);
// A name, selector or address.
bool names(ConstBytes input);
// A packet of the socket.
bool control_message(ConstBytes input);
// The contents of a layout's memfd.
bool layout_blob(ConstBytes input);
// A byte that chooses the ring's capacity; then a step of the tail and a record, again and again.
bool ring_records(ConstBytes input);
// u64 length of a slot, then the contents of a GPU plan's memfd.
bool gpu_plan(ConstBytes input);
// A RUN or CHECKPOINT argument of the command; "~" stands for a directory with some runs.
bool cli_address(ConstBytes input);
// A JSON document.
bool json_tree(ConstBytes input);
// Changes to the files of a run, as recovery_tree.cc encodes them.
bool recovery_tree(ConstBytes input);

}  // namespace stillframe::fuzz
