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
constexpr int kMaxPixels = 16;       // of a thread, one after the other with the same weights
constexpr int kThreadsPerSm = 768;   // wanted before threads get a second pixel: twice what registers admit
constexpr int kRunWords = kRun / 4;  // of codes of one tap
constexpr int kChunkWords = kChunkBytes / 4;

// What a kernel is compiled for, from any layer to the one that counts.
enum class Form {
  kBytes,    // runs of fewer channels, or not aligned
  kVectors,  // whole runs of 8 codes at addresses that are multiples of 8
  k3x3,      // the same, 3x3 without upsampling: weights in registers, no loop over taps
};
constexpr int k3x3Words = 3;  // 9 taps and 3 idle ones

// Four taps of a channel as int8; those of 4 bits in the upper halves of bytes, where they count 16 times. A
// chunk of them has 16 taps in low nibbles, then 16 in high ones.
template <int kWeightBits>
ADPDM_DEVICE uint32_t as_int8(uint32_t word, bool high) {
  if constexpr (kWeightBits == 8) return word;
  return (high ? word : word << 4) & 0xf0f0f0f0u;
}

template <int kWeightBits>
ADPDM_DEVICE uint32_t weight_word(const uint8_t* row, int word) {
  const auto* words = reinterpret_cast<const uint32_t*>(row);
  if constexpr (kWeightBits == 8) return load(words + word);
  const int within = word % (2 * kChunkWords);
  const int chunk = word / (2 * kChunkWords);
  return as_int8<kWeightBits>(load(words + chunk * kChunkWords + within % kChunkWords),
                              within >= kChunkWords);
}

// From 4 taps of 4 channels to 4 channels of 4 taps.
ADPDM_DEVICE void transpose_bytes(const uint32_t (&taps)[kWordTaps], uint32_t (&channels)[4]) {
  const uint32_t low01 = permute_bytes<0x5140>(taps[0], taps[1]);
  const uint32_t high01 = permute_bytes<0x7362>(taps[0], taps[1]);
  const uint32_t low23 = permute_bytes<0x5140>(taps[2], taps[3]);
  const uint32_t high23 = permute_bytes<0x7362>(taps[2], taps[3]);
  channels[0] = permute_bytes<0x5410>(low01, low23);
  channels[1] = permute_bytes<0x7632>(low01, low23);
  channels[2] = permute_bytes<0x5410>(high01, high23);
  channels[3] = permute_bytes<0x7632>(high01, high23);
}

// Codes of a run at four taps.
using Taps = uint32_t[kRunWords][kWordTaps];

// Adds the products of four taps; weight(i) is those taps of channel i of the run.
template <typename Weight>
ADPDM_DEVICE void add_taps(const Taps& codes, const Weight& weight, int32_t (&sums)[kRun]) {
  ADPDM_UNROLL
  for (int half = 0; half < kRunWords; ++half) {
    uint32_t turned[4];
    transpose_bytes(codes[half], turned);
    ADPDM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int channel = 4 * half + i;
      sums[channel] = dot4(turned[i], weight(channel), sums[channel]);
    }
  }
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

// The codes of one thread's channels: where they are, and what the halo holds.
struct Source {
  const uint8_t* codes;  // of the first image
  int64_t image_bytes;
  int32_t pixel_bytes;
  int64_t line_bytes;
  uint32_t fill;  // four times the zero-point

  ADPDM_DEVICE Source(const IgemmProblem& problem, const Run& run) {
    const IgemmSource& source = problem.sources[0];
    const IgemmGeometry& geometry = problem.geometry;
    codes = source.codes + run.output;
    pixel_bytes = static_cast<int32_t>(source.pixel_bytes);
    line_bytes = int64_t{geometry.width >> geometry.upsample_shift} * pixel_bytes;
    image_bytes = (geometry.height >> geometry.upsample_shift) * line_bytes;
    const int64_t group = clamped_index(source.qparams.group_index, source.qparams.num_groups);
    fill = (static_cast<uint32_t>(load(source.qparams.zero_point + group)) & 0xffu) * 0x01010101u;
  }
};

ADPDM_DEVICE bool is_below(int32_t at, int32_t size) {
  return static_cast<uint32_t>(at) < static_cast<uint32_t>(size);  // and not negative
}

template <bool kVector>
ADPDM_DEVICE void load_codes(const uint8_t* codes, const Run& run, uint32_t (&words)[kRunWords]) {
  if constexpr (kVector) {
    const Bytes8 bytes = load(reinterpret_cast<const Bytes8*>(codes));
    words[0] = bytes.word[0];
    words[1] = bytes.word[1];
  } else {
    load_elements(codes, run.count, false, words);
  }
}

