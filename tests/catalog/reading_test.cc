// Opening, reading, verifying and copying a checkpoint.
#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "format/names.h"
#include "tests/catalog/catalog_test.h"
#include "tests/simulated/seeded_rng.h"

namespace stillframe::catalog {
namespace {

void flip_bit(const std::string& path, std::uint64_t bit) {
  std::string bytes = read_file(path);
  bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
  write_file(path, bytes);
}

class Reading : public CatalogTest {};
CATALOG_TEST_SUITE(Reading);

TEST_P(Reading, an_opened_checkpoint_knows_its_tensors_and_states) {
  const TestCommit wanted{.sequence = 1, .tensor_bytes = {5000, 0, 3'000'000}};
  auto opened = OpenCheckpoint::open(*io_, commit(wanted));
  ASSERT_OK(opened);
  ASSERT_EQ(opened->parts().size(), 3u);
  EXPECT_EQ(opened->parts()[0].image.name, "part0");
  ASSERT_EQ(opened->parts()[2].image.tensors.size(), 1u);
  EXPECT_EQ(opened->parts()[2].image.tensors[0].spec.name, "tensor2");
  EXPECT_EQ(opened->parts()[2].image.tensors[0].bytes, 3'000'000u);
  EXPECT_EQ(opened->parts()[2].extent_hashes.size(), 3u);
  auto state = opened->read_state(0);
  ASSERT_OK(state);
  EXPECT_EQ(*state, state_for_test(wanted));
  auto absent = opened->read_state(1);
  ASSERT_FALSE(absent);
  EXPECT_EQ(absent.error().code(), Code::kNotFound);
}

TEST_P(Reading, a_header_larger_than_an_extent_is_read_whole) {
  // 12,000 tensors with names of 100 bytes: a header of about 1.8 MB, written by hand.
  TestCommit wanted{.sequence = 1, .tensor_bytes = {10}};
  wanted.header_tensor_count = 12'000;
  const Checkpoint checkpoint = commit(wanted);
  ASSERT_GT(checkpoint.manifest.parts[0].bytes, 1u << 20);
  auto opened = OpenCheckpoint::open(*io_, checkpoint);
  ASSERT_OK(opened);
  EXPECT_EQ(opened->parts()[0].image.tensors.size(), 12'001u);
  EXPECT_EQ(verify(checkpoint), std::vector<std::string>());
}

TEST_P(Reading, blocks_cover_every_byte_once_in_any_order) {
  const TestCommit wanted{.sequence = 1, .tensor_bytes = {9'000'000, 100, 21'000'000}};
  auto opened = OpenCheckpoint::open(*io_, commit(wanted));
  ASSERT_OK(opened);
  std::vector<std::string> read;
  std::vector<ExtentRange> ranges;
  for (std::size_t i = 0; i < opened->parts().size(); ++i) {
    read.emplace_back(opened->parts()[i].bytes, '\0');
    ranges.push_back({.part = i, .extent_count = opened->parts()[i].extent_hashes.size()});
  }
  BlockReader reader(*io_, *opened, ranges, staging_.bytes());
  std::map<std::pair<std::size_t, std::uint64_t>, int> seen;
  for (;;) {
    auto block = reader.next();
    ASSERT_OK(block);
    if (!*block) break;
    EXPECT_EQ(++seen[std::pair((*block)->part, (*block)->offset)], 1);
    std::memcpy(read[(*block)->part].data() + (*block)->offset, (*block)->bytes.data(),
                (*block)->bytes.size());
    reader.recycle(**block);
  }
  for (std::size_t i = 0; i < read.size(); ++i) {
    EXPECT_TRUE(read[i] == part_bytes_for_test(wanted, i)) << "part " << i;
  }
}

TEST_P(Reading, only_the_wanted_extents_are_read) {
  const TestCommit wanted{.sequence = 1, .tensor_bytes = {9'000'000}};
  auto opened = OpenCheckpoint::open(*io_, commit(wanted));
  ASSERT_OK(opened);
  BlockReader reader(*io_, *opened,
                     {{.part = 0, .first_extent = 2, .extent_count = 1},
                      {.part = 0, .first_extent = 5, .extent_count = 0},
                      {.part = 0, .first_extent = 8, .extent_count = 1}},
                     staging_.bytes());
  std::map<std::uint64_t, std::size_t> bytes_at;
  for (;;) {
    auto block = reader.next();
    ASSERT_OK(block);
    if (!*block) break;
    bytes_at[(*block)->offset] = (*block)->bytes.size();
    reader.recycle(**block);
  }
  const std::uint64_t part_bytes = opened->parts()[0].bytes;
  EXPECT_EQ(bytes_at, (std::map<std::uint64_t, std::size_t>{
                          {2 * kExtentBytes, kExtentBytes},
                          {8 * kExtentBytes, part_bytes - 8 * kExtentBytes}}));
}

TEST_P(Reading, a_reader_with_every_block_lent_out_is_starved) {
  auto opened = OpenCheckpoint::open(*io_, commit({.sequence = 1, .tensor_bytes = {20'000'000}}));
  ASSERT_OK(opened);
  BlockReader reader(*io_, *opened, {{.part = 0, .extent_count = 20}},
                     staging_.bytes().first(2 * kReadBlockBytes));
  auto first = reader.next();
  auto second = reader.next();
  ASSERT_OK(first);
  ASSERT_OK(second);
  EXPECT_TRUE(reader.starved());
  auto third = reader.next();
  ASSERT_FALSE(third);
  EXPECT_EQ(third.error().code(), Code::kInternal);
  reader.recycle(**first);
  EXPECT_FALSE(reader.starved());
  ASSERT_OK(reader.next());
}

TEST_P(Reading, extents_outside_the_part_are_refused) {
  auto opened = OpenCheckpoint::open(*io_, commit({.sequence = 1}));
  ASSERT_OK(opened);
  BlockReader reader(*io_, *opened, {{.part = 0, .first_extent = 1, .extent_count = 1}},
                     staging_.bytes());
  EXPECT_FALSE(reader.next());
}

TEST_P(Reading, a_reader_may_end_with_reads_in_flight) {
  auto opened = OpenCheckpoint::open(*io_, commit({.sequence = 1, .tensor_bytes = {40'000'000}}));
  ASSERT_OK(opened);
  {
    BlockReader reader(*io_, *opened, {{.part = 0, .extent_count = 38}}, staging_.bytes());
    ASSERT_OK(reader.next());
  }
  EXPECT_EQ(io_->in_flight(), 0u);
}

TEST_P(Reading, a_short_part_is_data_loss_that_names_both_lengths) {
  const Checkpoint one = commit({.sequence = 1, .tensor_bytes = {5'000'000}});
  std::filesystem::resize_file(one.path + "/part0.safetensors", 4'999'999);
  auto opened = OpenCheckpoint::open(*io_, one);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code(), Code::kDataLoss);
  EXPECT_NE(opened.error().message().find("4999999"), std::string_view::npos);
  EXPECT_NE(opened.error().message().find(std::to_string(one.manifest.parts[0].bytes)),
            std::string_view::npos);
  EXPECT_EQ(verify(one).size(), 1u);
}

TEST_P(Reading, a_part_cut_short_while_it_is_read_is_data_loss) {
  const Checkpoint one = commit({.sequence = 1, .tensor_bytes = {5'000'000}});
  auto opened = OpenCheckpoint::open(*io_, one);
  ASSERT_OK(opened);
  // Between two blocks: a fraction of one is not taken for the end of a file that was longer.
  std::filesystem::resize_file(one.path + "/part0.safetensors", 244 * kBlockBytes);
  BlockReader reader(*io_, *opened, {{.part = 0, .extent_count = 5}}, staging_.bytes());
  auto block = reader.next();
  while (block && *block) block = reader.next();
  ASSERT_FALSE(block);
  EXPECT_EQ(block.error().code(), Code::kDataLoss) << block.error().message();
}

// SEC-10.
TEST_P(Reading, a_link_a_fifo_and_a_missing_part_are_refused) {
  for (int i = 0; i < 3; ++i) {
    const Checkpoint one = commit({.sequence = static_cast<std::uint64_t>(i) + 1});
    const std::string part = one.path + "/part1.safetensors";
    std::filesystem::rename(part, directory_.path() + "/moved");
    if (i == 0) std::filesystem::create_symlink(directory_.path() + "/moved", part);
    if (i == 1) {
      ASSERT_EQ(::mkfifo(part.c_str(), 0600), 0);
    }
    auto opened = OpenCheckpoint::open(*io_, one);
    ASSERT_FALSE(opened) << i;
    EXPECT_EQ(opened.error().code(), Code::kDataLoss) << i;
    EXPECT_NE(opened.error().message().find("part1.safetensors"), std::string_view::npos);
  }
}

TEST_P(Reading, a_flipped_header_is_refused_before_it_is_decoded) {
  const Checkpoint one = commit({.sequence = 1});
  flip_bit(one.path + "/part0.safetensors", 3);  // In the header's length.
  auto opened = OpenCheckpoint::open(*io_, one);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code(), Code::kDataLoss);
  EXPECT_NE(opened.error().message().find("part0.safetensors extent 0"), std::string_view::npos);
}

class Verify : public CatalogTest {};
CATALOG_TEST_SUITE(Verify);

TEST_P(Verify, finds_every_flipped_bit) {
  const std::uint64_t seed = 20240607;
  RecordProperty("seed", std::to_string(seed));
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  simulated::SeededRng rng(seed);
  const Checkpoint one =
      commit({.sequence = 1, .tensor_bytes = {5000, 1'500'000}, .metrics = {{"loss", 0.25}}});
  ASSERT_EQ(verify(one), std::vector<std::string>());
  for (const char* file :
       {"part0.safetensors", "part1.safetensors", "manifest.sums", "state.json", "manifest.json"}) {
    const std::string path = one.path + "/" + file;
    const std::string original = read_file(path);
    for (int i = 0; i < 12; ++i) {
      // The first and the last byte are places of their own.
      std::uint64_t bit = rng.below(8 * original.size());
      if (i == 0) bit = 0;
      if (i == 1) bit = 8 * original.size() - 1;
      flip_bit(path, bit);
      const auto damage = verify(one);
      ASSERT_FALSE(damage.empty()) << file << " bit " << bit;
      EXPECT_EQ(damage[0].find(file), 0u) << damage[0];
      flip_bit(path, bit);
    }
    if (std::string(file) == "manifest.json") {
      flip_bit(path, rng.below(8 * original.size()));
      EXPECT_EQ(scan().damaged.size(), 1u);
      write_file(path, original);
    }
    ASSERT_EQ(verify(one), std::vector<std::string>());
  }
}

TEST_P(Verify, reports_all_damage_with_its_place) {
  const Checkpoint one = commit({.sequence = 1, .tensor_bytes = {5'000'000, 2'000'000}});
  flip_bit(one.path + "/part0.safetensors", 8 * (2 * kExtentBytes + 5));
  flip_bit(one.path + "/part0.safetensors", 8 * (4 * kExtentBytes + 5));
  flip_bit(one.path + "/state.json", 5);
  std::filesystem::remove(one.path + "/part1.safetensors");
  write_file(one.path + "/extra.safetensors", "x");
  write_file(one.path + "/notes.txt", "not ours, no damage");
  auto damage = verify(one);
  std::sort(damage.begin(), damage.end());
  ASSERT_EQ(damage.size(), 5u);
  EXPECT_EQ(damage[0], "extra.safetensors: the manifest does not list it");
  EXPECT_EQ(damage[1], "part0.safetensors extent 2 (offset 2097152, 1048576 bytes): hash differs");
  EXPECT_EQ(damage[2].find("part0.safetensors extent 4 (offset 4194304, "), 0u);
  EXPECT_EQ(damage[3].find("part1.safetensors: "), 0u);
  EXPECT_EQ(damage[4], "state.json: hash differs");
}

TEST_P(Verify, swapped_parts_are_damage) {
  const Checkpoint one = commit({.sequence = 1, .tensor_bytes = {5000, 5000}});
  std::filesystem::rename(one.path + "/part0.safetensors", one.path + "/swap");
  std::filesystem::rename(one.path + "/part1.safetensors", one.path + "/part0.safetensors");
  std::filesystem::rename(one.path + "/swap", one.path + "/part1.safetensors");
  EXPECT_EQ(verify(one).size(), 2u);
  EXPECT_FALSE(OpenCheckpoint::open(*io_, one));
}

class CopyOut : public CatalogTest {};
CATALOG_TEST_SUITE(CopyOut);

TEST_P(CopyOut, makes_an_equal_checkpoint) {
  const TestCommit wanted{.sequence = 1, .tensor_bytes = {5000, 0, 23'456'789}};
  const Checkpoint one = commit(wanted);
  const std::string target = directory_.path() + "/copy";
  ASSERT_OK(copy_out(*io_, one, target, staging_.bytes()));
  for (const auto& entry : std::filesystem::directory_iterator(one.path)) {
    const std::string name = entry.path().filename();
    EXPECT_TRUE(read_file(entry.path()) == read_file(target + "/" + name)) << name;
  }
  Checkpoint copied = one;
  copied.path = target;
  EXPECT_EQ(verify(copied), std::vector<std::string>());
  EXPECT_FALSE(exists(target + ".partial"));
}

TEST_P(CopyOut, damage_leaves_no_directory) {
  const Checkpoint one = commit({.sequence = 1, .tensor_bytes = {5000, 9'000'000}});
  flip_bit(one.path + "/part1.safetensors", 8 * 8'000'000);
  const std::string target = directory_.path() + "/copy";
  auto copied = copy_out(*io_, one, target, staging_.bytes());
  ASSERT_FALSE(copied);
  EXPECT_EQ(copied.error().code(), Code::kDataLoss);
  EXPECT_FALSE(exists(target));
  EXPECT_FALSE(exists(target + ".partial"));
}

TEST_P(CopyOut, never_overwrites) {
  const Checkpoint one = commit({.sequence = 1});
  const std::string target = directory_.path() + "/copy";
  write_file(target, "mine");
  EXPECT_FALSE(copy_out(*io_, one, target, staging_.bytes()));
  EXPECT_EQ(read_file(target), "mine");
}

TEST_P(CopyOut, old_bytes_of_the_staging_never_reach_the_copy) {
  const Checkpoint one = commit({.sequence = 1, .tensor_bytes = {5000}});
  std::memset(staging_.bytes().data(), 0x5a, staging_.bytes().size());
  const std::string target = directory_.path() + "/copy";
  ASSERT_OK(copy_out(*io_, one, target, staging_.bytes()));
  EXPECT_EQ(read_file(target + "/part0.safetensors"),
            part_bytes_for_test({.sequence = 1, .tensor_bytes = {5000}}, 0));
}

}  // namespace
}  // namespace stillframe::catalog
