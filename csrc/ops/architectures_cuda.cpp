// What the CUDA library was compiled for, as CMake names it: cs336/_load.py asks before it picks a kernel.
extern "C" __attribute__((visibility("default"))) const char* cs336_cuda_architectures() {
  return CS336_CUDA_ARCHITECTURES;
}
