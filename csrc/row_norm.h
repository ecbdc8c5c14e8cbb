// A row to INT8, after LayerNorm and modulation where that is asked for: 1, 2, 4 or 8 warps keep it in registers
// between its mean, its centred squares, its absmax and its values, so that x is read once. Scale and shift, 4 times
// as large as a 16-bit row, come from L1: all rows of an image share them.
#pragma once

#include "row_quantizer.h"

// elements of a row that a lane has at a time
constexpr int CHUNK = 8;

// what is done to a row; scale and shift are its image's, or both NULL
struct RowNorm {
  const float *scale, *shift, *static_scale;
  float eps;
};

struct Add {
  __device__ static float warp(float value) { return warp_sum(value); }
  __device__ static float two(float a, float b) { return add(a, b); }
};
struct Largest {
  __device__ static float warp(float value) { return warp_max(value); }
  __device__ static float two(float a, float b) { return larger_or_nan(a, b); }
};

// over the warps of a row, in their order, the same on every thread; ``place`` is another one for every use, of WARPS
// floats in shared memory: 2 barriers fewer than if they were at one place
template <class Over, int ROW_WARPS, int WARPS>
__device__ __forceinline__ float over_row(float value, int place) {
  value = Over::warp(value);
  if (ROW_WARPS == 1) return value;
  float* warps = reinterpret_cast<float*>(shared_memory()) + place * WARPS;
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

// a row of up to CHUNKS * CHUNK * ROW_WARPS * 32 columns by ROW_WARPS of a block's WARPS, whose threads all call it;
// one without columns takes part in barriers only. FRESH: the row was written by other blocks of this kernel.
template <class T, int ROW_WARPS, int WARPS, int CHUNKS, bool FRESH>
__device__ __forceinline__ void row_to_int8(const T* x, int columns, const RowNorm& norm, int8_t* values,
                                            float* scale_of_row) {
  constexpr int LANES = ROW_WARPS * WARP;
  const int lane = threadIdx.x % LANES, chunks = columns / CHUNK;
  float kept[CHUNKS][CHUNK];
  float sum = 0, squares = 0, most = 0;
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    const int chunk = lane + n * LANES;
    if (chunk >= chunks) continue;
    load_group<FRESH>(kept[n], x + chunk * CHUNK);
    for (int i = 0; i < CHUNK; i++) sum = add(sum, kept[n][i]);
  }
  if (norm.scale) {
    const float mean = divide(over_row<Add, ROW_WARPS, WARPS>(sum, 0), float(columns));
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
      if (lane + n * LANES >= chunks) continue;
      for (int i = 0; i < CHUNK; i++) {
        kept[n][i] = add(kept[n][i], -mean);
        squares = fused_multiply_add(kept[n][i], kept[n][i], squares);
      }
    }
    const float variance = divide(over_row<Add, ROW_WARPS, WARPS>(squares, 1), float(columns));
    const float root = reciprocal_root(add(variance, norm.eps));
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
      const int chunk = lane + n * LANES;
      if (chunk >= chunks) continue;
      float scale[CHUNK], shift[CHUNK];
      load_group(scale, norm.scale + chunk * CHUNK);
      load_group(shift, norm.shift + chunk * CHUNK);
      for (int i = 0; i < CHUNK; i++)
        kept[n][i] = add(multiply(multiply(kept[n][i], root), scale[i]), shift[i]);
    }
  }
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    if (lane + n * LANES >= chunks) continue;
    for (int i = 0; i < CHUNK; i++) most = larger_or_nan(most, kept[n][i]);
  }
  most = over_row<Largest, ROW_WARPS, WARPS>(most, 2);
  const RowScale scale = row_scale(most, norm.static_scale);
  if (lane == 0 && chunks) *scale_of_row = scale.stored;
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    const int chunk = lane + n * LANES;
    if (chunk < chunks) store_vector(values + chunk * CHUNK, quantize_chunk(kept[n], scale));
  }
}
