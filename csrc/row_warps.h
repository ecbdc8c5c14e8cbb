// Rows that stay in registers: 1, 2, 4 or 8 warps of a block have one, 40 numbers a lane, in chunks of 8.
#pragma once

#include "row_quantizer.h"

// elements of a row that a lane has at a time, and how many times: rows of up to 1280 a warp
constexpr int CHUNK = 8;
constexpr int CHUNKS = 5;
constexpr int ROW_WARPS_MOST = 8;
constexpr int ROW_THREADS = ROW_WARPS_MOST * WARP;
constexpr int LARGEST_OF_WARP = WARP * CHUNK * CHUNKS;
// sums and maxima of warps, three times: 2 barriers fewer than if they were at one place
constexpr size_t ROW_SHARED = 3 * ROW_WARPS_MOST * sizeof(float);

struct Add {
  __device__ static float warp(float value) { return warp_sum(value); }
  __device__ static float two(float a, float b) { return add(a, b); }
};
struct Largest {
  __device__ static float warp(float value) { return warp_max(value); }
  __device__ static float two(float a, float b) { return larger_or_nan(a, b); }
};

// over the warps of a row, in their order, the same on every thread; ``place`` is another one for every use
template <class Over, int ROW_WARPS>
__device__ __forceinline__ float over_row(float value, int place) {
  value = Over::warp(value);
  if (ROW_WARPS == 1) return value;
  float* warps = reinterpret_cast<float*>(shared_memory()) + place * ROW_WARPS_MOST;
  const int warp = threadIdx.x / WARP, first = warp / ROW_WARPS * ROW_WARPS;
  if (threadIdx.x % WARP == 0) warps[warp] = value;
  synchronize_block();
  value = warps[first];
  for (int n = 1; n < ROW_WARPS; n++) value = Over::two(value, warps[first + n]);
  return value;
}

struct alignas(8) Bytes8 {
  uint32_t word[2];
};

__device__ __forceinline__ Bytes8 quantize_chunk(const float (&values)[CHUNK], const RowScale& scale) {
  Bytes8 packed{};
  for (int i = 0; i < CHUNK; i++)
    packed.word[i / 4] |= uint32_t(uint8_t(quantize(values[i], scale))) << 8 * (i % 4);
  return packed;
}
