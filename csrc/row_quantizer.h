// The last step of every operation that ends in INT8 rows: absmax of a row, its scale, its values.
//
// kernels/reference.py, quantize_rows: scale = absmax / 127, 1 for rows of zeros or of almost nothing, NaN where the row has NaN or
// infinity; values x * (1 / scale), rounded half to even, within +-127.
#pragma once

#include "device.h"

constexpr float LEVELS = 127.0f;

struct RowScale {
  float stored;   // what is written: NaN where the row is not finite
  float inverse;  // what values are multiplied by
};

// the larger of a, which is not negative, and |b|; NaN where one of them is
__device__ __forceinline__ float larger_or_nan(float a, float b) { return larger_size(a, b); }

// of a row whose absmax is known; with one given scale it is that for every row
__device__ __forceinline__ RowScale row_scale(float most, const float* static_scale) {
  const bool finite = most <= 3.402823466e38f;
  const float step = divide(most, LEVELS);
  // zeros, and what is so small that 1 / step is infinite
  const float found = step < 1.175494351e-38f ? 1.0f : step;
  const float used = static_scale ? *static_scale : found;
  return {finite ? used : not_a_number(), divide(1.0f, used)};
}

__device__ __forceinline__ int8_t quantize(float value, const RowScale& scale) {
  const float level = multiply(value, scale.inverse);
  // what NaN becomes is of no matter
  const float clipped = fminf(fmaxf(level, -LEVELS), LEVELS);
  // 3 * 2^22 has steps of 1: the sum is rounded to an integer, half to even, whose last byte is that of the bits
  return static_cast<int8_t>(float_bits(add(clipped, 12582912.0f)) & 0xff);
}

// consecutive elements, a multiple of 16 bytes, at a 16-byte aligned address; FRESH: as load_fresh
template <bool FRESH = false, class T, int N>
__device__ __forceinline__ void load_group(float (&to)[N], const T* from) {
  constexpr int EACH = 16 / sizeof(T), IN_WORD = 4 / sizeof(T);
  for (int n = 0; n < N / EACH; n++) {
    const Bytes16 vector = FRESH ? load_fresh<Bytes16>(from + n * EACH) : load_vector<Bytes16>(from + n * EACH);
    for (int i = 0; i < EACH; i++) {
      const uint32_t word = vector.word[i / IN_WORD];
      if constexpr (IN_WORD == 1)
        to[n * EACH + i] = float_of_bits(word);
      else
        to[n * EACH + i] = unpack<T>(word, i % IN_WORD);
    }
  }
}

__device__ __forceinline__ Bytes16 quantize_group(const float (&values)[16], const RowScale& scale) {
  Bytes16 packed;
  for (int word = 0; word < 4; word++) {
    packed.word[word] = 0;
    for (int i = 0; i < 4; i++)
      packed.word[word] |= uint32_t(uint8_t(quantize(values[4 * word + i], scale))) << 8 * i;
  }
  return packed;
}

constexpr size_t block_max_bytes(int threads) { return threads / WARP * sizeof(float); }

// larger_or_nan over a block, the same on every thread; uses the first block_max_bytes of shared memory
template <int THREADS>
__device__ __forceinline__ float block_max(float value) {
  float* warps = reinterpret_cast<float*>(shared_memory());
  value = warp_max(value);
  synchronize_block();
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
  synchronize_block();
  float most = warps[0];
  for (int n = 1; n < THREADS / WARP; n++) most = larger_or_nan(most, warps[n]);
  return most;
}
