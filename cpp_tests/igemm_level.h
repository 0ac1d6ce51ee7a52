// The kernels of conv2d and linear that this machine can run, those on emulated AMX tiles among them.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cpu/amx_emulation.h"
#include "cpu/igemm_strips.h"
#include "cpu/isa.h"
#include "cpu/winograd.h"

namespace adpdm::cpu::amx_emulated {
extern const StripKernel strip_kernel;
}

namespace adpdm::testing {

struct IgemmLevel {
  std::string name;
  cpu::Isa isa;
  const cpu::StripKernel* strips;  // forced for any number of pixels; nullptr: as the product chooses
  cpu::WinogradUse winograd = cpu::WinogradUse::kWhereQuicker;
};

inline std::vector<IgemmLevel> igemm_levels() {
  std::vector<IgemmLevel> levels;
  for (cpu::Isa isa :
       {cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvxVnni, cpu::Isa::kAvx512, cpu::Isa::kAmx}) {
    if (!cpu::cpu_supports(isa)) continue;
    const std::string name = cpu::isa_name(isa);
    levels.push_back({name, isa, nullptr});
    if (isa > cpu::Isa::kPortable && isa < cpu::Isa::kAmx) {
      levels.push_back({name + " without Winograd", isa, nullptr, cpu::WinogradUse::kNever});
      levels.push_back({name + " Winograd for any size", isa, nullptr, cpu::WinogradUse::kForAnyTiles});
    }
    const cpu::StripKernel* strips = cpu::strip_kernel_of(isa);
    if (strips) levels.push_back({name + " for any size", isa, strips});
  }
  levels.push_back({"amx emulated", cpu::Isa::kPortable, &cpu::amx_emulated::strip_kernel});
  return levels;
}

// Runs everything at that level; at the end no tiles may be left configured.
class ScopedLevel {
 public:
  explicit ScopedLevel(const IgemmLevel& level)
      : isa_(level.isa), strips_(level.strips), winograd_(level.winograd) {}
  ~ScopedLevel() { EXPECT_FALSE(cpu::amx_emulation::this_thread().configured()) << "tiles not released"; }
  ScopedLevel(const ScopedLevel&) = delete;
  ScopedLevel& operator=(const ScopedLevel&) = delete;

 private:
  cpu::ScopedIsa isa_;
  cpu::ScopedStripKernel strips_;
  cpu::ScopedWinograd winograd_;
};

}  // namespace adpdm::testing
