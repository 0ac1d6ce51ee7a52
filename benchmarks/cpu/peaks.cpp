// Measures the peaks of a CPU that integer kernels are judged by: how fast one thread multiplies with the
// instructions that our kernels use, on registers alone. GOP/s, a multiply-add counts as 2; best and median
// of kRepetitions, in CPU time. Needs no Python:
//     build/core/adpdm_cpu_peaks --json runs/peaks.json
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/amx_tile.h"
#include "cpu/isa.h"
#include "measuring.h"

namespace {

using namespace adpdm;
using namespace adpdm::benchmarks;

constexpr int kRepetitions = 1000;
constexpr double kRepetitionSeconds = 2e-4;  // at least: short against what else the machine does

using Loop = void (*)(int64_t steps);

struct Peak {
  cpu::Isa level;            // whose kernels use it
  const char* instructions;  // of one product and its addition
  const char* use;
  int64_t operations;  // of a step
  Loop run;
};

#if defined(__x86_64__)

constexpr int kSums = 12;  // as many as our kernels have: two products a cycle, each ready after 4 or 5

struct alignas(64) Operands {
  uint32_t codes[16];
  uint32_t weights[16];
  uint32_t ones[16];
};

Operands make_operands() {
  Operands operands;
  std::fill_n(operands.codes, 16, 0x3e4c3a2bu);    // no byte is 0; as a float 0.2
  std::fill_n(operands.weights, 16, 0x3d1b2c17u);  // no byte is 0; as a float 0.04
  std::fill_n(operands.ones, 16, 0x00010001u);
  return operands;
}

const Operands kOperands = make_operands();

// The loops are asm: a compiler makes a product of unchanging operands once. Registers 0 to 11 are sums, 12
// codes, 13 weights, 14 ones of 16 bits, 15 a product.
#define ADPDM_SIX(line) line(0) line(1) line(2) line(3) line(4) line(5)
#define ADPDM_TWELVE(line) ADPDM_SIX(line) line(6) line(7) line(8) line(9) line(10) line(11)

#define ADPDM_ZERO(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n\t"
#define ADPDM_ADD(type, i) "vpadd" type " %%ymm15, %%ymm" #i ", %%ymm" #i "\n\t"
#define ADPDM_FMA_256(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #i "\n\t"
#define ADPDM_FMA_512(i) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" #i "\n\t"
#define ADPDM_PAIRS(i) "vpmaddwd %%ymm12, %%ymm13, %%ymm15\n\t" ADPDM_ADD("d", i)
#define ADPDM_BYTES "vpmaddubsw %%ymm13, %%ymm12, %%ymm15\n\t"
#define ADPDM_7_BIT(i) ADPDM_BYTES "vpmaddwd %%ymm15, %%ymm14, %%ymm15\n\t" ADPDM_ADD("d", i)
#define ADPDM_4_BIT(i) ADPDM_BYTES ADPDM_ADD("w", i)
#define ADPDM_QUADS_256(encoding, i) "%{" encoding "%} vpdpbusd %%ymm13, %%ymm12, %%ymm" #i "\n\t"
#define ADPDM_QUADS_VEX(i) ADPDM_QUADS_256("vex", i)
#define ADPDM_QUADS_EVEX(i) ADPDM_QUADS_256("evex", i)
#define ADPDM_QUADS_512(i) "vpdpbusd %%zmm13, %%zmm12, %%zmm" #i "\n\t"
#define ADPDM_PAIRS_512(i) "vpdpwssd %%zmm13, %%zmm12, %%zmm" #i "\n\t"

// A 16-bit sum goes into a 32-bit one and starts anew.
#define ADPDM_WIDEN(i, wide) "vpmaddwd %%ymm" #i ", %%ymm14, %%ymm15\n\t" ADPDM_ADD("d", wide) ADPDM_ZERO(i)

// clang-format off
// void name(int64_t steps): a loop of so many steps, all its vectors of one size (ymm or zmm).
#define ADPDM_LOOP(name, vector, step)                                                          \
  void name(int64_t steps) {                                                                    \
    asm volatile(ADPDM_TWELVE(ADPDM_ZERO)                                                       \
                 "vmovups (%1), %%" vector "12\n\t"                                             \
                 "vmovups 64(%1), %%" vector "13\n\t"                                           \
                 "vmovups 128(%1), %%" vector "14\n\t"                                          \
                 ".p2align 6\n\t"                                                               \
                 "1:\n\t"                                                                       \
                 step                                                                           \
                 "decq %0\n\t"                                                                  \
                 "jnz 1b\n\t"                                                                   \
                 "vzeroupper"                                                                   \
                 : "+r"(steps)                                                                  \
                 : "r"(&kOperands), "m"(kOperands)                                              \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",        \
                   "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");       \
  }

ADPDM_LOOP(fma_256, "ymm", ADPDM_TWELVE(ADPDM_FMA_256))
ADPDM_LOOP(pairs_256, "ymm", ADPDM_TWELVE(ADPDM_PAIRS))
ADPDM_LOOP(bytes_7_bit, "ymm", ADPDM_TWELVE(ADPDM_7_BIT))
constexpr int kQuadsIn16Bits = 8;  // added before they are widened
ADPDM_LOOP(bytes_4_bit, "ymm",
           ".rept 8\n\t" ADPDM_SIX(ADPDM_4_BIT) ".endr\n\t"
           ADPDM_WIDEN(0, 6) ADPDM_WIDEN(1, 7) ADPDM_WIDEN(2, 8)
           ADPDM_WIDEN(3, 9) ADPDM_WIDEN(4, 10) ADPDM_WIDEN(5, 11))
// clang-format on
ADPDM_LOOP(fma_512, "zmm", ADPDM_TWELVE(ADPDM_FMA_512))
ADPDM_LOOP(quads_512, "zmm", ADPDM_TWELVE(ADPDM_QUADS_512))
ADPDM_LOOP(pairs_512, "zmm", ADPDM_TWELVE(ADPDM_PAIRS_512))

#if defined(ADPDM_AVX_VNNI)
ADPDM_LOOP(quads_vex, "ymm", ADPDM_TWELVE(ADPDM_QUADS_VEX))
ADPDM_LOOP(quads_evex, "ymm", ADPDM_TWELVE(ADPDM_QUADS_EVEX))
#else  // isa_obstacle() says so
constexpr Loop quads_vex = nullptr;
constexpr Loop quads_evex = nullptr;
#endif

constexpr int kTileProducts = 4;  // of a step: two tiles of codes times two of weights, as in igemm_amx.cpp
constexpr int64_t kTileOperations = 2 * cpu::kTileRows * cpu::kTileRows * cpu::kTileRowBytes;

#if defined(ADPDM_AMX)
void tiles(int64_t steps) {
  cpu::TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < cpu::kTiles; ++tile) {
    config.row_bytes[tile] = cpu::kTileRowBytes;
    config.rows[tile] = cpu::kTileRows;
  }
  cpu::tile_configure(config);
  constexpr int64_t kSameRow = 0;  // as stride
  cpu::tile_load<4>(kOperands.codes, kSameRow);
  cpu::tile_load<5>(kOperands.codes, kSameRow);
  cpu::tile_load<6>(kOperands.weights, kSameRow);
  cpu::tile_load<7>(kOperands.weights, kSameRow);
  for (int64_t step = 0; step < steps; ++step) {
    cpu::tile_dot_s8s8<0, 4, 6>();
    cpu::tile_dot_s8s8<1, 4, 7>();
    cpu::tile_dot_s8s8<2, 5, 6>();
    cpu::tile_dot_s8s8<3, 5, 7>();
  }
  cpu::tile_release();
}
#else  // isa_obstacle() says so
constexpr Loop tiles = nullptr;
#endif

std::vector<Peak> all_peaks() {
  using cpu::Isa;
  return {
      {Isa::kAvx2, "vfmadd231ps", "float32", 2 * kSums * 8, fma_256},
      {Isa::kAvx2, "vpmaddwd + vpaddd", "8-bit weights, Winograd", 2 * kSums * 16, pairs_256},
      {Isa::kAvx2, "vpmaddubsw + vpmaddwd + vpaddd", "7-bit weights", 2 * kSums * 32, bytes_7_bit},
      {Isa::kAvx2, "vpmaddubsw + vpaddw", "4-bit weights", 2 * kQuadsIn16Bits * kSums / 2 * 32, bytes_4_bit},
      {Isa::kAvxVnni, "vpdpbusd", "integers", 2 * kSums * 32, cpu::has_avx_vnni() ? quads_vex : quads_evex},
      {Isa::kAvx512, "vfmadd231ps", "float32", 2 * kSums * 16, fma_512},
      {Isa::kAvx512, "vpdpbusd", "integers", 2 * kSums * 64, quads_512},
      {Isa::kAvx512, "vpdpwssd", "Winograd", 2 * kSums * 32, pairs_512},
      {Isa::kAmx, "tdpbssd", "integers", kTileProducts * kTileOperations, tiles},
  };
}

#else

std::vector<Peak> all_peaks() { throw std::runtime_error("knows no instructions of this architecture"); }

#endif

double seconds(const Peak& peak, int64_t steps) {
  const double begin = thread_seconds();
  peak.run(steps);
  return thread_seconds() - begin;
}

struct Row {
  Peak peak;
  std::string obstacle;  // why there are no rates
  double best;           // GOP/s
  double median;
};

// All repetitions of an instruction one after the other: wide vectors change the clock for a while.
Row measure(const Peak& peak) {
  if (!cpu::cpu_supports(peak.level)) {
    const std::string obstacle = cpu::isa_obstacle(peak.level);
    return {peak, obstacle.empty() ? "the CPU lacks it" : obstacle, 0, 0};
  }
  int64_t steps = 1;
  while (seconds(peak, steps) < kRepetitionSeconds) steps *= 2;
  std::vector<double> times;
  for (int i = 0; i < kRepetitions; ++i) times.push_back(seconds(peak, steps));
  std::sort(times.begin(), times.end());
  const double giga_operations = 1e-9 * static_cast<double>(peak.operations * steps);
  return {peak, "", giga_operations / times.front(), giga_operations / times[times.size() / 2]};
}

void print(const Row& row) {
  std::printf("%-9s %-31s %-24s", cpu::isa_name(row.peak.level), row.peak.instructions, row.peak.use);
  if (row.obstacle.empty()) {
    std::printf(" %8.1f %8.1f\n", row.best, row.median);
  } else {
    std::printf(" %s\n", row.obstacle.c_str());
  }
}

std::string fields(const Row& row) {
  const bool has_rates = row.obstacle.empty();
  return "\"level\": " + quoted(cpu::isa_name(row.peak.level)) +
         ", \"instructions\": " + quoted(row.peak.instructions) + ", \"use\": " + quoted(row.peak.use) +
         ", \"best_gops\": " + (has_rates ? std::to_string(row.best) : "null") +
         ", \"median_gops\": " + (has_rates ? std::to_string(row.median) : "null") +
         ", \"obstacle\": " + (has_rates ? "null" : quoted(row.obstacle));
}

int run(const std::vector<std::string>& arguments) {
  const std::string file = json_file(arguments);
  std::printf("%-9s %-31s %-24s %8s %8s\n", "level", "one thread, registers alone", "for", "GOP/s", "median");
  std::vector<std::string> rows;
  for (const Peak& peak : all_peaks()) {
    const Row row = measure(peak);
    print(row);
    std::fflush(stdout);
    rows.push_back(fields(row));
  }
  if (!file.empty()) {
    write(file, json("\"threads\": 1, \"repetitions\": " + std::to_string(kRepetitions), rows));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run_program("peaks", argc, argv, run); }
