// Times levels of CPU kernels against each other in one process, on one thread, in turns: CPU time per call,
// and ratios to the first level, as medians of kRounds with quartiles. "-direct" behind a level: 3x3
// convolutions without Winograd's method, "-winograd": with it, however few tiles there are. Needs no Python:
//     build/core/adpdm_cpu_levels avx512 avx512-direct avx_vnni avx2
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/attention_quantize.h"
#include "cpu/isa.h"
#include "cpu/winograd.h"
#include "igemm_problem.h"
#include "measuring.h"

namespace {

using namespace adpdm;
using namespace adpdm::benchmarks;

constexpr int kRounds = 25;
constexpr double kMinSampleSeconds = 0.002;  // a sample repeats a call until it lasts this long

std::string number(int64_t n) { return std::to_string(n); }

struct Level {
  cpu::Isa isa;
  cpu::WinogradUse winograd;
};

Level parse_level(const std::string& name) {
  const size_t dash = name.find('-');
  const std::string suffix = dash == std::string::npos ? "" : name.substr(dash);
  Level level{cpu::resolve_isa(name.substr(0, dash)), cpu::WinogradUse::kWhereQuicker};
  if (suffix == "-direct") {
    level.winograd = cpu::WinogradUse::kNever;
  } else if (suffix == "-winograd") {
    level.winograd = cpu::WinogradUse::kForAnyTiles;
  } else if (!suffix.empty()) {
    throw std::runtime_error("wanted -direct or -winograd behind a level, got '" + name + "'");
  }
  return level;
}

class ScopedLevel {
 public:
  explicit ScopedLevel(const Level& level) : isa_(level.isa), winograd_(level.winograd) {}

 private:
  cpu::ScopedIsa isa_;
  cpu::ScopedWinograd winograd_;
};

struct Layer {
  int64_t channels;
  int64_t size;  // of a square map, or rows of a linear layer, where kernel is 0
  int64_t outputs;
  int64_t kernel;
  int64_t stride = 1;
};

// Of the demo U-Net, of the CIFAR-10 U-Net, of Stable Diffusion 1.5, and linear layers of transformers.
constexpr Layer kLayers[] = {{32, 32, 32, 3},    {32, 32, 32, 3, 2}, {96, 32, 32, 1},     {64, 16, 64, 3},
                             {192, 16, 64, 3},   {128, 16, 128, 3},  {128, 8, 128, 3},    {256, 8, 128, 1},
                             {256, 16, 256, 3},  {256, 8, 256, 3},   {256, 4, 256, 3},    {128, 32, 128, 3},
                             {512, 16, 256, 3},  {320, 64, 320, 3},  {640, 32, 640, 3},   {1280, 16, 1280, 3},
                             {1280, 8, 1280, 3}, {64, 256, 64, 0},   {320, 1024, 320, 0}, {1280, 77, 1280, 0},
                             {192, 64, 768, 0},  {512, 1, 512, 0}};

struct Attention {
  int64_t images;
  int64_t heads;
  int64_t head_size;
  int64_t queries;
  int64_t keys;
};

constexpr Attention kAttentions[] = {{1, 8, 40, 1024, 1024},
                                     {1, 8, 40, 1024, 77},
                                     {1, 8, 160, 256, 256},
                                     {1, 1, 64, 256, 256},
                                     {8, 4, 32, 64, 64}};

void measure(const std::string& name, const std::vector<Level>& levels, const std::function<void()>& call) {
  std::vector<int> calls;
  std::vector<std::vector<double>> seconds(levels.size());
  for (const Level& level : levels) {
    const ScopedLevel scope(level);
    calls.push_back(calls_lasting(kMinSampleSeconds, call));
  }
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < levels.size(); ++i) {
      const ScopedLevel scope(levels[i]);
      seconds[i].push_back(seconds_per_call(call, calls[i]));
    }
  }
  std::printf("%-34s %9.1f", name.c_str(), 1e6 * quantile(seconds[0], 0.5));
  for (size_t i = 1; i < levels.size(); ++i) {
    std::vector<double> ratios;
    for (int round = 0; round < kRounds; ++round) ratios.push_back(seconds[i][round] / seconds[0][round]);
    std::printf("   %5.2f [%.2f, %.2f]", quantile(ratios, 0.5), quantile(ratios, 0.25),
                quantile(ratios, 0.75));
  }
  std::printf("\n");
}

