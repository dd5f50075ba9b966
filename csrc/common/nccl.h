// The few functions of NCCL that we call, out of the library that torch has loaded: no header, no second copy.
#pragma once
#include <dlfcn.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

struct CUstream_st;  // *cudaStream_t

namespace cs336 {

struct NcclId {  // ncclUniqueId
  char bytes[128];
};
using NcclComm = void*;  // ncclComm_t
using NcclStream = CUstream_st*;
enum class NcclType : int { kFloat32 = 7, kBFloat16 = 9 };  // ncclDataType_t
enum class NcclSum : int { kSum = 0 };                      // ncclRedOp_t

struct Nccl {  // each returns ncclSuccess, 0, or an error
  int (*get_version)(int* version);
  int (*get_unique_id)(NcclId* id);
  int (*comm_init_rank)(NcclComm* comm, int size, NcclId id, int rank);
  int (*comm_destroy)(NcclComm comm);
  int (*reduce_scatter)(const void* in, void* out, size_t out_count, NcclType, NcclSum, NcclComm, NcclStream);
  int (*all_gather)(const void* in, void* out, size_t in_count, NcclType, NcclComm, NcclStream);
  int (*all_reduce)(const void* in, void* out, size_t count, NcclType, NcclSum, NcclComm, NcclStream);
  const char* (*get_error_string)(int error);

  void check(int error, const char* call) const {
    if (error != 0) throw std::runtime_error(std::string(call) + " failed: " + get_error_string(error));
  }
};

constexpr const char* kNcclLibrary = "libnccl.so.2";
constexpr int kNcclLeast = 21000;  // 2.10, the first with bfloat16

// Throws std::runtime_error that says what is missing; the next call looks again.
inline Nccl find_nccl() {
  void* library = dlopen(kNcclLibrary, RTLD_NOW | RTLD_NOLOAD);  // what is loaded; never loads
  if (!library)
    throw std::runtime_error(std::string("NCCL is not loaded: there is no ") + kNcclLibrary +
                             " in this process. torch brings it where it is built for CUDA and linked to NCCL");
  const auto find = [library](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string(kNcclLibrary) + " has no function " + name);
  };
  Nccl nccl{};
  find(nccl.get_version, "ncclGetVersion");
  find(nccl.get_unique_id, "ncclGetUniqueId");
  find(nccl.comm_init_rank, "ncclCommInitRank");
  find(nccl.comm_destroy, "ncclCommDestroy");
  find(nccl.reduce_scatter, "ncclReduceScatter");
  find(nccl.all_gather, "ncclAllGather");
  find(nccl.all_reduce, "ncclAllReduce");
  find(nccl.get_error_string, "ncclGetErrorString");
  int version = 0;
  nccl.check(nccl.get_version(&version), "ncclGetVersion");
  if (version < kNcclLeast)
    throw std::runtime_error("NCCL 2.10 or newer is needed, and version code " + std::to_string(version) +
                             " is loaded");
  return nccl;
}

inline const Nccl& loaded_nccl() {
  static const Nccl nccl = find_nccl();
  return nccl;
}

}  // namespace cs336
