// What a peer's descriptor must be before we read from it (SHM-2, SHM-3).

#include "shm/sealed_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "base/text.h"
#include "shm/channel.h"
#include "tests/shm/temporary_directory.h"

namespace stillframe::shm {
namespace {

constexpr std::string_view kText = "forty-two bytes of a layout, more or less.";

Code RefusalOf(int fd, std::uint64_t bytes = kText.size(), std::uint64_t bytes_max = 1000) {
  const auto text = read_sealed_memfd(fd, bytes, bytes_max);
  EXPECT_FALSE(text);
  return text ? Code::kInternal : text.error().code();
}

UniqueFd MemfdWith(int seals) {
  UniqueFd fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::write(fd.get(), kText.data(), kText.size()), static_cast<ssize_t>(kText.size()));
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, seals), 0);
  return fd;
}

TEST(SealedMemory, comes_back_as_it_was) {
  for (const std::string& text : {std::string(), std::string(kText), std::string(3'000'000, 'y')}) {
    const auto fd = make_sealed_memfd("test", text);
    ASSERT_TRUE(fd) << fd.error().message();
    const auto again = read_sealed_memfd(fd->get(), text.size(), text.size());
    ASSERT_TRUE(again) << again.error().message();
    EXPECT_EQ(*again, text);
  }
}

TEST(SealedMemory, is_the_same_when_read_twice) {
  const auto fd = make_sealed_memfd("test", kText);
  EXPECT_EQ(*read_sealed_memfd(fd->get(), kText.size(), 1000), kText);
  EXPECT_EQ(*read_sealed_memfd(fd->get(), kText.size(), 1000), kText);
}

TEST(SealedMemory, cannot_be_changed_by_anybody) {
  const auto fd = make_sealed_memfd("test", kText);
  ASSERT_TRUE(fd);
  EXPECT_EQ(::pwrite(fd->get(), "x", 1, 0), -1);
  EXPECT_EQ(::ftruncate(fd->get(), 0), -1);
  EXPECT_EQ(::ftruncate(fd->get(), 1 << 20), -1);
  EXPECT_EQ(::fcntl(fd->get(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), -1);
  EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd->get(), 0), MAP_FAILED);
}

TEST(SealedMemory, needs_both_seals_on_its_length) {
  EXPECT_EQ(RefusalOf(MemfdWith(0).get()), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOf(MemfdWith(F_SEAL_SHRINK).get()), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOf(MemfdWith(F_SEAL_GROW).get()), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOf(MemfdWith(F_SEAL_WRITE).get()), Code::kInvalidArgument);
  const UniqueFd sealed = MemfdWith(F_SEAL_SHRINK | F_SEAL_GROW);
  EXPECT_TRUE(read_sealed_memfd(sealed.get(), kText.size(), 1000));
}

TEST(SealedMemory, has_the_length_that_the_message_says) {
  const auto fd = make_sealed_memfd("test", kText);
  EXPECT_EQ(RefusalOf(fd->get(), kText.size() - 1), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOf(fd->get(), kText.size() + 1), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOf(fd->get(), 0), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOf(fd->get(), ~std::uint64_t{0}, ~std::uint64_t{0}), Code::kInvalidArgument);
}

TEST(SealedMemory, longer_than_allowed_is_refused_before_anything_is_allocated) {
  const auto fd = make_sealed_memfd("test", kText);
  EXPECT_EQ(RefusalOf(fd->get(), kText.size(), kText.size() - 1), Code::kInvalidArgument);
  EXPECT_EQ(RefusalOf(fd->get(), ~std::uint64_t{0}, 1000), Code::kInvalidArgument);
}

TEST(SealedMemory, is_no_other_kind_of_descriptor) {
  const TemporaryDirectory directory;
  const std::string path = directory / "file";
  const UniqueFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::write(file.get(), kText.data(), kText.size()), static_cast<ssize_t>(kText.size()));
  EXPECT_EQ(RefusalOf(file.get()), Code::kInvalidArgument) << "a regular file";

  const std::string name = concat("/stillframe-test-", ::getpid());
  const UniqueFd posix(::shm_open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_TRUE(posix);
  (void)::shm_unlink(name.c_str());
  ASSERT_EQ(::write(posix.get(), kText.data(), kText.size()), static_cast<ssize_t>(kText.size()));
  EXPECT_EQ(RefusalOf(posix.get()), Code::kInvalidArgument) << "shm_open";

  const UniqueFd unsealable(::memfd_create("test", MFD_CLOEXEC));
  ASSERT_EQ(::write(unsealable.get(), kText.data(), kText.size()),
            static_cast<ssize_t>(kText.size()));
  EXPECT_EQ(RefusalOf(unsealable.get()), Code::kInvalidArgument) << "MFD_ALLOW_SEALING missing";

  int pipe[2] = {-1, -1};
  ASSERT_EQ(::pipe2(pipe, O_CLOEXEC), 0);
  const UniqueFd read_end(pipe[0]);
  const UniqueFd write_end(pipe[1]);
  EXPECT_EQ(RefusalOf(read_end.get()), Code::kInvalidArgument) << "a pipe";
  EXPECT_EQ(RefusalOf(read_end.get(), 0), Code::kInvalidArgument) << "a pipe of 0 bytes";

  const UniqueFd folder(::open(directory.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  EXPECT_EQ(RefusalOf(folder.get()), Code::kInvalidArgument) << "a directory";
  EXPECT_EQ(RefusalOf(-1), Code::kInvalidArgument) << "none";
}

TEST(SealedMemory, is_mapped_at_any_alignment) {
  // An odd length, because the kernel itself aligns those that are multiples of 2 MiB.
  constexpr std::uint64_t kBytes = 3 * kBlockBytes;
  const auto fd = make_memfd("test");
  ASSERT_TRUE(fd && set_length_and_seal(fd->get(), kBytes, kLengthSeals));
  for (const std::uint64_t alignment : {kBlockBytes, std::size_t{1} << 16, kHugePageBytes}) {
    for (int i = 0; i < 3; ++i) {
      const auto mapping = map_shared(fd->get(), kBytes, alignment);
      ASSERT_TRUE(mapping) << mapping.error().message();
      const Bytes bytes = mapping->bytes();
      EXPECT_EQ(bytes.size(), kBytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(bytes.data()) % alignment, 0U);
      bytes.front() = bytes.back() = std::byte{1};
    }
  }
}

TEST(SealedMemory, that_cannot_be_read_is_refused) {
  const UniqueFd fd = MemfdWith(F_SEAL_SHRINK | F_SEAL_GROW);
  const std::string link = concat("/proc/self/fd/", fd.get());
  const UniqueFd write_only(::open(link.c_str(), O_WRONLY | O_CLOEXEC));
  ASSERT_TRUE(write_only);
  EXPECT_EQ(RefusalOf(write_only.get()), Code::kInvalidArgument);
}

TEST(SealedMemory, is_read_from_its_start_wherever_its_offset_stands) {
  const auto fd = make_sealed_memfd("test", kText);
  ASSERT_NE(::lseek(fd->get(), 7, SEEK_SET), -1);
  EXPECT_EQ(*read_sealed_memfd(fd->get(), kText.size(), 1000), kText);
}

}  // namespace
}  // namespace stillframe::shm
