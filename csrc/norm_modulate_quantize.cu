// LayerNorm, modulation and INT8 in one pass: 1, 2, 4 or 8 warps keep a row in registers, 40 numbers a lane,
// between its mean, its centred squares, its absmax and its values, so that x is read once. Scale and shift, 4
// times as large as a 16-bit row, come from L1: all rows of an image share them.
#include "checks.h"
#include "row_warps.h"

namespace {

using Arguments = sana_edge_norm_modulate_quantize_args;

template <class T, int ROW_WARPS>
__global__ void __launch_bounds__(ROW_THREADS) norm_modulate_quantize_kernel(const Arguments a) {
  constexpr int LANES = ROW_WARPS * WARP;
  const int64_t row = int64_t(blockIdx.x) * (ROW_THREADS / LANES) + threadIdx.x / LANES;
  const int lane = threadIdx.x % LANES;
  // a row beyond the last has no chunks, but takes part in barriers
  const int chunks = row < a.rows ? a.columns / CHUNK : 0;
  const T* x = static_cast<const T*>(a.x) + row * a.columns;
  float kept[CHUNKS][CHUNK];
  float sum = 0, squares = 0, most = 0;
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    const int chunk = lane + n * LANES;
    if (chunk >= chunks) continue;
    load_group(kept[n], x + chunk * CHUNK);
    for (int i = 0; i < CHUNK; i++) sum = add(sum, kept[n][i]);
  }
  const float mean = divide(over_row<Add, ROW_WARPS>(sum, 0), float(a.columns));
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    if (lane + n * LANES >= chunks) continue;
    for (int i = 0; i < CHUNK; i++) {
      kept[n][i] = add(kept[n][i], -mean);
      squares = fused_multiply_add(kept[n][i], kept[n][i], squares);
    }
  }
  const float variance = divide(over_row<Add, ROW_WARPS>(squares, 1), float(a.columns));
  const float root = reciprocal_root(add(variance, a.eps));
  const int64_t image = row / a.tokens;
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    const int chunk = lane + n * LANES;
    if (chunk >= chunks) continue;
    float scale[CHUNK], shift[CHUNK];
    load_group(scale, a.scale + image * a.stride + chunk * CHUNK);
    load_group(shift, a.shift + image * a.stride + chunk * CHUNK);
    for (int i = 0; i < CHUNK; i++) {
      kept[n][i] = add(multiply(multiply(kept[n][i], root), scale[i]), shift[i]);
      most = larger_or_nan(most, kept[n][i]);
    }
  }
  most = over_row<Largest, ROW_WARPS>(most, 2);
  const RowScale scale = row_scale(most, a.static_scale);
  if (lane == 0 && row < a.rows) a.scales[row] = scale.stored;
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    const int chunk = lane + n * LANES;
    if (chunk < chunks) store_vector(a.values + row * a.columns + chunk * CHUNK, quantize_chunk(kept[n], scale));
  }
}

template <class T, int ROW_WARPS>
sana_edge_status start(const Arguments& a, void* stream) {
  constexpr int ROWS = ROW_WARPS_MOST / ROW_WARPS;
  return launch(norm_modulate_quantize_kernel<T, ROW_WARPS>, dim3{unsigned(blocks_of(a.rows, int64_t(ROWS))), 1, 1},
                ROW_THREADS, ROW_SHARED, stream, a);
}

template <class T>
sana_edge_status start(const Arguments& a, void* stream) {
  if (a.columns <= LARGEST_OF_WARP) return start<T, 1>(a, stream);
  if (a.columns <= 2 * LARGEST_OF_WARP) return start<T, 2>(a, stream);
  if (a.columns <= 4 * LARGEST_OF_WARP) return start<T, 4>(a, stream);
  return start<T, 8>(a, stream);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_norm_modulate_quantize(const sana_edge_norm_modulate_quantize_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_float(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->rows >= 0 && a->rows < LARGEST && a->columns > 0 && a->columns % 16 == 0 &&
                      a->columns <= 8192 && (a->tokens > 0 || a->rows == 0) && a->stride >= 0,
                  SANA_EDGE_BAD_SHAPE);
  if (a->rows == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->x, a->scale, a->shift, a->values, a->scales}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->x, a->scale, a->shift, a->values}) && a->stride % 4 == 0 &&
                      aligned({a->scales, a->static_scale}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  if (a->type == SANA_EDGE_FP16) return start<Half>(*a, stream);
  if (a->type == SANA_EDGE_BF16) return start<BFloat16>(*a, stream);
  return start<float>(*a, stream);
}
