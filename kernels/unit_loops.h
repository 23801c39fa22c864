#pragma once

// The loops of one instruction set, written against a `Vector` that the including file defines:
//
//   struct Vector {
//     using Value = ...;                                     // Vector::kBytes bytes.
//     static constexpr std::size_t kBytes = ...;             // Divides kLineBytes.
//     static Value load(const std::byte* source);            // Any alignment.
//     static void stream(std::byte* target, Value value);    // Non-temporal, aligned.
//   };
//
// The including file is compiled with flags that other files are not. Nothing here may have
// external linkage, and nothing may call a standard template: the linker could keep this file's
// copy of it, and a CPU without these instructions would run it.

#include <cstring>

#include "kernels/unit.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace stillframe::kernels {
namespace {

constexpr std::size_t kPages = 8;
// Below this many bytes a non-temporal copy does not pay its alignment.
constexpr std::size_t kStreamBytesMin = 4096;

inline void stream_line(std::byte* target, const std::byte* source) {
  typename Vector::Value values[kLineBytes / Vector::kBytes];
  for (std::size_t i = 0; i < kLineBytes / Vector::kBytes; ++i) {
    values[i] = Vector::load(source + i * Vector::kBytes);
  }
  for (std::size_t i = 0; i < kLineBytes / Vector::kBytes; ++i) {
    Vector::stream(target + i * Vector::kBytes, values[i]);
  }
}

struct Memcpy {
  static void lines(std::byte* target, const std::byte* source, std::size_t line_count) {
    std::memcpy(target, source, line_count * kLineBytes);
  }
};

struct Sequential {
  static void lines(std::byte* target, const std::byte* source, std::size_t line_count) {
    for (std::size_t i = 0; i < line_count; ++i) {
      stream_line(target + i * kLineBytes, source + i * kLineBytes);
    }
  }
};

// Eight rows of equal length, which are the pages of a whole unit.
struct Interleaved {
  static void lines(std::byte* target, const std::byte* source, std::size_t line_count) {
    const std::size_t row_lines = line_count / kPages;
    const std::size_t row_bytes = row_lines * kLineBytes;
    for (std::size_t at = 0; at < row_bytes; at += kLineBytes) {
      for (std::size_t row = 0; row < kPages; ++row) {
        stream_line(target + row * row_bytes + at, source + row * row_bytes + at);
      }
    }
    const std::size_t done_bytes = kPages * row_bytes;
    Sequential::lines(target + done_bytes, source + done_bytes, line_count % kPages);
  }
};

void hash(const std::byte* source, std::size_t leaf_count, std::uint64_t* leaves) {
  for (std::size_t i = 0; i < leaf_count; ++i) {
    leaves[i] = XXH3_64bits(source + i * kLeafBytes, kLeafBytes);
  }
}

std::size_t bytes_to_line(const std::byte* target) {
  return -reinterpret_cast<std::uintptr_t>(target) % kLineBytes;
}

template <class Form>
void copy(std::byte* target, const std::byte* source, std::size_t bytes) {
  if (bytes < kStreamBytesMin) {
    std::memcpy(target, source, bytes);
    return;
  }
  const std::size_t head_bytes = bytes_to_line(target);
  const std::size_t line_count = (bytes - head_bytes) / kLineBytes;
  const std::size_t tail_at = head_bytes + line_count * kLineBytes;
  std::memcpy(target, source, head_bytes);
  Form::lines(target + head_bytes, source + head_bytes, line_count);
  std::memcpy(target + tail_at, source + tail_at, bytes - tail_at);
}

void copy_by_memcpy(std::byte* target, const std::byte* source, std::size_t bytes) {
  std::memcpy(target, source, bytes);
}

// Leaf by leaf, the hash first: it draws the leaf into the first-level cache, and the copy, which
// reads it from there, drains to memory while the next leaf is hashed. Measured on a Zen 4 in parts
// of one big memcpy's time: 0.75; copy before hash 0.81; by 32 KiB 0.88 and 0.98.
//
// The copy stays on the target's lines, so it may end less than a line behind the hash.
template <class Form>
void copy_and_hash(std::byte* target, const std::byte* source, std::size_t leaf_count,
                   std::uint64_t* leaves) {
  std::size_t copied_bytes = bytes_to_line(target);
  std::memcpy(target, source, copied_bytes);
  for (std::size_t i = 0; i < leaf_count; ++i) {
    hash(source + i * kLeafBytes, 1, leaves + i);
    const std::size_t line_count = ((i + 1) * kLeafBytes - copied_bytes) / kLineBytes;
    Form::lines(target + copied_bytes, source + copied_bytes, line_count);
    copied_bytes += line_count * kLineBytes;
  }
  std::memcpy(target + copied_bytes, source + copied_bytes, leaf_count * kLeafBytes - copied_bytes);
}

// A whole unit at a time, because the form needs all its pages; the hash finds it in the cache.
void interleave_and_hash(std::byte* target, const std::byte* source, std::size_t leaf_count,
                         std::uint64_t* leaves) {
  copy<Interleaved>(target, source, leaf_count * kLeafBytes);
  hash(source, leaf_count, leaves);
}

constexpr UnitKernels kUnitKernels = {
    .hash = hash,
    .copy = {copy_by_memcpy, copy<Sequential>, copy<Interleaved>},
    .copy_and_hash = {copy_and_hash<Memcpy>, copy_and_hash<Sequential>, interleave_and_hash},
};

}  // namespace
}  // namespace stillframe::kernels
