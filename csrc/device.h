// What kernels use of a GPU, in two homes: nvcc's, and a C++ compiler's with the emulator, which runs the same
// kernels on the CPU. Everything that is not plain C++ goes through here.
//
// SANA_EDGE_ARCH is the architecture of the code at hand, 890 for compute capability 8.9. A kernel takes one
// struct by value, has its shared memory from shared_memory(), and every collective takes all 32 lanes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef SANA_EDGE_EMULATED
#include "emulator/intrinsics.h"
#else
#include "cuda_intrinsics.h"
#endif

#define HOST_DEVICE __host__ __device__ __forceinline__

constexpr int WARP = 32;

// for launch(): the kernel may take its place on the GPU while the one before it ends (programmatic dependent launch,
// compute capability 9.0 and later), since wait_for_kernels comes first in it
constexpr bool BEGINS_EARLY = true;

// 16 bytes, what a thread best moves at a time
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// one of the two 16-bit numbers in a word
template <class T>
__device__ __forceinline__ float unpack(uint32_t word, int n) {
  return to_float(T{uint16_t(word >> 16 * n)});
}

// largest size of a warp's values, NaN where one of them is; the same on every lane
__device__ __forceinline__ float warp_max(float value) {
  for (int lane = WARP / 2; lane; lane /= 2) value = larger_size(value, shuffle_xor(value, lane));
  return value;
}

// sum of a warp's values in a fixed order; the same on every lane
__device__ __forceinline__ float warp_sum(float value) {
  for (int lane = WARP / 2; lane; lane /= 2) value = add(value, shuffle_xor(value, lane));
  return value;
}

template <class T>
HOST_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
HOST_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

// how many blocks of a size cover a length
template <class T>
HOST_DEVICE T blocks_of(T length, T size) {
  return (length + size - 1) / size;
}
