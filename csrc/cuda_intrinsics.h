// device.h on a GPU. Shapes and fragments of the matrix instructions are those of the PTX manual.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#include "sana_edge.h"

#ifdef __CUDA_ARCH__
#define SANA_EDGE_ARCH __CUDA_ARCH__
#else
// the host's pass, which compiles device code without using it
#define SANA_EDGE_ARCH 890
#endif

// a number of 16 bits in memory
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float to_float(BFloat16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}

// rounded to nearest, ties to even; what is too large becomes infinite
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// two numbers rounded as from_float does, the first in the low half
template <class T>
__device__ __forceinline__ uint32_t pack_floats(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_floats<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return uint32_t(__half_as_ushort(pair.x)) | uint32_t(__half_as_ushort(pair.y)) << 16;
}
template <>
__device__ __forceinline__ uint32_t pack_floats<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return uint32_t(__bfloat16_as_ushort(pair.x)) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
}

// max.NaN with 0 of two numbers in a word: what is negative becomes 0, NaN stays NaN
template <class T>
__device__ __forceinline__ uint32_t relu_pair(uint32_t word) {
#if SANA_EDGE_ARCH >= 800
  if constexpr (std::is_same_v<T, Half>)
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(0));
  else
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(0));
#else
  if (to_float(T{uint16_t(word)}) < 0) word &= 0xffff0000;
  if (to_float(T{uint16_t(word >> 16)}) < 0) word &= 0xffff;
#endif
  return word;
}

// __fmul_rn, __fadd_rn: a product and a sum that are rounded one by one, never fused: what torch computes
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float reciprocal_root(float a) { return rsqrtf(a); }
__device__ __forceinline__ float exponential(float a) { return expf(a); }
// ex2.approx, rcp.approx: e^a and a / b within a few units in the last place, in two instructions each; what is too
// small is 0, and so is the quotient where b is beyond 2^126
__device__ __forceinline__ float quick_exponential(float a) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(a, 1.4426950408889634f)));
  return power;
}
__device__ __forceinline__ float quick_divide(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return __fmul_rn(a, inverse);
}
// max.NaN: the larger of |a| and |b|, NaN where one of them is
__device__ __forceinline__ float larger_size(float a, float b) {
#if SANA_EDGE_ARCH >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(fabsf(a)), "f"(fabsf(b)));
  return larger;
#else
  const float larger = fmaxf(fabsf(a), fabsf(b));
  return a != a || b != b ? __uint_as_float(0x7fc00000) : larger;
#endif
}
// __float2int_rn: to the nearest integer, ties to even
__device__ __forceinline__ int round_to_int(float a) { return __float2int_rn(a); }
__device__ __forceinline__ uint32_t float_bits(float a) { return __float_as_uint(a); }
__device__ __forceinline__ float float_of_bits(uint32_t a) { return __uint_as_float(a); }
// asm volatile: the same bits, of which the compiler knows nothing
__device__ __forceinline__ uint32_t opaque(uint32_t bits) {
  asm volatile("" : "+r"(bits));
  return bits;
}
// the same of an address in global memory
template <class T>
__device__ __forceinline__ const T* opaque(const T* pointer) {
  size_t address = __cvta_generic_to_global(pointer);
  asm volatile("" : "+l"(address));
  return static_cast<const T*>(__cvta_global_to_generic(address));
}
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000); }

