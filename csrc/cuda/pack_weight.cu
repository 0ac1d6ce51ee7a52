// Packs weight codes for the CUDA kernels of linear and conv2d (layout: weight_row_bytes in igemm_problem.h).
#include "cuda/device.cuh"
#include "cuda/igemm.h"
#include "cuda/launch.cuh"
#include "cuda/nvtx.h"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 256;

// The code at position k of a row: channels fastest, then taps; 0 behind the last.
ADPDM_DEVICE uint32_t code_at(const PackWeightArgs& args, int64_t output, int64_t k) {
  if (k >= args.taps * args.group_channels) return 0;
  const int64_t tap = k / args.group_channels;
  const int64_t channel = k % args.group_channels;
  return static_cast<uint8_t>(load(args.codes + (output * args.group_channels + channel) * args.taps + tap));
}

// A thread writes one chunk of the rows or of the fill behind them: 16 codes, or 32 of 4 bits with code j +
// 16 above code j.
ADPDM_KERNEL(kThreads, 1) pack_weight_chunks(PackWeightArgs args, int64_t chunks_per_row) {
  const int64_t index = block_x() * kThreads + thread_index();
  const int64_t fill = index - args.out_channels * chunks_per_row;  // behind the rows
  if (fill >= kFillBytes / kChunkBytes) return;
  if (fill >= 0) {
    const uint32_t word = static_cast<uint32_t>(fill) * 0x01010101u;
    return store(reinterpret_cast<Bytes16*>(args.packed) + index, Bytes16{{word, word, word, word}});
  }
  const int64_t output = index / chunks_per_row;
  const bool nibbles = stored_in_nibbles(args.num_bits);
  const int64_t first = index % chunks_per_row * codes_in(kChunkBytes, nibbles ? 4 : 8);
  Bytes16 chunk{};
  ADPDM_UNROLL
  for (int b = 0; b < kChunkBytes; ++b) {
    uint32_t byte = code_at(args, output, first + b);
    if (nibbles) byte = (byte & 0xf) | (code_at(args, output, first + b + kChunkBytes) & 0xf) << 4;
    chunk.word[b / 4] |= byte << (b % 4 * 8);
  }
  store(reinterpret_cast<Bytes16*>(args.packed) + index, chunk);
}

}  // namespace

void pack_weight(const PackWeightArgs& args, Stream stream) {
  const Range range([&] {
    return "pack_weight " + std::to_string(args.out_channels) + "x" + std::to_string(args.group_channels) +
           "x" + std::to_string(args.taps) + " " + std::to_string(args.num_bits) + " bits";
  });
  const int64_t chunks_per_row =
      weight_row_bytes(args.group_channels * args.taps, args.num_bits) / kChunkBytes;
  const int64_t chunks = args.out_channels * chunks_per_row + kFillBytes / kChunkBytes;
  const int64_t blocks = ceil_div(chunks, kThreads);
  launch(pack_weight_chunks, {blocks, 1, 1, kThreads, 0, stream, "pack_weight"}, args, chunks_per_row);
}

}  // namespace adpdm::cuda