void measure_layer(const Layer& layer, int weight_bits, const std::vector<Level>& levels) {
  const int64_t kernel = std::max<int64_t>(1, layer.kernel);
  const Size2d input = layer.kernel ? Size2d{layer.size, layer.size} : Size2d{1, layer.size};
  std::mt19937 random(1);
  const testing::SegmentData data =
      testing::random_segment(random, input.height * input.width, layer.channels, layer.outputs,
                              kernel * kernel, 1, weight_bits, false);
  Conv2dArgs args{};
  args.segments[0] = data.segment();
  args.num_segments = args.batch = args.upsample = args.groups = 1;
  args.out_channels = layer.outputs;
  args.input = input;
  args.out = {(input.height - 1) / layer.stride + 1, (input.width - 1) / layer.stride + 1};
  args.kernel = {kernel, kernel};
  args.stride = {layer.stride, layer.stride};
  args.padding = args.padding_end = {kernel / 2, kernel / 2};
  args.dilation = {1, 1};
  args.weight_bits = weight_bits;
  const std::vector<float> bias(layer.outputs);
  std::vector<float> out(args.out.height * args.out.width * layer.outputs);
  args.output = plain_output(bias.data(), out.data(), FloatType::kFloat32);
  const std::string kind = layer.kernel ? "conv" + number(kernel) + "x" + number(kernel) : "linear";
  const std::string name = "W" + number(weight_bits) + "A8 " + kind + " " + number(layer.channels) + "->" +
                           number(layer.outputs) + " @" + number(layer.size / layer.stride);
  measure(name, levels, [&] { cpu::conv2d(args); });
}

void measure_attention(const Attention& shape, bool int8, const std::vector<Level>& levels) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const int64_t channels = shape.heads * shape.head_size;
  std::vector<float> tensors[3];
  for (int i = 0; i < 3; ++i) {
    tensors[i].resize(shape.images * (i ? shape.keys : shape.queries) * channels);
    for (float& x : tensors[i]) x = normal(random);
  }
  const float scale = 0.02f;
  const int32_t zero_point = 0, group = 0;
  std::vector<int8_t> codes(tensors[0].size());
  AttentionQuantizeArgs args{};
  args.query = {tensors[0].data(), shape.queries * channels, channels};
  args.key = {tensors[1].data(), shape.keys * channels, channels};
  args.value = {tensors[2].data(), shape.keys * channels, channels};
  args.type = FloatType::kFloat32;
  args.batch = shape.images;
  args.heads = shape.heads;
  args.head_size = shape.head_size;
  args.queries = shape.queries;
  args.keys = shape.keys;
  args.int8 = int8;
  args.qparams = {&scale, &zero_point, &group, 1};
  args.num_bits = 8;
  args.codes = codes.data();
  const std::string name = std::string(int8 ? "int8" : "float") + " attention " + number(shape.queries) +
                           "x" + number(shape.keys) + ", " + number(shape.images) + " x " +
                           number(shape.heads) + " of " + number(shape.head_size);
  measure(name, levels, [&] { cpu::attention_quantize(args); });
}

int run(const std::vector<std::string>& names) {
  if (names.empty()) {
    std::fprintf(stderr, "levels: wanted levels to compare, e.g. avx_vnni avx2; got none\n");
    return 1;
  }
  std::vector<Level> levels;
  for (const std::string& name : names) levels.push_back(parse_level(name));
  std::printf("%-34s %9s", "one thread", (names[0] + ", us").c_str());
  for (size_t i = 1; i < names.size(); ++i) std::printf("   %18s", (names[i] + " / " + names[0]).c_str());
  std::printf("\n");
  for (int weight_bits : {8, 4}) {
    for (const Layer& layer : kLayers) measure_layer(layer, weight_bits, levels);
  }
  for (const Attention& shape : kAttentions) {
    for (bool int8 : {false, true}) measure_attention(shape, int8, levels);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run_program("levels", argc, argv, run); }
