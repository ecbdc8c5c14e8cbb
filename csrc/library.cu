// What the library says of itself and of devices.
#include <stdlib.h>

#include "device.h"

#ifndef SANA_EDGE_VERSION
#define SANA_EDGE_VERSION "unknown"
#endif
#ifndef SANA_EDGE_ARCHITECTURES
#define SANA_EDGE_ARCHITECTURES "none"
#endif

extern "C" SANA_EDGE_API int sana_edge_abi(void) { return SANA_EDGE_ABI; }

extern "C" SANA_EDGE_API const char* sana_edge_version(void) { return SANA_EDGE_VERSION; }

extern "C" SANA_EDGE_API const char* sana_edge_architectures(void) { return SANA_EDGE_ARCHITECTURES; }

extern "C" SANA_EDGE_API const char* sana_edge_status_text(int status) {
  switch (status) {
    case SANA_EDGE_OK:
      return "no error";
    case SANA_EDGE_NULL_POINTER:
      return "a pointer that is needed is NULL";
    case SANA_EDGE_BAD_SHAPE:
      return "a size is negative, too large, or does not suit another";
    case SANA_EDGE_BAD_ALIGNMENT:
      return "an address or a row is not a multiple of 16 bytes";
    case SANA_EDGE_BAD_TYPE:
      return "the operation does not have this data type";
    case SANA_EDGE_WORKSPACE:
      return "the workspace is too small";
    case SANA_EDGE_UNSUPPORTED_DEVICE:
      return "this GPU cannot run the kernel: it is older than compute capability 7.5, has too little shared "
             "memory, or no bf16";
    case SANA_EDGE_NO_DEVICE:
      return "there is no NVIDIA GPU, or no driver for it";
    case SANA_EDGE_OLD_DRIVER:
      return "the NVIDIA driver is older than the CUDA runtime of this library";
    case SANA_EDGE_OUT_OF_MEMORY:
      return "the GPU has too little free memory";
    case SANA_EDGE_DEVICE_LOST:
      return "the GPU failed, or is gone; start the program again";
    case SANA_EDGE_LAUNCH_FAILED:
      return "the GPU refused to start a kernel";
    default:
      return "unknown status";
  }
}

#ifndef SANA_EDGE_EMULATED
namespace {
// built for the same architectures as all others
__global__ void any_kernel(int) { wait_for_kernels(); }
}  // namespace

bool kernels_wait() {
  constexpr int DEVICES = 64;
  // 0: not asked yet, 1: no, 2: yes
  static std::atomic<int> known[DEVICES];
  // who doubts it: SANA_EDGE_EARLY=0
  static const char* const asked_for = getenv("SANA_EDGE_EARLY");
  if (asked_for && *asked_for == '0') return false;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= DEVICES) return false;
  if (!known[device]) {
    cudaFuncAttributes found{};
    int driver = 0;
    const bool asked = cudaFuncGetAttributes(&found, any_kernel) == cudaSuccess &&
                       cudaDriverGetVersion(&driver) == cudaSuccess;
    if (!asked) cudaGetLastError();
    // older drivers cannot record it in a graph
    known[device] = asked && found.ptxVersion >= 90 && driver >= 12030 ? 2 : 1;
  }
  return known[device] == 2;
}

extern "C" SANA_EDGE_API int sana_edge_emulated(void) { return 0; }

extern "C" SANA_EDGE_API sana_edge_status sana_edge_device(int device, sana_edge_device_info* out) {
  if (!out) return SANA_EDGE_NULL_POINTER;
  int driver = 0, count = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && driver == 0) return SANA_EDGE_NO_DEVICE;
  error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return status_of(error);
  }
  if (device < 0 || device >= count) return SANA_EDGE_NO_DEVICE;
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* to;
  } asked[] = {{cudaDevAttrComputeCapabilityMajor, &major},
               {cudaDevAttrComputeCapabilityMinor, &minor},
               {cudaDevAttrMultiProcessorCount, &out->processors},
               {cudaDevAttrMaxSharedMemoryPerBlockOptin, &out->shared_memory}};
  for (const auto& question : asked) {
    error = cudaDeviceGetAttribute(question.to, question.attribute, device);
    if (error != cudaSuccess) return cleared(error);
  }
  out->capability = 10 * major + minor;
  return out->capability >= 75 ? SANA_EDGE_OK : SANA_EDGE_UNSUPPORTED_DEVICE;
}
#endif
