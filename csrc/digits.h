// Rows in two INT8 digits: kernels/reference_gemma.py, split_digits. A block has a row in its registers.
#pragma once

#include "row_quantizer.h"

// values of a low digit for one of a high
constexpr float LOW = 254.0f;

// a block's row: each of THREADS has GROUPS times 4 neighbours of every 4 * THREADS numbers
constexpr int ROW_GROUP = 4;
constexpr int row_numbers(int groups, int threads) { return groups * ROW_GROUP * threads; }

// the first of a thread's n-th 4 numbers
template <int THREADS>
__device__ __forceinline__ int row_column(int n) {
  return (n * THREADS + int(threadIdx.x)) * ROW_GROUP;
}

// sum over a block in a fixed order, the same on every thread; uses the first block_max_bytes of shared memory
template <int THREADS>
__device__ __forceinline__ float block_sum(float value) {
  float* warps = reinterpret_cast<float*>(shared_memory());
  value = warp_sum(value);
  synchronize_block();
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
  synchronize_block();
  float sum = warps[0];
  for (int n = 1; n < THREADS / WARP; n++) sum = add(sum, warps[n]);
  return sum;
}

struct Digit {
  float value;
  uint32_t byte;
};

// the nearest integer within +-127, ties to even
__device__ __forceinline__ Digit nearest_digit(float level) {
  constexpr float SHIFT = 12582912.0f;  // 3 * 2^22, whose steps are 1
  const float shifted = add(fminf(fmaxf(level, -LEVELS), LEVELS), SHIFT);
  return {add(shifted, -SHIFT), float_bits(shifted) & 0xff};
}

// writes a row's digits, (2, columns), and its step
template <int GROUPS, int THREADS>
__device__ __forceinline__ void write_digits(const float (&row)[GROUPS][ROW_GROUP], int columns, int8_t* digits,
                                             float* step) {
  float most = 0;
#pragma unroll
  for (int n = 0; n < GROUPS; n++)
    if (row_column<THREADS>(n) < columns)
      for (int i = 0; i < ROW_GROUP; i++) most = larger_or_nan(most, row[n][i]);
  const RowScale scale = row_scale(block_max<THREADS>(most), nullptr);
  if (threadIdx.x == 0) *step = divide(scale.stored, LOW);
#pragma unroll
  for (int n = 0; n < GROUPS; n++) {
    const int column = row_column<THREADS>(n);
    if (column >= columns) continue;
    uint32_t high = 0, low = 0;
    for (int i = 0; i < ROW_GROUP; i++) {
      const float level = multiply(row[n][i], scale.inverse);
      const Digit first = nearest_digit(level);
      high |= first.byte << 8 * i;
      low |= nearest_digit(multiply(add(level, -first.value), LOW)).byte << 8 * i;
    }
    store_vector(digits + column, high);
    store_vector(digits + columns + column, low);
  }
}
