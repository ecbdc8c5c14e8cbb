// Rows to two INT8 digits, a block each, in one pass: x stays in registers between its absmax and its digits.
#include "checks.h"
#include "digits.h"

namespace {

using Arguments = sana_edge_quantize_digits_args;

// tanh's GELU (arXiv 1606.08415)
__device__ __forceinline__ float gelu(float x) {
  const float cube = multiply(multiply(x, x), x);
  const float inner = multiply(0.79788456080286536f, fused_multiply_add(0.044715f, cube, x));
  return multiply(multiply(0.5f, x), add(1.0f, tanhf(inner)));
}

template <int GROUPS, int THREADS>
__global__ void __launch_bounds__(THREADS) quantize_digits_kernel(const Arguments a) {
  wait_for_kernels();
  const int64_t row = blockIdx.x;
  const float* x = a.x + row * a.columns * (a.gated ? 2 : 1);
  float kept[GROUPS][ROW_GROUP];
#pragma unroll
  for (int n = 0; n < GROUPS; n++) {
    const int column = row_column<THREADS>(n);
    if (column >= a.columns) continue;
    load_group(kept[n], x + column);
    if (!a.gated) continue;
    float up[ROW_GROUP];
    load_group(up, x + a.columns + column);
    for (int i = 0; i < ROW_GROUP; i++) kept[n][i] = multiply(gelu(kept[n][i]), up[i]);
  }
  write_digits<GROUPS, THREADS>(kept, a.columns, a.digits + row * 2 * a.columns, a.steps + row);
}

template <int GROUPS, int THREADS>
sana_edge_status start(const Arguments& a, void* stream) {
  return launch(quantize_digits_kernel<GROUPS, THREADS>, dim3{unsigned(a.rows), 1, 1}, THREADS,
                block_max_bytes(THREADS), stream, a, BEGINS_EARLY);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_quantize_digits(const sana_edge_quantize_digits_args* a,
                                                                    void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(a->rows >= 0 && a->rows < LARGEST && a->columns > 0 && a->columns % 16 == 0 &&
                      a->columns <= row_numbers(16, 256),
                  SANA_EDGE_BAD_SHAPE);
  if (a->rows == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->x, a->digits, a->steps}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->x, a->digits}) && aligned({a->steps}, 4), SANA_EDGE_BAD_ALIGNMENT);
  if (a->columns <= row_numbers(3, WARP)) return start<3, WARP>(*a, stream);
  return a->columns <= row_numbers(3, 256) ? start<3, 256>(*a, stream) : start<16, 256>(*a, stream);
}