// extern __shared__: the block's shared memory, as many bytes as the launch asked for, 16-byte aligned
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// __syncthreads, __syncwarp
__device__ __forceinline__ void synchronize_block() { __syncthreads(); }
__device__ __forceinline__ void synchronize_warp() { __syncwarp(); }
// __threadfence: what this thread wrote is seen by every block before what it writes next
__device__ __forceinline__ void fence_device() { __threadfence(); }
// griddepcontrol: waits until the kernels before this one on its stream are done, where it may begin before they are;
// then lets the next one begin. Every thread of a kernel that BEGINS_EARLY calls it before anything else.
__device__ __forceinline__ void wait_for_kernels() {
#if SANA_EDGE_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// ld.volatile: what another block may be writing
__device__ __forceinline__ int load_volatile(const int* from) { return *static_cast<const volatile int*>(from); }
// atomicAdd
__device__ __forceinline__ int atomic_add(int* to, int value) { return atomicAdd(to, value); }

// __shfl_xor_sync, __shfl_sync
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// __reduce_max_sync: the largest of a warp's numbers, the same on every lane
__device__ __forceinline__ uint32_t warp_largest(uint32_t value) {
#if SANA_EDGE_ARCH >= 800
  return __reduce_max_sync(0xffffffffu, value);
#else
  for (int lanes = 16; lanes; lanes /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
#endif
}

// a vector of 2, 4, 8 or 16 bytes (a struct with alignas of its size) from or to aligned memory
template <class T>
__device__ __forceinline__ T load_vector(const void* from) {
  return *static_cast<const T*>(from);
}
// ld.global.cg: 16 bytes that another block wrote in this kernel, which are in L2 and may be older in L1
template <class T>
__device__ __forceinline__ T load_fresh(const void* from) {
  static_assert(sizeof(T) == 16, "one vector");
  union Both {
    uint4 bits;
    T value;
    __device__ Both() {}
  } both;
  both.bits = __ldcg(static_cast<const uint4*>(from));
  return both.value;
}
template <class T>
__device__ __forceinline__ void store_vector(void* to, const T& value) {
  *static_cast<T*>(to) = value;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// cp.async.cg: 16 bytes from global to shared memory while the thread goes on; zeros instead where ``valid`` is
// false, and then ``from`` is not read, but must still be a global address
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool valid) {
#if SANA_EDGE_ARCH >= 800
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#else
  uint4 value = make_uint4(0, 0, 0, 0);
  if (valid) value = *static_cast<const uint4*>(from);
  *static_cast<uint4*>(to) = value;
#endif
}
// cp.async.commit_group: closes a group of copies
__device__ __forceinline__ void copy_async_commit() {
#if SANA_EDGE_ARCH >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
// cp.async.wait_group: waits for all of this thread's groups but the latest PENDING; other threads' copies need
// synchronize_block too
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
#if SANA_EDGE_ARCH >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
#endif
}

// ldmatrix.x4: four 8x8 matrices of 16-bit elements from shared memory: lanes 8i to 8i + 7 give the rows of matrix i,
// each 16 aligned bytes; lane l gets of matrix i, in out[i], elements 2 (l % 4) and the next of row l / 4
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// ldmatrix.x4.trans: the same of the matrices transposed
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// mma.sync.m16n8k32.s8: sums (16, 8) += a (16, 32) b (32, 8), INT8 with INT32 sums
__device__ __forceinline__ void multiply_int8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if SANA_EDGE_ARCH >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // Turing has m8n8k16 only, whose fragments are quarters of the large one's
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 2; k++)
      asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};\n"
                   : "+r"(sums[2 * half]), "+r"(sums[2 * half + 1])
                   : "r"(a[2 * k + half]), "r"(b[k]));
#endif
}

// mma.sync.m16n8k16: sums (16, 8) += a (16, 16) b (16, 8), 16-bit numbers T with fp32 sums; Turing has no BFloat16
template <class T>
__device__ __forceinline__ void multiply_16bit(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_16bit<Half>(float (&sums)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
#if SANA_EDGE_ARCH >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int k = 0; k < 2; k++)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
#endif
}
template <>
__device__ __forceinline__ void multiply_16bit<BFloat16>(float (&sums)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2]) {
#if SANA_EDGE_ARCH >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// what CUDA answered, as a status of sana_edge.h
inline sana_edge_status status_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return SANA_EDGE_OK;
    case cudaErrorMemoryAllocation:
      return SANA_EDGE_OUT_OF_MEMORY;
    case cudaErrorInsufficientDriver:
      return SANA_EDGE_OLD_DRIVER;
    case cudaErrorNoDevice:
      return SANA_EDGE_NO_DEVICE;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return SANA_EDGE_UNSUPPORTED_DEVICE;
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorMisalignedAddress:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorLaunchTimeout:
    case cudaErrorECCUncorrectable:
    case cudaErrorDevicesUnavailable:
      return SANA_EDGE_DEVICE_LOST;
    default:
      return SANA_EDGE_LAUNCH_FAILED;
  }
}

// status_of an error that the next launch must not report again
inline sana_edge_status cleared(cudaError_t error) {
  cudaGetLastError();
  return status_of(error);
}

// what the current device is, asked once for each device: asking takes longer than a launch
inline sana_edge_status current_device(sana_edge_device_info* out) {
  constexpr int DEVICES = 64;
  static struct {
    std::atomic<int> capability, processors, shared_memory;
  } known[DEVICES];
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cleared(error);
  if (device >= DEVICES) return sana_edge_device(device, out);
  if (!known[device].capability) {
    const sana_edge_status status = sana_edge_device(device, out);
    if (status != SANA_EDGE_OK) return status;
    known[device].processors = out->processors;
    known[device].shared_memory = out->shared_memory;
    known[device].capability = out->capability;  // last: it tells that the others are there
  }
  *out = {known[device].capability, known[device].processors, known[device].shared_memory};
  return SANA_EDGE_OK;
}

// whether this library's kernels for the current device have wait_for_kernels: they may begin early then
bool kernels_wait();

// starts a kernel on a stream (a cudaStream_t); more than 48 KiB of shared memory are asked for where needed; early:
// see BEGINS_EARLY
template <class Arguments>
sana_edge_status launch(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared, void* stream,
                        const Arguments& arguments, bool early = false) {
  if (shared > 48 * 1024) {
    sana_edge_device_info device;
    const sana_edge_status status = current_device(&device);
    if (status != SANA_EDGE_OK) return status;
    if (shared > size_t(device.shared_memory)) return SANA_EDGE_UNSUPPORTED_DEVICE;
    // the most there is, the same for every launch: it belongs to the kernel, which two threads may be starting
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_memory);
    if (error != cudaSuccess) return cleared(error);
  }
  cudaLaunchAttribute programmatic{};
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &programmatic;
  config.numAttrs = early && kernels_wait() ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  return error == cudaSuccess ? SANA_EDGE_OK : cleared(error);
}
