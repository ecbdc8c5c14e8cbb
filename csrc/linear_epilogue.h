// What follows the sums of an INT8 product. Sums go through shared memory, 16 rows of a warp at a time, so that a
// lane has 8 neighbours of one row: it reads the residual and writes the result 16 bytes at a time, and its columns'
// scales and vectors stay in registers. The residual of the next 16 rows is on its way meanwhile.
#pragma once

#include "gemm.h"
#include "gemm_tiles.h"
#include "row_quantizer.h"

template <class Number>
struct alignas(16) Eight {
  Number element[8];
};

__device__ __forceinline__ float silu(float x) { return quick_divide(x, 1.0f + quick_exponential(-x)); }

// comparisons with NaN are false, so that NaN stays
__device__ __forceinline__ float clip(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// of a model's own vectors, which may begin anywhere
__device__ __forceinline__ void load_eight(float (&to)[8], const float* from) {
#pragma unroll
  for (int i = 0; i < 8; i++) to[i] = from[i];
}

template <class Step>
__device__ __forceinline__ void each(float (&x)[8], const Step& step) {
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = step(i);
}

// a thread's 8 columns of a tile: their vectors, and what follows the sums
template <class Number, Epilogue EPILOGUE>
struct ColumnsOfThread {
  static constexpr bool EVERY = EPILOGUE == ALL, SHIFTED = EPILOGUE == CONSTANT;
  static constexpr bool GATE = EPILOGUE == GATED || SHIFTED, ADDED = EPILOGUE == RESIDUAL || GATE;
  const sana_edge_w8a8_linear_args& a;
  int column;
  float scales[8], bias[8], gate[8], constant[8];
  int64_t last = -1;  // row of the image that gate and constant are of

  __device__ __forceinline__ ColumnsOfThread(const sana_edge_w8a8_linear_args& arguments, int first)
      : a(arguments), column(first) {
    if (column >= a.columns) return;
    load_eight(scales, a.weight_scales + column);
    // x + -0 is x, also of a zero
    each(bias, [](int) { return -0.0f; });
    if (a.bias) load_eight(bias, a.bias + column);
  }

  // rows come in their order: an image is looked up once
  __device__ __forceinline__ void turn_to_image_of(int64_t row) {
    if (row <= last) return;
    const int64_t image = uint32_t(row) / uint32_t(a.tokens);
    last = (image + 1) * a.tokens - 1;
    if (!EVERY || a.gate) load_group(gate, a.gate + image * a.gate_stride + column);
    if (SHIFTED || (EVERY && a.constant)) load_group(constant, a.constant + image * a.constant_stride + column);
  }

  // the reference's order, each step rounded
  __device__ __forceinline__ Eight<Number> finish(const int32_t (&sums)[8], int64_t row, float scale,
                                                  const Bytes16& residual) {
    if (GATE || (EVERY && (a.gate || a.constant))) turn_to_image_of(row);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = add(multiply(multiply(float(sums[i]), scale), scales[i]), bias[i]);
    if (EPILOGUE == SILU || (EVERY && a.silu)) each(x, [&](int i) { return silu(x[i]); });
    if (EVERY && a.limit > 0) each(x, [&](int i) { return clip(x[i], a.limit); });
    if (GATE || (EVERY && a.gate)) each(x, [&](int i) { return multiply(x[i], gate[i]); });
    if (ADDED || (EVERY && a.residual))
      each(x, [&](int i) { return add(unpack<Number>(residual.word[i / 2], i % 2), x[i]); });
    if (SHIFTED || (EVERY && a.constant)) each(x, [&](int i) { return add(x[i], constant[i]); });
    Eight<Number> out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.element[i] = from_float<Number>(x[i]);
    return out;
  }
};

// a thread's rows of 16 of its warp: their scales and residuals, read before the sums are there
template <class T, class Number, Epilogue EPILOGUE>
struct RowsOfThread {
  static constexpr int PASSES = staged_passes<T>();
  float scales[PASSES];
  Bytes16 residual[PASSES];  // 8 numbers

  __device__ __forceinline__ void load(const sana_edge_w8a8_linear_args& a, int64_t first, int column) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      const int64_t row = first + staged_row<T>(threadIdx.x, pass);
      if (row >= a.rows || column >= a.columns) continue;
      scales[pass] = a.scales[row];
      if (ColumnsOfThread<Number, EPILOGUE>::ADDED || (EPILOGUE == ALL && a.residual))
        residual[pass] = load_vector<Bytes16>(static_cast<const Number*>(a.residual) + row * a.columns + column);
    }
  }
};