// Goes through the taps of an output pixel, any kernel.
template <bool kVector>
class TapReader {
 public:
  ADPDM_DEVICE TapReader(const IgemmGeometry& geometry, const Source& source, const Run& run,
                         const Pixel& pixel)
      : geometry_(geometry), source_(source), run_(run) {
    image_ = source.codes + pixel.image * source.image_bytes;
    first_x_ = x_ = pixel.x * geometry.stride_width - geometry.padding_left;
    y_ = pixel.y * geometry.stride_height - geometry.padding_top;
  }

  // Codes of the next 4 taps; behind the last one anything, its weights are 0.
  ADPDM_DEVICE void read(Taps& taps) {
    ADPDM_UNROLL
    for (int t = 0; t < kWordTaps; ++t) {
      uint32_t words[kRunWords];
      ADPDM_UNROLL
      for (int w = 0; w < kRunWords; ++w) words[w] = source_.fill;
      if (row_ < geometry_.kernel_height && is_below(y_, geometry_.height) && is_below(x_, geometry_.width)) {
        const int shift = geometry_.upsample_shift;
        const int64_t line = (y_ >> shift) * source_.line_bytes;
        load_codes<kVector>(image_ + line + int64_t{x_ >> shift} * source_.pixel_bytes, run_, words);
      }
      ADPDM_UNROLL
      for (int w = 0; w < kRunWords; ++w) taps[w][t] = words[w];
      advance();
    }
  }

 private:
  ADPDM_DEVICE void advance() {
    x_ += geometry_.dilation_width;
    if (++column_ < geometry_.kernel_width) return;
    column_ = 0;
    x_ = first_x_;
    y_ += geometry_.dilation_height;
    ++row_;
  }

  const IgemmGeometry& geometry_;
  const Source& source_;
  const Run& run_;
  const uint8_t* image_;
  int32_t first_x_, y_, x_;       // of the tap, in the input
  int32_t column_ = 0, row_ = 0;  // of the tap, in the kernel
};

// All codes of a 3x3 kernel: places are worked out per line and column, not per tap.
ADPDM_DEVICE void read_3x3(const IgemmGeometry& geometry, const Source& source, const Run& run,
                           const Pixel& pixel, Taps (&taps)[k3x3Words]) {
  const uint8_t* image = source.codes + pixel.image * source.image_bytes;
  const int32_t top = pixel.y * geometry.stride_height - geometry.padding_top;
  const int32_t left = pixel.x * geometry.stride_width - geometry.padding_left;
  int32_t offset[3];
  bool inside[3];
  ADPDM_UNROLL
  for (int column = 0; column < 3; ++column) {
    const int32_t x = left + column * geometry.dilation_width;
    inside[column] = is_below(x, geometry.width);
    offset[column] = inside[column] ? x * source.pixel_bytes : 0;
  }
  ADPDM_UNROLL
  for (int line = 0; line < 3; ++line) {
    const int32_t y = top + line * geometry.dilation_height;
    const bool exists = is_below(y, geometry.height);
    const uint8_t* codes = image + y * source.line_bytes;
    ADPDM_UNROLL
    for (int column = 0; column < 3; ++column) {
      const int tap = 3 * line + column;
      uint32_t words[kRunWords] = {source.fill, source.fill};
      if (exists && inside[column]) load_codes<true>(codes + offset[column], run, words);
      ADPDM_UNROLL
      for (int w = 0; w < kRunWords; ++w) taps[tap / kWordTaps][w][tap % kWordTaps] = words[w];
    }
  }
  ADPDM_UNROLL
  for (int tap = 9; tap < k3x3Words * kWordTaps; ++tap) {  // their weights are 0
    ADPDM_UNROLL
    for (int w = 0; w < kRunWords; ++w) taps[tap / kWordTaps][w][tap % kWordTaps] = 0;
  }
}

// Weights of a thread's channels; channels that do not exist repeat the last one.
template <int kWeightBits, Form kForm>
class Weights {
 public:
  ADPDM_DEVICE Weights(const IgemmSource& source, const Run& run) : row_bytes_(source.weight_row) {
    first_ = source.weight + run.output * row_bytes_;
    last_ = run.count - 1;
    if constexpr (kForm == Form::k3x3) {
      ADPDM_UNROLL
      for (int i = 0; i < kRun; ++i) {
        const Bytes16 row = load(reinterpret_cast<const Bytes16*>(first_ + i * row_bytes_));
        ADPDM_UNROLL
        for (int w = 0; w < k3x3Words; ++w) kept_[w][i] = as_int8<kWeightBits>(row.word[w], false);
      }
    }
  }

  ADPDM_DEVICE uint32_t at(int word, int channel) const {
    if constexpr (kForm == Form::k3x3) return kept_[word][channel];
    return weight_word<kWeightBits>(first_ + (channel < last_ ? channel : last_) * row_bytes_, word);
  }

