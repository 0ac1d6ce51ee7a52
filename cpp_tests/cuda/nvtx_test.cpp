// NVTX ranges: what a profiler sees (an injected one, no GPU needed), and what the emulation records.
#include "cuda/nvtx.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/quantize.h"
#include "cuda/device_memory.h"

#ifdef ADPDM_NVTX

namespace {

// The smallest profiler: notes the domain, and the messages and ends of ranges.
std::vector<std::string> events;
char domain_tag = 0;

nvtxDomainHandle_t NVTX_API create_domain(const char* name) {
  events.push_back(std::string("domain ") + name);
  return reinterpret_cast<nvtxDomainHandle_t>(&domain_tag);
}

int NVTX_API push_range(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
  events.push_back(
      (domain == reinterpret_cast<nvtxDomainHandle_t>(&domain_tag) ? "push " : "push elsewhere ") +
      std::string(attributes->message.ascii));
  return 0;
}

int NVTX_API pop_range(nvtxDomainHandle_t) {
  events.push_back("pop");
  return 0;
}

int NVTX_API inject(NvtxGetExportTableFunc_t get_export_table) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(get_export_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (callbacks == nullptr || !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size))
    return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = reinterpret_cast<NvtxFunctionPointer>(&create_domain);
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = reinterpret_cast<NvtxFunctionPointer>(&push_range);
  *table[NVTX_CBID_CORE2_DomainRangePop] = reinterpret_cast<NvtxFunctionPointer>(&pop_range);
  return 1;
}

// NVTX calls this function, if it is set, when the first range is opened; a profiler's library comes second.
const bool is_injected = (InitializeInjectionNvtx2_fnptr = &inject) != nullptr;

}  // namespace

namespace adpdm::cuda {
namespace {

TEST(Nvtx, RangesAreNestedInTheDomainAdpdm) {
  ASSERT_TRUE(is_injected);
  events.clear();
  {
    const Range outer([] { return std::string("outer"); });
    const Range inner([] { return std::string("inner"); });
  }
  if (!events.empty() && events[0] == "domain adpdm")
    events.erase(events.begin());  // if this is the first range
  EXPECT_EQ(events, (std::vector<std::string>{"push outer", "push inner", "pop", "pop"}));
}

}  // namespace
}  // namespace adpdm::cuda

#elif defined(ADPDM_SIMT)

namespace adpdm::cuda {
namespace {

TEST(Nvtx, EmulationRecordsMessages) {
  recorded_ranges().clear();
  {
    const Range range([] { return std::string("conv2d"); });
  }
  EXPECT_EQ(recorded_ranges(), std::vector<std::string>{"conv2d"});
}

TEST(Nvtx, OpsSayWhatTheyWorkOn) {
  testing::DeviceBuffer<float> x(std::vector<float>(64, 1.0f));
  testing::DeviceBuffer<float> scale(std::vector<float>{0.5f});
  testing::DeviceBuffer<int32_t> zero(std::vector<int32_t>{0});
  testing::DeviceBuffer<int8_t> codes(64);
  recorded_ranges().clear();
  quantize({x.data(), FloatType::kFloat32, 2, 32, 32}, {scale.data(), zero.data(), zero.data(), 1}, 6,
           codes.data(), nullptr);
  EXPECT_EQ(recorded_ranges(), std::vector<std::string>{"quantize [2, 32] f32 6 bits"});
}

}  // namespace
}  // namespace adpdm::cuda

#endif
