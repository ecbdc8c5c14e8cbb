// RMSNorm of what a part of Gemma-2 gave, residual, RMSNorm and digits of what the next part reads, in one pass:
// a block has a row, and keeps it in registers between its two norms, its absmax and its digits.
#include "checks.h"
#include "digits.h"

namespace {

using Arguments = sana_edge_add_norm_digits_args;

// 1 / sqrt(mean x^2 + eps) of the block's row
template <int GROUPS, int THREADS>
__device__ __forceinline__ float root_of(const float (&row)[GROUPS][ROW_GROUP], int columns, float eps) {
  float squares = 0;
#pragma unroll
  for (int n = 0; n < GROUPS; n++)
    if (row_column<THREADS>(n) < columns)
      for (int i = 0; i < ROW_GROUP; i++) squares = fused_multiply_add(row[n][i], row[n][i], squares);
  return reciprocal_root(add(divide(block_sum<THREADS>(squares), float(columns)), eps));
}

template <int GROUPS, int THREADS>
__global__ void __launch_bounds__(THREADS) add_norm_digits_kernel(const Arguments a) {
  wait_for_kernels();
  const int64_t first = int64_t(blockIdx.x) * a.columns;
  float kept[GROUPS][ROW_GROUP];
  const float* from = a.y ? a.y : a.x;
#pragma unroll
  for (int n = 0; n < GROUPS; n++)
    if (row_column<THREADS>(n) < a.columns) load_group(kept[n], from + first + row_column<THREADS>(n));
  const float post_root = a.y ? root_of<GROUPS, THREADS>(kept, a.columns, a.eps) : 0.0f;
#pragma unroll
  for (int n = 0; n < GROUPS; n++) {
    const int column = row_column<THREADS>(n);
    if (column >= a.columns) continue;
    if (a.y) {
      float x[ROW_GROUP], weight[ROW_GROUP];
      load_group(x, a.x + first + column);
      load_group(weight, a.post_weight + column);
      for (int i = 0; i < ROW_GROUP; i++)
        kept[n][i] = add(x[i], multiply(multiply(kept[n][i], post_root), weight[i]));
    }
    struct alignas(16) Four {
      float element[ROW_GROUP];
    } total;
    for (int i = 0; i < ROW_GROUP; i++) total.element[i] = kept[n][i];
    store_vector(a.total + first + column, total);
  }
  const float root = root_of<GROUPS, THREADS>(kept, a.columns, a.eps);
#pragma unroll
  for (int n = 0; n < GROUPS; n++) {
    if (row_column<THREADS>(n) >= a.columns) continue;
    float weight[ROW_GROUP];
    load_group(weight, a.weight + row_column<THREADS>(n));
    for (int i = 0; i < ROW_GROUP; i++) kept[n][i] = multiply(multiply(kept[n][i], root), weight[i]);
  }
  write_digits<GROUPS, THREADS>(kept, a.columns, a.digits + 2 * first, a.steps + blockIdx.x);
}

template <int GROUPS, int THREADS>
sana_edge_status start(const Arguments& a, void* stream) {
  return launch(add_norm_digits_kernel<GROUPS, THREADS>, dim3{unsigned(a.rows), 1, 1}, THREADS,
                block_max_bytes(THREADS), stream, a, BEGINS_EARLY);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_add_norm_digits(const sana_edge_add_norm_digits_args* a,
                                                                    void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(a->rows >= 0 && a->rows < LARGEST && a->columns > 0 && a->columns % 16 == 0 &&
                      a->columns <= row_numbers(8, 256),
                  SANA_EDGE_BAD_SHAPE);
  if (a->rows == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->x, a->weight, a->total, a->digits, a->steps}) && (!a->y || a->post_weight),
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->x, a->y, a->post_weight, a->weight, a->total, a->digits}) && aligned({a->steps}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  if (a->columns <= row_numbers(3, WARP)) return start<3, WARP>(*a, stream);
  return a->columns <= row_numbers(3, 256) ? start<3, 256>(*a, stream) : start<8, 256>(*a, stream);
}
