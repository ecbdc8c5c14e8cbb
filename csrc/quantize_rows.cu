// Rows to INT8: a warp, or a block where rows are long, reads a row once and keeps it in registers between its
// absmax and its values, 16 bytes at a time.
#include "checks.h"
#include "row_quantizer.h"

namespace {

constexpr int THREADS = 256;
// elements of a row that a thread keeps, in groups of 16: rows of up to 2048 for a warp, 16384 for a block
constexpr int GROUPS = 4;

// EACH: threads of a row, a warp or the block
template <class T, int EACH>
__global__ void __launch_bounds__(THREADS) quantize_rows_kernel(const sana_edge_quantize_rows_args a) {
  wait_for_kernels();
  const int64_t row = int64_t(blockIdx.x) * (THREADS / EACH) + threadIdx.x / EACH;
  const int first = threadIdx.x % EACH;
  // a warp without a row takes part in what the others do together
  const int groups = row < a.rows ? a.columns / 16 : 0;
  const T* x = static_cast<const T*>(a.x) + row * a.columns;
  float kept[GROUPS][16];
  float most = 0;
#pragma unroll
  for (int n = 0; n < GROUPS; n++) {
    const int group = first + n * EACH;
    if (group >= groups) continue;
    load_group(kept[n], x + group * 16);
    for (int i = 0; i < 16; i++) most = larger_or_nan(most, kept[n][i]);
  }
  if constexpr (EACH == WARP)
    most = warp_max(most);
  else
    most = block_max<THREADS>(most);
  const RowScale scale = row_scale(most, a.static_scale);
  if (first == 0 && groups) a.scales[row] = scale.stored;
#pragma unroll
  for (int n = 0; n < GROUPS; n++) {
    const int group = first + n * EACH;
    if (group < groups) store_vector(a.values + row * a.columns + group * 16, quantize_group(kept[n], scale));
  }
}

template <class T>
sana_edge_status start(const sana_edge_quantize_rows_args& a, void* stream) {
  if (a.columns > 16 * GROUPS * WARP)
    return launch(quantize_rows_kernel<T, THREADS>, dim3{unsigned(a.rows), 1, 1}, THREADS,
                  block_max_bytes(THREADS), stream, a, BEGINS_EARLY);
  const auto blocks = unsigned(blocks_of<int64_t>(a.rows, THREADS / WARP));
  return launch(quantize_rows_kernel<T, WARP>, dim3{blocks, 1, 1}, THREADS, 0, stream, a, BEGINS_EARLY);
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
