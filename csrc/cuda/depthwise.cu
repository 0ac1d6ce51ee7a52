// Implements depthwise.h. The reduction of a channel is its taps, which the blob of weights holds one after
// the other: a word of a row is 4 taps, as dp4a multiplies them. Codes come 8 channels of one tap at a time
// and change places in registers.
#include <algorithm>

#include "cuda/depthwise.h"
#include "cuda/igemm_epilogue.cuh"
#include "cuda/launch.cuh"

namespace adpdm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWordTaps = 4;
// Taps whose weights a thread of the fast kernel keeps in registers: 3x3, 1 in 4 of them idle.
constexpr int kFastWords = 3;
constexpr int kMaxPixels = 16;        // of a thread, one after the other with the same weights
constexpr int kThreadsPerSm = 2048;   // with fewer, multiprocessors stay empty: threads get fewer pixels
constexpr int kRunWords = kRun / 4;   // of codes of one tap
constexpr int kNibbleChunkWords = 4;  // 32 codes of 4 bits: low nibbles of all, then high ones

// Four taps of a channel as int8; those of 4 bits in the upper halves of bytes, where they count 16 times.
template <int kWeightBits>
ADPDM_DEVICE uint32_t weight_word(const uint8_t* row, int word) {
  if constexpr (kWeightBits == 8) return load(reinterpret_cast<const uint32_t*>(row) + word);
  const int within = word % (2 * kNibbleChunkWords);
  const int chunk = word / (2 * kNibbleChunkWords);
  const uint32_t nibbles =
      load(reinterpret_cast<const uint32_t*>(row) + chunk * kNibbleChunkWords + within % kNibbleChunkWords);
  return (within < kNibbleChunkWords ? nibbles << 4 : nibbles) & 0xf0f0f0f0u;
}

// From 4 taps of 4 channels to 4 channels of 4 taps.
ADPDM_DEVICE void transpose_bytes(const uint32_t (&taps)[kWordTaps], uint32_t (&channels)[4]) {
  const uint32_t low01 = permute_bytes<0x5140>(taps[0], taps[1]),
                 high01 = permute_bytes<0x7362>(taps[0], taps[1]);
  const uint32_t low23 = permute_bytes<0x5140>(taps[2], taps[3]),
                 high23 = permute_bytes<0x7362>(taps[2], taps[3]);
  channels[0] = permute_bytes<0x5410>(low01, low23);
  channels[1] = permute_bytes<0x7632>(low01, low23);
  channels[2] = permute_bytes<0x5410>(high01, high23);
  channels[3] = permute_bytes<0x7632>(high01, high23);
}

// An output pixel, walking along its line.
struct Pixel {
  int32_t image, y, x;

  ADPDM_DEVICE void advance(const IgemmGeometry& geometry) {
    if (++x < geometry.out_width) return;
    x = 0;
    if (++y < geometry.out_height) return;
    y = 0;
    ++image;
  }
};

ADPDM_DEVICE Pixel pixel_at(const IgemmGeometry& geometry, int32_t row) {
  const int32_t line = row / geometry.out_width;
  return {line / geometry.out_height, line % geometry.out_height, row % geometry.out_width};
}

// The channels of one thread: where their codes are, and what the halo holds.
template <bool kFast>
class Channels {
 public:
  ADPDM_DEVICE Channels(const IgemmProblem& problem, const Run& run)
      : geometry_(problem.geometry), run_(run), pixel_bytes_(problem.sources[0].pixel_bytes) {
    const IgemmSource& source = problem.sources[0];
    codes_ = source.codes + run.output;
    const int64_t group = clamped_index(source.qparams.group_index, source.qparams.num_groups);
    fill_ = (static_cast<uint32_t>(load(source.qparams.zero_point + group)) & 0xffu) * 0x01010101u;
  }

  // Moves to the first tap of an output pixel.
  ADPDM_DEVICE void start(const Pixel& pixel) {
    image_ = codes_ + int64_t{pixel.image} * (geometry_.height >> geometry_.upsample_shift) *
                          (geometry_.width >> geometry_.upsample_shift) * pixel_bytes_;
    first_x_ = pixel.x * geometry_.stride_width - geometry_.padding_left;
    y_ = pixel.y * geometry_.stride_height - geometry_.padding_top;
    x_ = first_x_;
    column_ = row_ = 0;
  }

  // Codes of the next 4 taps; behind the last one anything, its weights are 0.
  ADPDM_DEVICE void next_taps(uint32_t (&taps)[kRunWords][kWordTaps]) {
    ADPDM_UNROLL
    for (int t = 0; t < kWordTaps; ++t) {
      uint32_t words[kRunWords];
      read(words);
      ADPDM_UNROLL
      for (int w = 0; w < kRunWords; ++w) taps[w][t] = words[w];
      advance();
    }
  }

 private:
  ADPDM_DEVICE void read(uint32_t (&words)[kRunWords]) const {
    ADPDM_UNROLL
    for (int w = 0; w < kRunWords; ++w) words[w] = fill_;
    const bool inside = row_ < geometry_.kernel_height &&
                        static_cast<uint32_t>(y_) < static_cast<uint32_t>(geometry_.height) &&
                        static_cast<uint32_t>(x_) < static_cast<uint32_t>(geometry_.width);
    if (!inside) return;
    const int shift = geometry_.upsample_shift;
    const uint8_t* codes =
        image_ + (int64_t{y_ >> shift} * (geometry_.width >> shift) + (x_ >> shift)) * pixel_bytes_;
    if constexpr (kFast) {
      const Bytes8 bytes = load(reinterpret_cast<const Bytes8*>(codes));
      words[0] = bytes.word[0];
      words[1] = bytes.word[1];
    } else {
      load_elements(codes, run_.count, false, words);
    }
  }

