/* Memory on both sides, 16-bit numbers and comparisons for known_answers.c. With EMULATED the GPU is the CPU. */
#ifndef SANA_EDGE_KNOWN_ANSWERS_H
#define SANA_EDGE_KNOWN_ANSWERS_H

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
#define WAIT() (cudaDeviceSynchronize() != cudaSuccess)
#endif

static int failures;

static void stop(const char *what, sana_edge_status status) {
  fprintf(stderr, "error: %s: %s\n", what, sana_edge_status_text(status));
  exit(1);
}

/* memory of the GPU with a copy of `from`, or with bytes of 0xFF, which are NaN, where it is NULL */
static void *sent(const void *from, size_t bytes) {
  void *there, *filled = NULL;
  if (ALLOCATE(&there, bytes)) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  if (!from) {
    filled = malloc(bytes);
    if (!filled) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
    memset(filled, 0xFF, bytes);
  }
  if (COPY(there, from ? from : filled, bytes, cudaMemcpyHostToDevice)) stop("copying", SANA_EDGE_DEVICE_LOST);
  free(filled);
  return there;
}

static void fetch(void *to, const void *there, size_t bytes) {
  if (WAIT() || COPY(to, there, bytes, cudaMemcpyDeviceToHost)) stop("waiting", SANA_EDGE_DEVICE_LOST);
}

/* bf16 is the upper half of fp32 */
static float from_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

/* of numbers that bf16 has exactly */
static uint16_t to_bf16(float value) {
  uint32_t wide;
  memcpy(&wide, &value, sizeof wide);
  if (wide & 0xFFFF) stop("an input that bf16 does not have", SANA_EDGE_BAD_TYPE);
  return (uint16_t)(wide >> 16);
}

static uint16_t *bf16_of(const float *x, size_t count) {
  uint16_t *out = malloc(count * sizeof *out);
  size_t i;
  if (!out) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  for (i = 0; i < count; i++) out[i] = to_bf16(x[i]);
  return out;
}

/* small integers in a pattern without short periods: -reach to reach */
static int number(int i, int reach) {
  const uint32_t mixed = ((uint32_t)i * 2654435761u + 12345u) ^ ((uint32_t)i * 40503u >> 3);
  return (int)((mixed >> 16) % (uint32_t)(2 * reach + 1)) - reach;
}

static float *numbers(size_t count, int reach, float unit) {
  float *out = malloc(count * sizeof *out);
  size_t i;
  if (!out) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  for (i = 0; i < count; i++) out[i] = (float)number((int)i, reach) * unit;
  return out;
}

static int8_t *int8_numbers(size_t count, int reach) {
  int8_t *out = malloc(count);
  size_t i;
  if (!out) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  for (i = 0; i < count; i++) out[i] = (int8_t)number((int)i + 977, reach);
  return out;
}

static float *constant(size_t count, float value) {
  float *out = malloc(count * sizeof *out);
  size_t i;
  if (!out) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  for (i = 0; i < count; i++) out[i] = value;
  return out;
}

static float *of_bf16(const uint16_t *x, size_t count) {
  float *out = malloc(count * sizeof *out);
  size_t i;
  if (!out) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  for (i = 0; i < count; i++) out[i] = from_bf16(x[i]);
  return out;
}

/* every number within `relative` of its own size and `absolute`; NaN, such as unwritten memory, is not */
static void compare(const char *what, const float *found, const double *wanted, size_t count, double relative,
                    double absolute) {
  double worst = 0;
  size_t i, at = 0;
  for (i = 0; i < count; i++) {
    const double error = fabs(found[i] - wanted[i]) / (relative * fabs(wanted[i]) + absolute);
    if (!(error <= worst)) worst = error, at = i;
  }
  if (!(worst <= 1)) failures++;
  printf("%-26s %6lu numbers, largest error %.3f of what is allowed%s\n", what, (unsigned long)count, worst,
         worst <= 1 ? "" : " WRONG");
  if (!(worst <= 1)) printf("  number %lu is %g, not %g\n", (unsigned long)at, found[at], wanted[at]);
}

/* rows in INT8 and their scales give the numbers to half a step, and to a bf16 rounding before it */
static void compare_rows(const char *what, const void *gpu_values, const void *gpu_scales, const double *wanted,
                         size_t rows, size_t columns, double rounding) {
  int8_t *values = malloc(rows * columns);
  float *scales = malloc(rows * sizeof *scales), *found = malloc(rows * columns * sizeof *found);
  double largest = 0;
  size_t i;
  if (!values || !scales || !found) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  fetch(values, gpu_values, rows * columns);
  fetch(scales, gpu_scales, rows * sizeof *scales);
  for (i = 0; i < rows * columns; i++) {
    found[i] = (float)values[i] * scales[i / columns];
    if (fabs(wanted[i]) > largest) largest = fabs(wanted[i]);
  }
  compare(what, found, wanted, rows * columns, rounding, largest * (0.5 / 127 + rounding) + 1e-6);
  free(values), free(scales), free(found);
}

#endif
