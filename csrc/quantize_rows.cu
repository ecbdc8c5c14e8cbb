// Rows to INT8: one block reads a row once, keeps it in registers between its absmax and its values, 16 bytes at
// a time.
#include "checks.h"
#include "row_quantizer.h"

namespace {

constexpr int THREADS = 256;
// elements of a row that a thread keeps, in groups of 16: rows of up to 16384
constexpr int GROUPS = 4;

template <class T>
__global__ void __launch_bounds__(THREADS) quantize_rows_kernel(const sana_edge_quantize_rows_args a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.columns;
  const int groups = a.columns / 16;
  float kept[GROUPS][16];
  float most = 0;
#pragma unroll
  for (int n = 0; n < GROUPS; n++) {
    const int group = threadIdx.x + n * THREADS;
    if (group >= groups) continue;
    load_group(kept[n], x + group * 16);
    for (int i = 0; i < 16; i++) most = larger_or_nan(most, kept[n][i]);
  }
  most = block_max<THREADS>(most);
  const RowScale scale = row_scale(most, a.static_scale);
  if (threadIdx.x == 0) a.scales[row] = scale.stored;
#pragma unroll
  for (int n = 0; n < GROUPS; n++) {
    const int group = threadIdx.x + n * THREADS;
    if (group < groups) store_vector(a.values + row * a.columns + group * 16, quantize_group(kept[n], scale));
  }
}

template <class T>
sana_edge_status start(const sana_edge_quantize_rows_args& a, void* stream) {
  return launch(quantize_rows_kernel<T>, dim3{unsigned(a.rows), 1, 1}, THREADS, block_max_bytes(THREADS), stream,
                a);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_quantize_rows(const sana_edge_quantize_rows_args* a,
                                                                  void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_float(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->rows >= 0 && a->rows < LARGEST && a->columns > 0 && a->columns % 16 == 0 &&
                      a->columns <= 16 * GROUPS * THREADS,
                  SANA_EDGE_BAD_SHAPE);
  if (a->rows == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->x, a->values, a->scales}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->x, a->values}) && aligned({a->scales, a->static_scale}, 4), SANA_EDGE_BAD_ALIGNMENT);
  if (a->type == SANA_EDGE_FP16) return start<Half>(*a, stream);
  if (a->type == SANA_EDGE_BF16) return start<BFloat16>(*a, stream);
  return start<float>(*a, stream);
}
