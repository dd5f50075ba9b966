// Looks for NCCL in this process, with the library that argv[1] names loaded before, and says what it found.
#include <cstdio>

#include "common/nccl.h"

int main(int argc, char** argv) {
  try {
    cs336::loaded_nccl();
    std::puts("found before it was loaded");
  } catch (const std::runtime_error& error) {
    if (argc == 1) std::puts(error.what());
  }
  if (argc == 1) return 0;
  if (!dlopen(argv[1], RTLD_NOW | RTLD_LOCAL)) return std::puts(dlerror()), 1;
  try {
    const cs336::Nccl& nccl = cs336::loaded_nccl();
    cs336::NcclId id;
    nccl.check(nccl.get_unique_id(&id), "ncclGetUniqueId");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
