// wgmma on the executor: products that complete late, decoded descriptors, and checks of the fences around
// them.
#pragma once

#include <cstdint>
#include <memory>

namespace adpdm::simt {

// While products are pending, the accumulators of a thread hold this.
constexpr int32_t kAccumulatorPoison = INT32_MIN + 0x0BADF00D;

// What is known of the products of a block; the executor drops it with the block.
struct WgmmaState;

// c += A B: the registers of the running thread, of the product of its warpgroup (layout: cuda/wgmma.cuh). a
// and b describe [64, 32] s8 and [2 * registers, 32] s8 in shared memory, which is read when the product
// completes, at once or in wgmma_wait. Fails without a fence, where the warpgroup disagrees, at a descriptor
// that the hardware would read otherwise or past the shared memory, at bytes that were written without a
// proxy fence, and where c is written between the fence and the end of the product.
void wgmma_s8(int32_t* c, int registers, uint64_t a, uint64_t b);

// Orders accesses of c before the products of the next commit.
void wgmma_fence(const int32_t* c, int registers);

void wgmma_commit();

// What the running thread has written to shared memory becomes visible to wgmma.
void fence_proxy_async();

// Ordinary stores and copies call this: wgmma must not see the bytes before fence_proxy_async() of this
// thread. Remembers the last writer of every 16 bytes.
void note_shared_write(const void* p, int bytes);

}  // namespace adpdm::simt