template <class T>
__device__ __forceinline__ void stage_sums(int32_t* staged, const int32_t (&sums)[T::NT][4]) {
  struct alignas(8) Pair {
    int32_t sum[2];
  };
  const int row = threadIdx.x % WARP / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < T::NT; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      store_vector(staged + staged_place<T>(row + half * 8, column + n * 8),
                   Pair{{sums[n][2 * half], sums[n][2 * half + 1]}});
}

template <class T>
__device__ __forceinline__ void load_staged(int32_t (&sums)[8], const int32_t* staged, int pass) {
  struct alignas(16) Four {
    int32_t sum[4];
  };
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int column = staged_column<T>(threadIdx.x) + half * 4;
    const Four four = load_vector<Four>(staged + staged_place<T>(staged_row<T>(threadIdx.x, pass), column));
    for (int i = 0; i < 4; i++) sums[half * 4 + i] = four.sum[i];
  }
}

template <class T, class Number, Epilogue EPILOGUE>
__device__ __forceinline__ void write_tile(const int32_t (&sums)[T::MT][T::NT][4], int64_t first_row, int column,
                                           const sana_edge_w8a8_linear_args& a) {
  int32_t* const staged =
      reinterpret_cast<int32_t*>(shared_memory()) + threadIdx.x / WARP * (16 * T::N / T::WARPS_N);
  // registers for what follows are free when the first sums are gone
  stage_sums<T>(staged, sums[0]);
  ColumnsOfThread<Number, EPILOGUE> columns(a, column);
  // Turing rounds to bf16 in many steps, which take the registers
  constexpr bool AHEAD = SANA_EDGE_ARCH >= 800;
  RowsOfThread<T, Number, EPILOGUE> rows[2];
  rows[0].load(a, first_row, column);
#pragma unroll
  for (int m = 0; m < T::MT; m++) {
    if (m > 0) stage_sums<T>(staged, sums[m]);
    if (!AHEAD && m > 0) rows[m % 2].load(a, first_row + m * 16, column);
    synchronize_warp();
    // other rows than those which are written below: the residual may be out
    if (AHEAD && m + 1 < T::MT) rows[(m + 1) % 2].load(a, first_row + (m + 1) * 16, column);
#pragma unroll
    for (int pass = 0; pass < staged_passes<T>(); pass++) {
      const int64_t row = first_row + m * 16 + staged_row<T>(threadIdx.x, pass);
      if (row >= a.rows || column >= a.columns) continue;
      int32_t eight[8];
      load_staged<T>(eight, staged, pass);
      store_vector(static_cast<Number*>(a.out) + row * a.columns + column,
                   columns.finish(eight, row, rows[m % 2].scales[pass], rows[m % 2].residual[pass]));
    }
    synchronize_warp();
  }
}

// a block's tile, from operands to results; where it is among the tiles
template <class T, class Number, Epilogue EPILOGUE>
__device__ __forceinline__ TilePlace make_tile(const sana_edge_w8a8_linear_args& a) {
  const unsigned down = unsigned(blocks_of<int64_t>(a.rows, T::M));
  const TilePlace place = tile_of_block(blockIdx.x, down, blocks_of(unsigned(a.columns), unsigned(T::N)));
  const int64_t row = int64_t(place.row) * T::M, column = int64_t(place.column) * T::N;
  int32_t sums[T::MT][T::NT][4] = {};
  multiply_tiles<T>(
      sums, MatrixRows{a.values + row * a.depth, int(smaller<int64_t>(a.rows - row, T::M)), a.depth},
      MatrixRows{a.weight + column * a.depth, int(smaller<int64_t>(a.columns - column, T::N)), a.depth}, a.depth);
  write_tile<T, Number, EPILOGUE>(sums, row + warp_row<T>(threadIdx.x),
                                  int(column) + warp_column<T>(threadIdx.x) + staged_column<T>(threadIdx.x), a);
  return place;
}
