// Tests of the kernels that measure the peaks of tensor cores: what they multiply is what they are to
// multiply.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device_info.h"
#include "cuda/device_memory.h"
#include "cuda/peak_kernels.h"

namespace adpdm::testing {
namespace {

using cuda::PeakKernel;

constexpr int32_t kSteps = 3;

PeakKernel find_kernel(const std::string& name, int arch) {
  for (const PeakKernel& kernel : cuda::peak_kernels(arch)) {
    if (kernel.name == name) return kernel;
  }
  throw std::logic_error("there is no kernel " + name);
}

// For the current device; in the emulation for one that has such products.
PeakKernel find_kernel(const std::string& name) {
#ifdef ADPDM_SIMT
  return find_kernel(name, name == "wgmma_s8" ? 90 : 80);
#else
  return find_kernel(name, cuda::current_device_info().arch);
#endif
}

std::vector<uint32_t> random_operands(const PeakKernel& kernel) {
  std::vector<uint32_t> words(static_cast<size_t>(kernel.operand_bytes / 4));
  std::generate(words.begin(), words.end(), std::mt19937(1));
  return words;
}

// What the threads of both of two blocks write.
std::vector<int32_t> sums_of(const PeakKernel& kernel, const std::vector<uint32_t>& operands) {
  const DeviceBuffer<uint32_t> device_operands(operands);
  DeviceBuffer<int32_t> sums(int64_t{2} * kernel.threads);
  kernel.launch(device_operands.data(), kSteps, 2, sums.data());
  return sums.host();
}

// The code of `bits` bits with number `index` of little-endian words.
int code_at(const std::vector<uint32_t>& words, int64_t index, int bits) {
  const int per_word = 32 / bits;
  const uint32_t word = words[static_cast<size_t>(index / per_word)];
  const auto end = static_cast<int>(bits * (index % per_word + 1));
  return static_cast<int32_t>(word << (32 - end)) >> (32 - bits);
}

std::vector<int32_t> twice(const std::vector<int32_t>& block) {
  std::vector<int32_t> blocks = block;
  blocks.insert(blocks.end(), block.begin(), block.end());
  return blocks;
}

// ---- mma.sync: words [20, 256], by thread 16 of A (4 fragments) and 4 of B (2 fragments) ----

// A lane's accumulators are rows group and group + 8 of every fragment of A times columns 2 * quarter and the
// next of every fragment of B, so that their sum is a product of sums of rows and columns.
std::vector<int32_t> expected_mma_sums(const std::vector<uint32_t>& operands, int bits) {
  const int per_word = 32 / bits, depth = 8 * per_word;
  std::vector<int32_t> block;
  for (int warp = 0; warp < 8; ++warp) {
    std::vector<int32_t> rows(static_cast<size_t>(8 * depth)), columns = rows;  // [group, k]
    for (int i = 0; i < 20 * 32 * per_word; ++i) {
      const int word = i / (32 * per_word), lane = i / per_word % 32, e = i % per_word;
      const int half = word < 16 ? word % 4 / 2 : word % 2;  // of the fragment's depth
      const int k = per_word * (lane % 4 + 4 * half) + e;
      std::vector<int32_t>& side = word < 16 ? rows : columns;
      side[static_cast<size_t>(lane / 4 * depth + k)] +=
          code_at(operands, int64_t{per_word} * (256 * word + 32 * warp + lane) + e, bits);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto row = rows.begin() + lane / 4 * depth, column = columns.begin() + lane % 4 * 2 * depth;
      int32_t sum = 0;
      for (int k = 0; k < depth; ++k) sum += row[k] * (column[k] + column[depth + k]);
      block.push_back(kSteps * sum);
    }
  }
  return twice(block);
}

TEST(CudaPeaks, MmaSyncMultipliesItsFragments) {
  ADPDM_REQUIRE_GPU();
  for (const int bits : {8, 4}) {
    const PeakKernel kernel = find_kernel("mma_s" + std::to_string(bits));
    if (!kernel.obstacle.empty()) continue;
    const std::vector<uint32_t> operands = random_operands(kernel);
    EXPECT_EQ(sums_of(kernel, operands), expected_mma_sums(operands, bits)) << kernel.name;
    // 4 * 2 fragments of 16 x 8 sums, of 16 bytes of each of 2 operands, in 8 warps.
    EXPECT_EQ(kernel.operations, 2.0 * 8 * 16 * 8 * (256 / bits) * 8) << kernel.name;
  }
}

// ---- wgmma: s8 [128 + 256, 128], rows of A and then of B ----

// A thread's accumulators are rows r and r + 8 of A times the columns 8 * j + 2 * quarter and the next.
std::vector<int32_t> expected_wgmma_sums(const std::vector<uint32_t>& operands) {
  constexpr int kRows = 128, kColumns = 256, kDepth = 128;
  int32_t columns[4][kDepth] = {};  // sums by quarter
  for (int i = 0; i < kColumns * kDepth; ++i) {
    columns[i / kDepth % 8 / 2][i % kDepth] += code_at(operands, kRows * kDepth + i, 8);
  }
  std::vector<int32_t> block;
  for (int thread = 0; thread < 256; ++thread) {
    const int row = 16 * (thread / 32) + thread % 32 / 4;
    int32_t sum = 0;
    for (int k = 0; k < kDepth; ++k) {
      const int both = code_at(operands, row * kDepth + k, 8) + code_at(operands, (row + 8) * kDepth + k, 8);
      sum += both * columns[thread % 4][k];
    }
    block.push_back(kSteps * sum);
  }
  return twice(block);
}

TEST(CudaPeaks, WgmmaMultipliesTheTileOfCoreB) {
  ADPDM_REQUIRE_GPU();
  const PeakKernel kernel = find_kernel("wgmma_s8");
  if (!kernel.obstacle.empty()) GTEST_SKIP() << kernel.obstacle;
  const std::vector<uint32_t> operands = random_operands(kernel);
  EXPECT_EQ(sums_of(kernel, operands), expected_wgmma_sums(operands));
  EXPECT_EQ(kernel.operations, 2.0 * 128 * 256 * 128);
}

// ---- what a device does not have ----

TEST(CudaPeaks, MissingInstructionsAreNamed) {
  for (const int arch : {80, 89, 90, 100, 120}) {
    EXPECT_EQ(find_kernel("mma_s8", arch).obstacle, "");
    EXPECT_EQ(find_kernel("mma_s4", arch).obstacle.empty(), arch < 90) << arch;
    EXPECT_EQ(find_kernel("wgmma_s8", arch).obstacle.empty(), arch == 90 && cuda::built_for("90a")) << arch;
  }
  EXPECT_EQ(find_kernel("wgmma_s8", 120).obstacle, "compute capability 12.0 has no wgmma, only 9.0 has");
  EXPECT_EQ(find_kernel("mma_s4", 90).obstacle, "compute capability 9.0 emulates products of s4");
}

}  // namespace
}  // namespace adpdm::testing
