// Whether this process may use the int8 tiles of AMX, and if not, why.
#pragma once

#include <string>

namespace adpdm::cpu {

struct AmxFacts {
  bool built;            // the compiler of this build knows AMX
  bool tile;             // CPUID: amx_tile
  bool int8;             // CPUID: amx_int8
  bool saved;            // XGETBV: the system saves XTILECFG and XTILEDATA
  int permission_error;  // errno of the request for XTILEDATA; 0 where granted, or not asked for
};

// Facts of this CPU and system; never asks for permission.
AmxFacts probe_amx();

// A clause that says why the tiles cannot be used; empty where they can.
std::string amx_obstacle(const AmxFacts& facts);

// That of this process. The first call asks Linux for the permission to use tile data where all else is
// there; the process keeps it, threads and forked children have it too.
const std::string& amx_obstacle();

}  // namespace adpdm::cpu
