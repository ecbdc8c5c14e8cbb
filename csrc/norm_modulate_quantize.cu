// LayerNorm, modulation and INT8 in one pass: row_norm.h, 40 numbers a lane.
#include "checks.h"
#include "row_norm.h"

namespace {

// times that a lane has CHUNK elements: rows of up to 1280 a warp
constexpr int CHUNKS = 5;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
// sums and maxima of warps, three times
constexpr size_t SHARED = 3 * WARPS * sizeof(float);

using Arguments = sana_edge_norm_modulate_quantize_args;

template <class T, int ROW_WARPS>
__global__ void __launch_bounds__(THREADS) norm_modulate_quantize_kernel(const Arguments a) {
  wait_for_kernels();
  constexpr int LANES = ROW_WARPS * WARP;
  const int64_t row = int64_t(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const int64_t vectors = uint32_t(row) / uint32_t(a.tokens) * a.stride;
  row_to_int8<T, ROW_WARPS, WARPS, CHUNKS, false>(
      static_cast<const T*>(a.x) + row * a.columns, row < a.rows ? a.columns : 0,
      RowNorm{a.scale + vectors, a.shift + vectors, a.static_scale, a.eps}, a.values + row * a.columns,
      a.scales + row);
}

template <class T, int ROW_WARPS>
sana_edge_status start(const Arguments& a, void* stream) {
  constexpr int ROWS = WARPS / ROW_WARPS;
  return launch(norm_modulate_quantize_kernel<T, ROW_WARPS>, dim3{unsigned(blocks_of(a.rows, int64_t(ROWS))), 1, 1},
                THREADS, SHARED, stream, a, BEGINS_EARLY);
}

template <class T>
sana_edge_status start(const Arguments& a, void* stream) {
  constexpr int LARGEST_OF_WARP = WARP * CHUNK * CHUNKS;
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
