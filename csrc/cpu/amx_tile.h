// The tile instructions of AMX that the kernels use, the only place they stand. With ADPDM_AMX_EMULATED they
// are calls of amx_emulation.h, which runs on any CPU and refuses what the CPU would refuse.
//
// Written as asm rather than with GCC's intrinsics, which make the same bytes but say too little: in GCC 12
// _tile_loadconfig reads 8 bytes of the 64 and _tile_loadd no memory, so stores before them are dropped.
#pragma once

#include <cstdint>

#if defined(ADPDM_AMX_EMULATED)
#include "cpu/amx_emulation.h"
#endif

namespace adpdm::cpu {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// What ldtilecfg reads. A tile of 0 rows and 0 bytes must not be used.
struct alignas(64) TileConfig {
  uint8_t palette;  // 1: eight tiles of up to 16 rows of 64 bytes
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "read by the CPU");

#define ADPDM_TILE inline __attribute__((always_inline)) void

namespace {

#if defined(ADPDM_AMX_EMULATED)

ADPDM_TILE tile_configure(const TileConfig& config) { amx_emulation::this_thread().configure(&config); }
ADPDM_TILE tile_release() { amx_emulation::this_thread().release(); }
template <int kTile>
ADPDM_TILE tile_zero() {
  amx_emulation::this_thread().zero(kTile);
}
template <int kTile>
ADPDM_TILE tile_load(const void* data, int64_t stride) {
  amx_emulation::this_thread().load(kTile, data, stride);
}
template <int kTile>
ADPDM_TILE tile_store(void* data, int64_t stride) {
  amx_emulation::this_thread().store(kTile, data, stride);
}
template <int kSums, int kA, int kB>
ADPDM_TILE tile_dot_s8s8() {
  amx_emulation::this_thread().dot_s8s8(kSums, kA, kB);
}

#else

// All tiles become zero.
ADPDM_TILE tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

// Back to the state in which threads start: switching threads then saves no tiles.
ADPDM_TILE tile_release() { asm volatile("tilerelease"); }

template <int kTile>
ADPDM_TILE tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Reads the tile's rows of its row_bytes, `stride` bytes apart.
template <int kTile>
ADPDM_TILE tile_load(const void* data, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(data), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
ADPDM_TILE tile_store(void* data, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(data), "r"(stride), "i"(kTile) : "memory");
}

// sums [m][n] i32 += sum over k of A [m][4 k + j] i8 * B [k][4 n + j] i8. A's bytes per row are 4 times B's
// rows.
template <int kSums, int kA, int kB>
ADPDM_TILE tile_dot_s8s8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

#endif

}  // namespace
}  // namespace adpdm::cpu