  ADPDM_DEVICE void advance() {
    x_ += geometry_.dilation_width;
    if (++column_ < geometry_.kernel_width) return;
    column_ = 0;
    x_ = first_x_;
    y_ += geometry_.dilation_height;
    ++row_;
  }

  const IgemmGeometry& geometry_;
  const Run run_;
  const int64_t pixel_bytes_;
  const uint8_t* codes_;
  const uint8_t* image_;
  uint32_t fill_;
  int32_t first_x_, y_, x_;  // of the tap, in the input
  int32_t column_, row_;     // of the tap, in the kernel
};

// A thread computes 8 channels of `pixels` output pixels. kFast: at most 12 taps, whole runs of 8 at
// addresses that are multiples of 8.
template <int kWeightBits, bool kFast>
ADPDM_KERNEL(kThreads, kFast ? 4 : 1)
depthwise_kernel(const ADPDM_GRID_CONSTANT IgemmProblem problem, int32_t pixels) {
  constexpr int kShift = kWeightBits == 4 ? 4 : 0;
  const int64_t runs = ceil_div(problem.outputs, kRun);
  const int64_t index = block_x() * kThreads + thread_index();
  const int64_t first = index / runs * pixels;
  if (first >= problem.rows) return;
  const Run run = run_at(problem, 0, static_cast<int32_t>(index % runs) * kRun);
  const IgemmSource& source = problem.sources[0];
  const int taps = problem.geometry.kernel_height * problem.geometry.kernel_width;
  const int words = kFast ? kFastWords : (taps + kWordTaps - 1) / kWordTaps;
  // Channels that do not exist repeat the last one.
  const auto word_at = [&](int i, int word) {
    const int32_t channel = run.output + (i < run.count ? i : run.count - 1);
    return weight_word<kWeightBits>(source.weight + channel * source.weight_row, word);
  };
  uint32_t kept[kFastWords][kRun];
  if constexpr (kFast) {
    ADPDM_UNROLL
    for (int w = 0; w < kFastWords; ++w) {
      ADPDM_UNROLL
      for (int i = 0; i < kRun; ++i) kept[w][i] = word_at(i, w);
    }
  }
  const RunTerms terms = load_terms(problem, run);
  const Quantizer next = next_quantizer(problem.output);
  Channels<kFast> channels(problem, run);
  Pixel pixel = pixel_at(problem.geometry, static_cast<int32_t>(first));
  const int64_t end = first + pixels < problem.rows ? first + pixels : problem.rows;
  ADPDM_NO_UNROLL
  for (int64_t row = first; row < end; ++row) {
    float residual[kRun] = {};
    load_residual(problem, run, row, residual);
    channels.start(pixel);
    pixel.advance(problem.geometry);
    int32_t sums[kRun] = {};
    const auto add_word = [&](int w) {
      uint32_t codes[kRunWords][kWordTaps];
      channels.next_taps(codes);
      ADPDM_UNROLL
      for (int half = 0; half < kRunWords; ++half) {
        uint32_t turned[4];
        transpose_bytes(codes[half], turned);
        ADPDM_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int channel = 4 * half + i;
          const uint32_t weight = kFast ? kept[kFast ? w : 0][channel] : word_at(channel, w);
          sums[channel] = dot4(turned[i], weight, sums[channel]);
        }
      }
    };
    if constexpr (kFast) {
      ADPDM_UNROLL
      for (int w = 0; w < kFastWords; ++w) add_word(w);
    } else {
      ADPDM_NO_UNROLL
      for (int w = 0; w < words; ++w) add_word(w);
    }
    float y[kRun];
    ADPDM_UNROLL
    for (int i = 0; i < kRun; ++i) {
      sums[i] >>= kShift;
      y[i] = terms.bias[i];
    }
    add_source(terms, 0, sums, y);
    finish_run(problem, next, run, row, residual, y);
  }
}

template <int kWeightBits>
void launch_mode(const char* op, const IgemmProblem& problem, Stream stream) {
  const int64_t runs = ceil_div(problem.outputs, kRun);
  const int64_t threads = int64_t{current_device_info().num_sms} * kThreadsPerSm;
  const auto pixels = static_cast<int32_t>(std::clamp<int64_t>(problem.rows * runs / threads, 1, kMaxPixels));
  const int64_t blocks = ceil_div(runs * ceil_div(problem.rows, pixels), kThreads);
  const LaunchShape shape = {blocks, 1, 1, kThreads, 0, stream, op};
  const int64_t taps = int64_t{problem.geometry.kernel_height} * problem.geometry.kernel_width;
  const bool fast = problem.wide && taps <= kFastWords * kWordTaps &&
                    reinterpret_cast<uintptr_t>(problem.sources[0].codes) % sizeof(Bytes8) == 0;
  if (fast) {
    launch(depthwise_kernel<kWeightBits, true>, shape, problem, pixels);
  } else {
    launch(depthwise_kernel<kWeightBits, false>, shape, problem, pixels);
  }
}

}  // namespace

bool is_depthwise(const Conv2dArgs& args) {
  return args.groups > 1 && args.out_channels == args.groups && args.segments[0].channels == args.groups &&
         !args.segments[0].packed;
}

void launch_depthwise(const char* op, const IgemmProblem& problem, IgemmMode mode, Stream stream) {
  if (int64_t{problem.rows} * problem.outputs == 0) return;
  mode == IgemmMode::kA8W8 ? launch_mode<8>(op, problem, stream) : launch_mode<4>(op, problem, stream);
}

}  // namespace adpdm::cuda
