// RMSNorm of what a product made, plus the block's input, and the sum's INT8 for the next product, in one pass: the
// norm of maps that are wider than a product's tile. Rows stay in registers between their squares, their absmax
// and their values.
#include "checks.h"
#include "row_norm.h"

namespace {

// times that a lane has CHUNK elements: rows of up to 1280 a warp
constexpr int CHUNKS = 5;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int LARGEST_OF_WARP = WARP * CHUNK * CHUNKS;
// sums and maxima of warps
constexpr size_t SHARED = 2 * WARPS * sizeof(float);

using Arguments = sana_edge_norm_add_quantize_args;

template <class T>
struct alignas(16) Chunk {
  T element[CHUNK];
};

template <class T, int ROW_WARPS>
__global__ void __launch_bounds__(THREADS) norm_add_quantize_kernel(const Arguments a) {
  wait_for_kernels();
  constexpr int LANES = ROW_WARPS * WARP;
  const int64_t row = int64_t(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  const int lane = threadIdx.x % LANES;
  // a row beyond the last has no chunks, but takes part in barriers
  const int chunks = row < a.rows ? a.columns / CHUNK : 0;
  const int64_t first = row * a.columns;
  float kept[CHUNKS][CHUNK];
  float squares = 0, most = 0;
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    const int chunk = lane + n * LANES;
    if (chunk >= chunks) continue;
    load_group(kept[n], static_cast<const T*>(a.y) + first + chunk * CHUNK);
    for (int i = 0; i < CHUNK; i++) squares = fused_multiply_add(kept[n][i], kept[n][i], squares);
  }
  const float mean = divide(over_row<Add, ROW_WARPS, WARPS>(squares, 0), float(a.columns));
  const float root = reciprocal_root(add(mean, a.eps));
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    const int chunk = lane + n * LANES;
    if (chunk >= chunks) continue;
    float weight[CHUNK], bias[CHUNK], x[CHUNK];
    load_group(weight, a.weight + chunk * CHUNK);
    load_group(bias, a.bias + chunk * CHUNK);
    load_group(x, static_cast<const T*>(a.x) + first + chunk * CHUNK);
    Chunk<T> out;
    for (int i = 0; i < CHUNK; i++) {
      const float normed = add(multiply(multiply(kept[n][i], root), weight[i]), bias[i]);
      out.element[i] = from_float<T>(add(normed, x[i]));
      // what the next product reads is what the block gives
      kept[n][i] = to_float(out.element[i]);
      most = larger_or_nan(most, kept[n][i]);
    }
    store_vector(static_cast<T*>(a.out) + first + chunk * CHUNK, out);
  }
  most = over_row<Largest, ROW_WARPS, WARPS>(most, 1);
  const RowScale scale = row_scale(most, a.static_scale);
  if (lane == 0 && row < a.rows) a.scales[row] = scale.stored;
#pragma unroll
  for (int n = 0; n < CHUNKS; n++) {
    const int chunk = lane + n * LANES;
    if (chunk < chunks) store_vector(a.values + first + chunk * CHUNK, quantize_chunk(kept[n], scale));
  }
}

template <class T, int ROW_WARPS>
sana_edge_status start(const Arguments& a, void* stream) {
  const int64_t blocks = blocks_of(a.rows, int64_t(WARPS / ROW_WARPS));
  return launch(norm_add_quantize_kernel<T, ROW_WARPS>, dim3{unsigned(blocks), 1, 1}, THREADS, SHARED,
                stream, a, BEGINS_EARLY);
}

template <class T>
sana_edge_status start(const Arguments& a, void* stream) {
  return a.columns <= LARGEST_OF_WARP ? start<T, 1>(a, stream) : start<T, 2>(a, stream);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_norm_add_quantize(const sana_edge_norm_add_quantize_args* a,
                                                                      void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->rows >= 0 && a->rows < LARGEST && a->columns > 0 && a->columns % 16 == 0 &&
                      a->columns <= 2 * LARGEST_OF_WARP,
                  SANA_EDGE_BAD_SHAPE);
  if (a->rows == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->y, a->x, a->weight, a->bias, a->out, a->values, a->scales}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->y, a->x, a->weight, a->bias, a->out, a->values}) &&
                      aligned({a->scales, a->static_scale}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  return a->type == SANA_EDGE_FP16 ? start<Half>(*a, stream) : start<BFloat16>(*a, stream);
}