 private:
  int64_t row_bytes_;
  const uint8_t* first_;
  int32_t last_;
  uint32_t kept_[kForm == Form::k3x3 ? k3x3Words : 1][kRun];
};

// A thread computes 8 channels of `pixels` output pixels.
template <int kWeightBits, Form kForm>
ADPDM_KERNEL(kThreads, kForm == Form::k3x3 ? 3 : 1)
depthwise_kernel(const ADPDM_GRID_CONSTANT IgemmProblem problem, int32_t pixels) {
  constexpr int kShift = kWeightBits == 4 ? 4 : 0;
  const IgemmGeometry& geometry = problem.geometry;
  // 32 bits: a thread of 16 pixels has 128 codes, and fewer of them where there are few threads.
  const auto runs = static_cast<uint32_t>(ceil_div(problem.outputs, kRun));
  const auto index = static_cast<uint32_t>(block_x() * kThreads + thread_index());
  const int64_t first = int64_t{index / runs} * pixels;
  if (first >= problem.rows) return;
  const Run run = run_at(problem, 0, static_cast<int32_t>(index % runs) * kRun);
  const Weights<kWeightBits, kForm> weights(problem.sources[0], run);
  const RunTerms terms = load_terms(problem, run);
  const Quantizer next = next_quantizer(problem.output);
  const Source source(problem, run);
  Pixel pixel = pixel_at(geometry, static_cast<int32_t>(first));
  const int64_t end = first + pixels < problem.rows ? first + pixels : problem.rows;
  ADPDM_NO_UNROLL
  for (int64_t row = first; row < end; ++row) {
    float residual[kRun] = {};
    load_residual(problem, run, row, residual);
    int32_t sums[kRun] = {};
    if constexpr (kForm == Form::k3x3) {
      Taps taps[k3x3Words];
      read_3x3(geometry, source, run, pixel, taps);
      ADPDM_UNROLL
      for (int w = 0; w < k3x3Words; ++w) {
        add_taps(
            taps[w], [&](int i) { return weights.at(w, i); }, sums);
      }
    } else {
      const int words = (geometry.kernel_height * geometry.kernel_width + kWordTaps - 1) / kWordTaps;
      TapReader<kForm == Form::kVectors> reader(geometry, source, run, pixel);
      ADPDM_NO_UNROLL
      for (int w = 0; w < words; ++w) {
        Taps taps;
        reader.read(taps);
        add_taps(
            taps, [&](int i) { return weights.at(w, i); }, sums);
      }
    }
    pixel.advance(geometry);
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

Form form_of(const IgemmProblem& problem) {
  const IgemmGeometry& geometry = problem.geometry;
  const bool vectors =
      problem.wide && reinterpret_cast<uintptr_t>(problem.sources[0].codes) % sizeof(Bytes8) == 0;
  if (!vectors) return Form::kBytes;
  const bool small = geometry.kernel_height == 3 && geometry.kernel_width == 3 &&
                     geometry.upsample_shift == 0 &&
                     geometry.width * problem.sources[0].pixel_bytes <= INT32_MAX;
  return small ? Form::k3x3 : Form::kVectors;
}

template <int kWeightBits>
void launch_bits(const char* op, const IgemmProblem& problem, Stream stream) {
  const int64_t runs = ceil_div(problem.outputs, kRun);
  const int64_t threads = int64_t{current_device_info().num_sms} * kThreadsPerSm;
  const auto pixels = static_cast<int32_t>(std::clamp<int64_t>(problem.rows * runs / threads, 1, kMaxPixels));
  const int64_t blocks = ceil_div(runs * ceil_div(problem.rows, pixels), kThreads);
  const LaunchShape shape = {blocks, 1, 1, kThreads, 0, stream, op};
  switch (form_of(problem)) {
    case Form::kBytes:
      return launch(depthwise_kernel<kWeightBits, Form::kBytes>, shape, problem, pixels);
    case Form::kVectors:
      return launch(depthwise_kernel<kWeightBits, Form::kVectors>, shape, problem, pixels);
    case Form::k3x3:
      return launch(depthwise_kernel<kWeightBits, Form::k3x3>, shape, problem, pixels);
  }
}

}  // namespace

bool is_depthwise(const Conv2dArgs& args) {
  return args.num_segments == 1 && args.groups > 1 && args.out_channels == args.groups &&
         args.segments[0].channels == args.groups && !args.segments[0].packed;
}

void launch_depthwise(const char* op, const IgemmProblem& problem, IgemmMode mode, Stream stream) {
  if (int64_t{problem.rows} * problem.outputs == 0) return;
  mode == IgemmMode::kA8W8 ? launch_bits<8>(op, problem, stream) : launch_bits<4>(op, problem, stream);
}

}  // namespace adpdm::cuda
