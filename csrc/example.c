/* How a program uses the library: the rows of a matrix to INT8, and their product with an INT8 weight.
 *
 *   nvcc example.c -I include -o example libsana_edge_cuda.so && LD_LIBRARY_PATH=. ./example
 *
 * where `python -c "import sana_edge; print(sana_edge.__path__[0])"` tells the folder of both. Any C or C++ program
 * can do the same with the memory and the streams that it has. With -DEMULATED the tests build this for the CPU.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sana_edge.h"

#ifdef EMULATED
#define ALLOCATE(pointer, bytes) ((*(pointer) = aligned_memory(bytes)) == NULL)
#define COPY(to, from, bytes, direction) (memcpy(to, from, bytes) == NULL)
#define WAIT() 0
static void *aligned_memory(size_t bytes) {
  char *memory = malloc(bytes + 16);
  return memory ? memory + (16 - (size_t)memory % 16) % 16 : NULL;
}
#else
#include <cuda_runtime_api.h>
#define ALLOCATE(pointer, bytes) (cudaMalloc(pointer, bytes) != cudaSuccess)
#define COPY(to, from, bytes, direction) (cudaMemcpy(to, from, bytes, direction) != cudaSuccess)
/* operations only start: what went wrong on the GPU shows when they are waited for */
#define WAIT() (cudaDeviceSynchronize() != cudaSuccess)
#endif

enum { ROWS = 3, DEPTH = 64, COLUMNS = 32 };

static int fail(const char *what, sana_edge_status status) {
  fprintf(stderr, "error: %s: %s\n", what, sana_edge_status_text(status));
  return 1;
}

int main(void) {
  /* x (ROWS, DEPTH) in fp32, a weight of which row n is 1 at n and 0 elsewhere, so that the product is x's start */
  static float x[ROWS][DEPTH], ones[COLUMNS];
  static int8_t weight[COLUMNS][DEPTH];
  static uint16_t out[ROWS][COLUMNS]; /* bf16 */
  void *gpu_x, *gpu_values, *gpu_scales, *gpu_weight, *gpu_ones, *gpu_out;
  sana_edge_quantize_rows_args rows;
  sana_edge_w8a8_linear_args product;
  sana_edge_device_info device;
  sana_edge_status status;
  float worst = 0;
  int row, n;

  if (sana_edge_abi() != SANA_EDGE_ABI) {
    fprintf(stderr, "error: the library has interface %d, the header %d\n", sana_edge_abi(), SANA_EDGE_ABI);
    return 1;
  }
  status = sana_edge_device(0, &device);
  if (status != SANA_EDGE_OK) return fail("device 0", status);

  for (row = 0; row < ROWS; row++)
    for (n = 0; n < DEPTH; n++) x[row][n] = (float)((row + 1) * (n - 30)) / 8;
  for (n = 0; n < COLUMNS; n++) weight[n][n] = 1, ones[n] = 1;

  if (ALLOCATE(&gpu_x, sizeof x) || ALLOCATE(&gpu_values, ROWS * DEPTH) ||
      ALLOCATE(&gpu_scales, ROWS * sizeof(float)) || ALLOCATE(&gpu_weight, sizeof weight) ||
      ALLOCATE(&gpu_ones, sizeof ones) || ALLOCATE(&gpu_out, sizeof out))
    return fail("memory", SANA_EDGE_OUT_OF_MEMORY);
  if (COPY(gpu_x, x, sizeof x, cudaMemcpyHostToDevice) ||
      COPY(gpu_weight, weight, sizeof weight, cudaMemcpyHostToDevice) ||
      COPY(gpu_ones, ones, sizeof ones, cudaMemcpyHostToDevice))
    return fail("copying", SANA_EDGE_DEVICE_LOST);

  /* what is not set is 0 or NULL: no static scale, no bias, no residual, no limit */
  memset(&rows, 0, sizeof rows);
  rows.x = gpu_x;
  rows.values = gpu_values;
  rows.scales = gpu_scales;
  rows.rows = ROWS;
  rows.columns = DEPTH;
  rows.type = SANA_EDGE_FP32;
  status = sana_edge_quantize_rows(&rows, NULL);
  if (status != SANA_EDGE_OK) return fail("quantize_rows", status);

  memset(&product, 0, sizeof product);
  product.values = gpu_values;
  product.scales = gpu_scales;
  product.weight = gpu_weight;
  product.weight_scales = gpu_ones;
  product.out = gpu_out;
  product.rows = ROWS;
  product.columns = COLUMNS;
  product.depth = DEPTH;
  product.type = SANA_EDGE_BF16;
  status = sana_edge_w8a8_linear(&product, NULL);
  if (status != SANA_EDGE_OK) return fail("w8a8_linear", status);

  if (WAIT() || COPY(out, gpu_out, sizeof out, cudaMemcpyDeviceToHost))
    return fail("waiting", SANA_EDGE_DEVICE_LOST);
  for (row = 0; row < ROWS; row++) {
    for (n = 0; n < COLUMNS; n++) {
      /* bf16 is the upper half of fp32 */
      const uint32_t bits = (uint32_t)out[row][n] << 16;
      float value, error;
      memcpy(&value, &bits, sizeof value);
      error = fabsf(value - x[row][n]) / (float)(row + 1);
      if (!(error <= worst)) worst = error;
    }
  }
  printf("compute capability %d.%d, largest error %.4f of at most 0.03\n", device.capability / 10,
         device.capability % 10, worst);
  return worst <= 0.03f ? 0 : 1;
}
