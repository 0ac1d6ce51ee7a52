// vpdpbusd and vpdpwssd in 256 bits, the products of AVX-VNNI, in the encoding of the including file:
// ADPDM_DOT_ENCODING is "vex" (AVX-VNNI) or "evex" (AVX-512 VNNI with VL).
//
// Written as asm rather than with intrinsics: with their flag for AVX-512 GCC would use its 32 registers,
// masks and 512 bits as well. So both encodings are the same code, on the 16 registers that AVX has, and what
// a CPU with AVX-512 shows of one holds for the other (tools/check_avx_vnni.py compares them).
#pragma once

#include <immintrin.h>

namespace adpdm::cpu::ADPDM_ISA_NAMESPACE {
namespace {

// sums [8] + the 4 products of bytes in each lane, codes unsigned, weights signed; nothing saturates.
inline __attribute__((always_inline)) __m256i dot_quads(__m256i sums, __m256i codes, __m256i weights) {
  asm("%{" ADPDM_DOT_ENCODING "%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(weights));
  return sums;
}

// sums [8] + the 2 products of signed 16-bit numbers in each lane; sums wrap.
inline __attribute__((always_inline)) __m256i dot_pairs(__m256i sums, __m256i codes, __m256i weights) {
  asm("%{" ADPDM_DOT_ENCODING "%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(weights));
  return sums;
}

}  // namespace
}  // namespace adpdm::cpu::ADPDM_ISA_NAMESPACE
