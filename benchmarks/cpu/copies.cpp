// Times the operators that do little more than read and write against a copy of as many bytes in all, on one
// thread, in turns: their share of the copy bandwidth at each size. Without Python, whose calls take as long
// as 10 000 values; memory is used again and again, as a model's is. CPU time, medians of kRounds:
//     build/core/adpdm_cpu_copies --json runs/copies.json
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>

#include "core/quantize.h"
#include "cpu/isa.h"
#include "measuring.h"

namespace {

using namespace adpdm;
using namespace adpdm::benchmarks;

constexpr int kRounds = 41;
constexpr double kSampleSeconds = 0.002;  // a sample repeats a call until it lasts this long
constexpr int64_t kSizes[] = {10'000, 100'000, 1'000'000, 10'000'000};
constexpr cpu::Isa kLevels[] = {cpu::Isa::kAvx512, cpu::Isa::kAvx2,
                                cpu::Isa::kPortable};            // of such operators
constexpr int64_t kValueBytes = sizeof(float) + sizeof(int8_t);  // read and written

struct Row {
  const char* op;
  cpu::Isa level;
  int64_t size;
  double nanoseconds;  // per value
  double share;        // the copy's time divided by the operator's
};

class Buffers {
 public:
  explicit Buffers(int64_t size)
      : size_(size), values_(size), codes_(size), from_(size * kValueBytes / 2), to_(from_.size()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& x : values_) x = normal(random);
  }

  void quantize() {
    const RowView view{values_.data(), FloatType::kFloat32, 1, size_, size_};
    cpu::quantize(view, qparams(), 8, codes_.data());
  }

  void dequantize() { cpu::dequantize(codes_.data(), size_, qparams(), FloatType::kFloat32, values_.data()); }

  void copy() {
    std::memcpy(to_.data(), from_.data(), from_.size());
    asm volatile("" ::"r"(to_.data()) : "memory");  // somebody may read it
  }

 private:
  GroupedQParams qparams() const { return {&scale_, &zero_point_, &group_, 1}; }

  int64_t size_;
  std::vector<float> values_;
  std::vector<int8_t> codes_;
  std::vector<char> from_, to_;
  float scale_ = 0.02f;
  int32_t zero_point_ = 3, group_ = 0;
};

Row measure(const char* op, cpu::Isa level, int64_t size, void (Buffers::*run)()) {
  const cpu::ScopedIsa scope(level);
  Buffers buffers(size);
  const auto ours = [&] { (buffers.*run)(); };
  const auto copy = [&] { buffers.copy(); };
  const int calls = calls_lasting(kSampleSeconds, ours), copies = calls_lasting(kSampleSeconds, copy);
  std::vector<double> seconds, shares;
  for (int round = 0; round < kRounds; ++round) {
    seconds.push_back(seconds_per_call(ours, calls));
    shares.push_back(seconds_per_call(copy, copies) / seconds.back());
  }
  return {op, level, size, 1e9 * quantile(seconds, 0.5) / static_cast<double>(size), quantile(shares, 0.5)};
}

std::string fields(const Row& row) {
  return "\"operator\": " + quoted(row.op) + ", \"level\": " + quoted(cpu::isa_name(row.level)) +
         ", \"size\": " + std::to_string(row.size) +
         ", \"nanoseconds_per_value\": " + std::to_string(row.nanoseconds) +
         ", \"share_of_copy\": " + std::to_string(row.share);
}

int run(const std::vector<std::string>& arguments) {
  const std::string file = json_file(arguments);
  std::vector<std::string> rows;
  std::printf("%-10s %-9s %9s %10s %14s\n", "operator", "level", "values", "ns/value", "share of copy");
  for (const auto& [op, call] :
       {std::pair{"quantize", &Buffers::quantize}, {"dequantize", &Buffers::dequantize}}) {
    for (cpu::Isa level : kLevels) {
      if (!cpu::cpu_supports(level)) continue;
      for (int64_t size : kSizes) {
        const Row row = measure(op, level, size, call);
        std::printf("%-10s %-9s %9lld %10.3f %14.2f\n", op, cpu::isa_name(level),
                    static_cast<long long>(size), row.nanoseconds, row.share);
        std::fflush(stdout);
        rows.push_back(fields(row));
      }
    }
  }
  if (!file.empty()) {
    write(file, json("\"threads\": 1, \"rounds\": " + std::to_string(kRounds), rows));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run_program("copies", argc, argv, run); }
