/* Every operation of the library on small integers, against plain loops in double: no torch, no Python.
 *
 *   nvcc known_answers.c -I . -o known_answers libsana_edge_cuda.so && compute-sanitizer ./known_answers
 *
 * Sizes are a little more than a tile. Says the largest error of each operation, and ends with 1 if one is wrong.
 * Tolerances: half an INT8 step of the largest number; 2^-8 for each rounding to bf16; 1e-5 for sums in fp32.
 */
#include "known_answers.h"

#define BF16 (1.0 / 256)
#define SUMS 1e-5
#define NEW(type, name, count) type *name = calloc(count, sizeof(type))
#define RUN(operation, args)                                            \
  do {                                                                  \
    const sana_edge_status status = sana_edge_##operation(&(args), NULL); \
    if (status != SANA_EDGE_OK) stop(#operation, status);               \
  } while (0)

enum { IMAGES = 2, TOKENS = 75, ROWS = IMAGES * TOKENS, HEADS = 2, WIDTH = HEADS * 32, HEIGHT = 15, ACROSS = 5 };

static void *sent_bf16(const float *x, size_t count) {
  uint16_t *half = bf16_of(x, count);
  void *there = sent(half, count * sizeof *half);
  free(half);
  return there;
}

static void compare_bf16(const char *what, const void *there, const double *wanted, size_t count, double relative,
                         double absolute) {
  uint16_t *half = malloc(count * sizeof *half);
  float *found;
  if (!half) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  fetch(half, there, count * sizeof *half);
  found = of_bf16(half, count);
  compare(what, found, wanted, count, relative, absolute);
  free(half), free(found);
}

static void compare_fp32(const char *what, const void *there, const double *wanted, size_t count, double absolute) {
  float *found = malloc(count * sizeof *found);
  if (!found) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  fetch(found, there, count * sizeof *found);
  compare(what, found, wanted, count, SUMS, absolute);
  free(found);
}

static void *out_values(size_t count) { return sent(NULL, count); }
static void *out_floats(size_t count) { return sent(NULL, count * sizeof(float)); }

static void check_quantize_rows(void) {
  enum { N = ROWS * WIDTH };
  float *x = numbers(N, 100, 0.5f);
  double wanted[N];
  sana_edge_quantize_rows_args a = {0};
  int i;
  for (i = 0; i < N; i++) wanted[i] = x[i];
  a.x = sent(x, sizeof(float) * N), a.values = out_values(N), a.scales = out_floats(ROWS);
  a.rows = ROWS, a.columns = WIDTH, a.type = SANA_EDGE_FP32;
  RUN(quantize_rows, a);
  compare_rows("quantize_rows", a.values, a.scales, wanted, ROWS, WIDTH, SUMS);
}

/* (x - mean) / sqrt(variance + eps) * scale + shift, of a row */
static void normed(const float *x, const float *scale, const float *shift, double *out, int columns, double eps) {
  double mean = 0, variance = 0;
  int n;
  for (n = 0; n < columns; n++) mean += x[n] / columns;
  for (n = 0; n < columns; n++) variance += (x[n] - mean) * (x[n] - mean) / columns;
  for (n = 0; n < columns; n++) out[n] = (x[n] - mean) / sqrt(variance + eps) * scale[n] + shift[n];
}

static void check_norm_modulate_quantize(void) {
  enum { N = ROWS * WIDTH };
  float *x = numbers(N, 60, 0.25f), *scale = numbers(IMAGES * WIDTH, 8, 0.25f), *shift = numbers(IMAGES * WIDTH, 5, 0.5f);
  double wanted[N];
  sana_edge_norm_modulate_quantize_args a = {0};
  int row;
  for (row = 0; row < ROWS; row++) {
    const int image = row / TOKENS * WIDTH;
    normed(x + row * WIDTH, scale + image, shift + image, wanted + row * WIDTH, WIDTH, 1e-6);
  }
  a.x = sent_bf16(x, N), a.values = out_values(N), a.scales = out_floats(ROWS);
  a.scale = sent(scale, sizeof(float) * IMAGES * WIDTH), a.shift = sent(shift, sizeof(float) * IMAGES * WIDTH);
  a.rows = ROWS, a.columns = WIDTH, a.tokens = TOKENS, a.stride = WIDTH, a.eps = 1e-6f, a.type = SANA_EDGE_BF16;
  RUN(norm_modulate_quantize, a);
  compare_rows("norm_modulate_quantize", a.values, a.scales, wanted, ROWS, WIDTH, SUMS);
}

/* sums of products of INT8 rows, out (rows, columns) */
static void multiply(const int8_t *values, const int8_t *weight, double *out, int rows, int columns, int depth) {
  int m, n, k;
  for (m = 0; m < rows; m++)
    for (n = 0; n < columns; n++)
      for (out[m * columns + n] = 0, k = 0; k < depth; k++)
        out[m * columns + n] += values[m * depth + k] * weight[n * depth + k];
}

static void check_w8a8_linear(void) {
  enum { COLUMNS = 136, DEPTH = 80, N = ROWS * COLUMNS };
  int8_t *values = int8_numbers(ROWS * DEPTH, 100), *weight = int8_numbers(COLUMNS * DEPTH, 90);
  float *scales = constant(ROWS, 0.03125f), *weight_scales = constant(COLUMNS, 0.015625f);
  float *bias = numbers(COLUMNS, 9, 0.5f), *gate = numbers(IMAGES * COLUMNS, 6, 0.25f);
  float *residual = numbers(N, 50, 0.5f), *constants = numbers(COLUMNS, 20, 0.5f);
  NEW(double, wanted, N);
  sana_edge_w8a8_linear_args a = {0};
  int i;
  multiply(values, weight, wanted, ROWS, COLUMNS, DEPTH);
  for (i = 0; i < N; i++) {
    double y = wanted[i] * 0.03125 * 0.015625 + bias[i % COLUMNS];
    y = y / (1 + exp(-y));
    y = y > 20 ? 20 : y < -20 ? -20 : y;
    wanted[i] = residual[i] + gate[i / (TOKENS * COLUMNS) * COLUMNS + i % COLUMNS] * y + constants[i % COLUMNS];
  }
  a.values = sent(values, ROWS * DEPTH), a.weight = sent(weight, COLUMNS * DEPTH);
  a.scales = sent(scales, sizeof(float) * ROWS), a.weight_scales = sent(weight_scales, sizeof(float) * COLUMNS);
  a.bias = sent(bias, sizeof(float) * COLUMNS), a.gate = sent(gate, sizeof(float) * IMAGES * COLUMNS);
  a.residual = sent_bf16(residual, N), a.constant = sent(constants, sizeof(float) * COLUMNS);
  a.out = (void *)a.residual, a.rows = ROWS, a.columns = COLUMNS, a.depth = DEPTH, a.tokens = TOKENS;
  a.type = SANA_EDGE_BF16, a.gate_stride = COLUMNS, a.limit = 20, a.silu = 1;
  RUN(w8a8_linear, a);
  compare_bf16("w8a8_linear", a.out, wanted, N, BF16, 1e-4);
  free(wanted);
}

static void *zeros(int64_t bytes) {
  void *empty = calloc(1, (size_t)bytes), *there;
  if (!empty) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  there = sent(empty, (size_t)bytes);
  free(empty);
  return there;
}

/* more than one tile of columns; the second image's rows are left as they are */
static void check_w8a8_linear_quantize(void) {
  enum { COLUMNS = 144, DEPTH = 80, N = ROWS * COLUMNS };
  int8_t *values = int8_numbers(ROWS * DEPTH, 100), *weight = int8_numbers(COLUMNS * DEPTH, 90);
  float *scales = constant(ROWS, 0.03125f), *weight_scales = constant(COLUMNS, 0.015625f);
  float *residual = numbers(N, 50, 0.5f), *scale = numbers(COLUMNS, 8, 0.25f), *shift = numbers(COLUMNS, 5, 0.5f);
  float row[COLUMNS];
  NEW(double, wanted, N);
  NEW(double, rows, N);
  sana_edge_w8a8_linear_quantize_args a = {0};
  int i, n;
  multiply(values, weight, wanted, ROWS, COLUMNS, DEPTH);
  for (i = 0; i < N; i++) rows[i] = wanted[i] = residual[i] + wanted[i] * 0.03125 * 0.015625;
  for (i = 0; i < TOKENS; i++) {
    for (n = 0; n < COLUMNS; n++) row[n] = (float)wanted[i * COLUMNS + n];
    normed(row, scale, shift, rows + i * COLUMNS, COLUMNS, 1e-6);
  }
  a.values = sent(values, ROWS * DEPTH), a.weight = sent(weight, COLUMNS * DEPTH);
  a.scales = sent(scales, sizeof(float) * ROWS), a.weight_scales = sent(weight_scales, sizeof(float) * COLUMNS);
  a.residual = sent_bf16(residual, N), a.scale = sent(scale, sizeof(float) * COLUMNS);
  a.shift = sent(shift, sizeof(float) * COLUMNS), a.out = (void *)a.residual, a.next_values = out_values(N);
  a.next_scales = out_floats(ROWS), a.rows = ROWS, a.columns = COLUMNS, a.depth = DEPTH, a.tokens = TOKENS;
  a.workspace_bytes = sana_edge_qkv_linear_attention_workspace(1, 1, 1), a.workspace = zeros(a.workspace_bytes);
  a.type = SANA_EDGE_BF16, a.plain_first = 1, a.plain_end = 2, a.eps = 1e-6f;
  RUN(w8a8_linear_quantize, a);
  /* and again, from counters that are zeros again */
  a.residual = sent_bf16(residual, N), a.out = (void *)a.residual;
  RUN(w8a8_linear_quantize, a);
  compare_bf16("w8a8_linear_quantize", a.out, wanted, N, BF16, 1e-4);
  compare_rows("its rows", a.next_values, a.next_scales, rows, ROWS, COLUMNS, BF16);
  free(wanted), free(rows);
}

static void check_sampler_step(void) {
  enum { N = 700 };
  float *x = numbers(N, 100, 0.25f), *velocity = numbers(N, 60, 0.25f), *before = numbers(N, 50, 0.5f);
  const float c[7] = {1, 1, -0.75f, 0.5f, 0.625f, -0.125f, 0};
  NEW(double, wanted, N);
  NEW(double, clean, N);
  sana_edge_sampler_step_args a = {0};
  int i;
  for (i = 0; i < N; i++) {
    clean[i] = x[i] - 0.75 * velocity[i];
    wanted[i] = 0.5 * x[i] + 0.625 * clean[i] - 0.125 * before[i];
  }
  a.x = sent(x, sizeof(float) * N), a.velocity = sent(velocity, sizeof(float) * N);
  a.before = sent(before, sizeof(float) * N), a.noise = out_floats(N), a.coefficients = sent(c, sizeof c);
  a.out = (void *)a.x, a.clean = (void *)a.before, a.size = N;
  RUN(sampler_step, a);
  compare_fp32("sampler_step", a.out, wanted, N, 1e-5);
  compare_fp32("its clean latent", a.clean, clean, N, 1e-5);
  free(wanted), free(clean);
}

/* state (IMAGES, HEADS, 33, 32) of ReLU(k) and v, whose rows are `stride` apart */
static void sum_state(const double *k, const double *v, int stride, double *state) {
  int image, t, h, d, e;
  memset(state, 0, sizeof *state * IMAGES * HEADS * 33 * 32);
  for (image = 0; image < IMAGES; image++)
    for (t = 0; t < TOKENS; t++)
      for (h = 0; h < HEADS; h++) {
        const double *key = k + (image * TOKENS + t) * stride + h * 32;
        const double *value = v + (image * TOKENS + t) * stride + h * 32;
        double *out = state + (image * HEADS + h) * 33 * 32;
        for (d = 0; d < 32; d++) {
          if (!(key[d] > 0)) continue;
          for (e = 0; e < 32; e++) out[d * 32 + e] += key[d] * value[e];
          out[32 * 32 + d] += key[d];
        }
      }
}

static void check_qkv_linear_attention(void) {
  enum { DEPTH = 48, COLUMNS = 3 * WIDTH, STATE = IMAGES * HEADS * 33 * 32 };
  /* sums of at most 48 * 2 * 2: bf16 has them exactly */
  int8_t *values = int8_numbers(ROWS * DEPTH, 2), *weight = int8_numbers(COLUMNS * DEPTH, 2);
  float *ones = constant(ROWS + COLUMNS, 1);
  NEW(double, qkv, ROWS * COLUMNS);
  NEW(double, state, STATE);
  NEW(double, q, ROWS * WIDTH);
  sana_edge_qkv_linear_attention_args a = {0};
  int i;
  multiply(values, weight, qkv, ROWS, COLUMNS, DEPTH);
  for (i = 0; i < ROWS * WIDTH; i++) {
    q[i] = qkv[i / WIDTH * COLUMNS + i % WIDTH];
    q[i] = q[i] > 0 ? q[i] : 0;
  }
  sum_state(qkv + WIDTH, qkv + 2 * WIDTH, COLUMNS, state);
  a.values = sent(values, ROWS * DEPTH), a.weight = sent(weight, COLUMNS * DEPTH);
  a.scales = sent(ones, sizeof(float) * ROWS), a.weight_scales = sent(ones, sizeof(float) * COLUMNS);
  a.q = out_values(ROWS * WIDTH * 2), a.state = out_floats(STATE);
  a.workspace_bytes = sana_edge_qkv_linear_attention_workspace(IMAGES, TOKENS, HEADS);
  a.workspace = zeros(a.workspace_bytes), a.images = IMAGES, a.tokens = TOKENS, a.heads = HEADS, a.depth = DEPTH;
  a.type = SANA_EDGE_BF16;
  /* twice: the workspace is left as it must be */
  for (i = 0; i < 2; i++) RUN(qkv_linear_attention, a);
  compare_bf16("qkv_linear_attention q", a.q, q, ROWS * WIDTH, 0, 1e-6);
  compare_fp32("qkv_linear_attention state", a.state, state, STATE, 1e-2);
  free(qkv), free(state), free(q);
}

static void check_qk_norm_linear_attention(void) {
  enum { COLUMNS = 3 * WIDTH, STATE = IMAGES * HEADS * 33 * 32 };
  float *qkv = numbers(ROWS * COLUMNS, 16, 0.25f), *norm = numbers(WIDTH, 6, 0.25f);
  NEW(double, wide, ROWS * COLUMNS);
  NEW(double, state, STATE);
  double roots[ROWS * 2];
  sana_edge_qk_norm_linear_attention_args a = {0};
  int row, n, part;
  for (row = 0; row < ROWS; row++) {
    double squares[2] = {0, 0};
    for (n = 0; n < 2 * WIDTH; n++) squares[n / WIDTH] += (double)qkv[row * COLUMNS + n] * qkv[row * COLUMNS + n];
    for (part = 0; part < 2; part++) roots[row * 2 + part] = 1 / sqrt(squares[part] / WIDTH + 1e-5);
    for (n = 0; n < COLUMNS; n++) wide[row * COLUMNS + n] = qkv[row * COLUMNS + n];
    for (n = 0; n < WIDTH; n++) wide[row * COLUMNS + WIDTH + n] *= roots[row * 2 + 1] * norm[n];
  }
  sum_state(wide + WIDTH, wide + 2 * WIDTH, COLUMNS, state);
  a.qkv = sent_bf16(qkv, ROWS * COLUMNS), a.norm_k = sent(norm, sizeof(float) * WIDTH);
  a.roots = out_floats(ROWS * 2), a.state = out_floats(STATE);
  a.workspace_bytes = sana_edge_qkv_linear_attention_workspace(IMAGES, TOKENS, HEADS);
  a.workspace = zeros(a.workspace_bytes), a.images = IMAGES, a.tokens = TOKENS, a.heads = HEADS;
  a.norm_eps = 1e-5f, a.type = SANA_EDGE_BF16;
  RUN(qk_norm_linear_attention, a);
  compare_fp32("qk_norm roots", a.roots, roots, ROWS * 2, 1e-6);
  /* keys may be rounded to bf16 for the product: of 75 terms of up to 6 each, half of them */
  {
    float *found = malloc(sizeof(float) * STATE);
    if (!found) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
    fetch(found, a.state, sizeof(float) * STATE);
    compare("qk_norm state", found, state, STATE, BF16, 75 * 6 * BF16 / 2);
    free(found);
  }
  free(wide), free(state);
}

static void check_linear_attention_finish(void) {
  enum { STATE = IMAGES * HEADS * 33 * 32, N = ROWS * WIDTH };
  float *q = numbers(N, 40, 0.125f), *state = numbers(STATE, 50, 0.5f);
  NEW(double, wanted, N);
  sana_edge_linear_attention_finish_args a = {0};
  int row, h, d, e;
  for (d = 0; d < STATE; d++) state[d] = fabsf(state[d]) + 1;
  for (row = 0; row < ROWS; row++)
    for (h = 0; h < HEADS; h++) {
      const float *part = state + (row / TOKENS * HEADS + h) * 33 * 32, *query = q + row * WIDTH + h * 32;
      double divisor = 1e-6;
      for (d = 0; d < 32; d++) divisor += (query[d] > 0 ? query[d] : 0) * part[32 * 32 + d];
      for (e = 0; e < 32; e++)
        for (d = 0; d < 32; d++)
          wanted[row * WIDTH + h * 32 + e] += (query[d] > 0 ? query[d] : 0) * part[d * 32 + e] / divisor;
    }
  a.q = sent_bf16(q, N), a.state = sent(state, sizeof(float) * STATE), a.values = out_values(N);
  a.scales = out_floats(ROWS), a.images = IMAGES, a.tokens = TOKENS, a.heads = HEADS, a.type = SANA_EDGE_BF16;
  a.q_stride = WIDTH, a.eps = 1e-6f;
  RUN(linear_attention_finish, a);
  compare_rows("linear_attention_finish", a.values, a.scales, wanted, ROWS, WIDTH, BF16);
  free(wanted);
}

static void check_cross_attention_quantize(void) {
  enum { CAPACITY = 48, KEYS = IMAGES * HEADS * CAPACITY * 32, N = ROWS * WIDTH };
  const int32_t lengths[IMAGES] = {1, 37};
  float *q = numbers(N, 8, 0.25f), *keys = numbers(KEYS, 6, 0.25f), *values = numbers(KEYS, 30, 0.25f);
  NEW(double, wanted, N);
  sana_edge_cross_attention_quantize_args a = {0};
  int row, h, d, key;
  for (row = 0; row < ROWS; row++)
    for (h = 0; h < HEADS; h++) {
      const int at = (row / TOKENS * HEADS + h) * CAPACITY * 32, count = lengths[row / TOKENS];
      double total = 0, weights[CAPACITY];
      for (key = 0; key < count; key++) {
        double score = 0;
        for (d = 0; d < 32; d++) score += (double)q[row * WIDTH + h * 32 + d] * keys[at + key * 32 + d];
        total += weights[key] = exp(score / sqrt(32));
      }
      for (d = 0; d < 32; d++)
        for (key = 0; key < count; key++)
          wanted[row * WIDTH + h * 32 + d] += weights[key] / total * values[at + d * CAPACITY + key];
    }
  a.q = sent_bf16(q, N), a.keys = sent_bf16(keys, KEYS), a.values_transposed = sent_bf16(values, KEYS);
  a.lengths = sent(lengths, sizeof lengths), a.values = out_values(N), a.scales = out_floats(ROWS);
  a.prompts = IMAGES, a.tokens = TOKENS, a.heads = HEADS, a.head_dim = 32, a.capacity = CAPACITY;
  a.type = SANA_EDGE_BF16;
  RUN(cross_attention_quantize, a);
  /* the numerators are rounded too */
  compare_rows("cross_attention_quantize", a.values, a.scales, wanted, ROWS, WIDTH, 2 * BF16);
  free(wanted);
}

static void check_dwconv_glu_quantize(void) {
  enum { HIDDEN = 48, N = ROWS * HIDDEN };
  float *x = numbers(ROWS * 2 * HIDDEN, 20, 0.25f), *weight = numbers(9 * 2 * HIDDEN, 4, 0.25f);
  float *bias = numbers(2 * HIDDEN, 4, 0.5f);
  NEW(double, wanted, N);
  sana_edge_dwconv_glu_quantize_args a = {0};
  int row, n, i, j, part;
  for (row = 0; row < ROWS; row++)
    for (n = 0; n < HIDDEN; n++) {
      const int y = row % TOKENS / ACROSS, z = row % ACROSS;
      double mixed[2];
      for (part = 0; part < 2; part++) {
        const int channel = part * HIDDEN + n;
        mixed[part] = bias[channel];
        for (i = -1; i <= 1; i++)
          for (j = -1; j <= 1; j++) {
            if (y + i < 0 || y + i >= HEIGHT || z + j < 0 || z + j >= ACROSS) continue;
            mixed[part] += (double)x[(row + i * ACROSS + j) * 2 * HIDDEN + channel] *
                           weight[((i + 1) * 3 + j + 1) * 2 * HIDDEN + channel];
          }
      }
      wanted[row * HIDDEN + n] = mixed[0] * mixed[1] / (1 + exp(-mixed[1]));
    }
  a.x = sent_bf16(x, ROWS * 2 * HIDDEN), a.weight = sent_bf16(weight, 9 * 2 * HIDDEN);
  a.bias = sent(bias, sizeof(float) * 2 * HIDDEN), a.values = out_values(N), a.scales = out_floats(ROWS);
  a.images = IMAGES, a.height = HEIGHT, a.width = ACROSS, a.hidden = HIDDEN, a.type = SANA_EDGE_BF16;
  RUN(dwconv_glu_quantize, a);
  compare_rows("dwconv_glu_quantize", a.values, a.scales, wanted, ROWS, HIDDEN, BF16);
  free(wanted);
}

static void check_patch_embed(void) {
  enum { CHANNELS = 32, COPIES = 2, N = IMAGES * TOKENS * WIDTH };
  float *latent = numbers(IMAGES * CHANNELS * TOKENS, 30, 0.125f), *weight = numbers(CHANNELS * WIDTH, 10, 0.125f);
  float *bias = numbers(WIDTH, 9, 0.5f), *positions = numbers(TOKENS * WIDTH, 9, 0.25f);
  NEW(double, wanted, COPIES * N);
  sana_edge_patch_embed_args a = {0};
  int i, c;
  for (i = 0; i < N; i++) {
    const int image = i / (TOKENS * WIDTH), t = i / WIDTH % TOKENS, n = i % WIDTH;
    double y = bias[n] + positions[t * WIDTH + n];
    for (c = 0; c < CHANNELS; c++)
      y += (double)latent[(image * CHANNELS + c) * TOKENS + t] * weight[c * WIDTH + n];
    wanted[i] = wanted[N + i] = y;
  }
  a.latent = sent(latent, sizeof(float) * IMAGES * CHANNELS * TOKENS);
  a.weight = sent(weight, sizeof(float) * CHANNELS * WIDTH), a.bias = sent(bias, sizeof(float) * WIDTH);
  a.positions = sent(positions, sizeof(float) * TOKENS * WIDTH), a.out = out_values(COPIES * N * 2);
  a.images = IMAGES, a.copies = COPIES, a.channels = CHANNELS, a.height = HEIGHT, a.width = ACROSS;
  a.columns = WIDTH, a.type = SANA_EDGE_BF16;
  RUN(patch_embed, a);
  compare_bf16("patch_embed", a.out, wanted, COPIES * N, BF16, 1e-4);
  free(wanted);
}

static void check_velocity_head(void) {
  /* one image, predicted twice */
  enum { CHANNELS = 32, N = CHANNELS * TOKENS };
  float *x = numbers(ROWS * WIDTH, 60, 0.25f), *scale = numbers(WIDTH, 8, 0.25f), *shift = numbers(WIDTH, 5, 0.5f);
  float *weight = numbers(CHANNELS * WIDTH, 8, 0.125f), *bias = numbers(CHANNELS, 9, 0.5f), guidance = 4.5f;
  double row[WIDTH];
  NEW(double, wanted, N);
  sana_edge_velocity_head_args a = {0};
  int image, t, c, n;
  for (image = 0; image < 2; image++)
    for (t = 0; t < TOKENS; t++) {
      normed(x + (image * TOKENS + t) * WIDTH, scale, shift, row, WIDTH, 1e-6);
      for (c = 0; c < CHANNELS; c++) {
        double y = bias[c];
        for (n = 0; n < WIDTH; n++) y += row[n] * weight[c * WIDTH + n];
        wanted[c * TOKENS + t] += (image ? guidance : 1 - guidance) * y;
      }
    }
  a.x = sent_bf16(x, ROWS * WIDTH), a.scale = sent(scale, sizeof(float) * WIDTH);
  a.shift = sent(shift, sizeof(float) * WIDTH), a.weight = sent(weight, sizeof(float) * CHANNELS * WIDTH);
  a.bias = sent(bias, sizeof(float) * CHANNELS), a.guidance = sent(&guidance, sizeof guidance);
  a.out = out_floats(N), a.images = 1, a.tokens = TOKENS, a.columns = WIDTH, a.channels = CHANNELS, a.eps = 1e-6f;
  a.type = SANA_EDGE_BF16;
  RUN(velocity_head, a);
  compare_fp32("velocity_head", a.out, wanted, N, 1e-2);
  free(wanted);
}

static void check_w8a8_conv2d(void) {
  enum { DEPTH = 32, COLUMNS = 48, N = ROWS * COLUMNS };
  int8_t *values = int8_numbers(ROWS * DEPTH, 90), *weight = int8_numbers(COLUMNS * 9 * DEPTH, 90);
  float *weight_scales = constant(COLUMNS, 0.015625f), *bias = numbers(COLUMNS, 9, 0.5f), scale = 0.015625f;
  float *norm = numbers(COLUMNS, 8, 0.25f), *norm_bias = numbers(COLUMNS, 4, 0.5f), *residual = numbers(N, 50, 0.25f);
  NEW(double, wanted, N);
  sana_edge_w8a8_conv2d_args a = {0};
  int row, n, i, j, k;
  for (row = 0; row < ROWS; row++) {
    const int y = row % TOKENS / ACROSS, z = row % ACROSS;
    double squares = 0;
    for (n = 0; n < COLUMNS; n++) {
      double sum = 0;
      for (i = -1; i <= 1; i++)
        for (j = -1; j <= 1; j++) {
          if (y + i < 0 || y + i >= HEIGHT || z + j < 0 || z + j >= ACROSS) continue;
          for (k = 0; k < DEPTH; k++)
            sum += values[(row + i * ACROSS + j) * DEPTH + k] * weight[(n * 9 + (i + 1) * 3 + j + 1) * DEPTH + k];
        }
      sum = sum * scale * weight_scales[n] + bias[n];
      wanted[row * COLUMNS + n] = sum > 0 ? sum : 0;
      squares += wanted[row * COLUMNS + n] * wanted[row * COLUMNS + n];
    }
    for (n = 0; n < COLUMNS; n++)
      wanted[row * COLUMNS + n] = wanted[row * COLUMNS + n] / sqrt(squares / COLUMNS + 1e-5) * norm[n] +
                                  norm_bias[n] + residual[row * COLUMNS + n];
  }
  a.values = sent(values, ROWS * DEPTH), a.scale = sent(&scale, sizeof scale);
  a.weight = sent(weight, COLUMNS * 9 * DEPTH), a.weight_scales = sent(weight_scales, sizeof(float) * COLUMNS);
  a.bias = sent(bias, sizeof(float) * COLUMNS), a.norm_weight = sent(norm, sizeof(float) * COLUMNS);
  a.norm_bias = sent(norm_bias, sizeof(float) * COLUMNS), a.residual = sent_bf16(residual, N);
  a.out = (void *)a.residual, a.images = IMAGES, a.height = HEIGHT, a.width = ACROSS, a.depth = DEPTH;
  a.columns = COLUMNS, a.kernel = 3, a.activation = SANA_EDGE_RELU, a.repeats = 1, a.norm_eps = 1e-5f;
  a.type = SANA_EDGE_BF16;
  RUN(w8a8_conv2d, a);
  compare_bf16("w8a8_conv2d", a.out, wanted, N, BF16, 1e-4);
  free(wanted);
}

static void check_norm_add_quantize(void) {
  enum { N = ROWS * WIDTH };
  float *y = numbers(N, 60, 0.25f), *x = numbers(N + 1, 50, 0.25f) + 1, *weight = numbers(WIDTH, 8, 0.25f);
  float *bias = numbers(WIDTH, 5, 0.5f);
  NEW(double, wanted, N);
  sana_edge_norm_add_quantize_args a = {0};
  int row, n;
  for (row = 0; row < ROWS; row++) {
    double squares = 0;
    for (n = 0; n < WIDTH; n++) squares += (double)y[row * WIDTH + n] * y[row * WIDTH + n];
    for (n = 0; n < WIDTH; n++)
      wanted[row * WIDTH + n] =
          y[row * WIDTH + n] / sqrt(squares / WIDTH + 1e-5) * weight[n] + bias[n] + x[row * WIDTH + n];
  }
  a.y = sent_bf16(y, N), a.x = sent_bf16(x, N), a.weight = sent(weight, sizeof(float) * WIDTH);
  a.bias = sent(bias, sizeof(float) * WIDTH), a.out = (void *)a.x, a.values = out_values(N);
  a.scales = out_floats(ROWS), a.rows = ROWS, a.columns = WIDTH, a.eps = 1e-5f, a.type = SANA_EDGE_BF16;
  RUN(norm_add_quantize, a);
  compare_bf16("norm_add_quantize", a.out, wanted, N, BF16, 1e-4);
  compare_rows("norm_add_quantize, INT8", a.values, a.scales, wanted, ROWS, WIDTH, BF16);
  free(wanted);
}

static void check_tensor_scale(void) {
  float *x = numbers(ROWS * WIDTH, 60, 0.25f);
  double wanted = 0;
  sana_edge_tensor_scale_args a = {0};
  int i;
  for (i = 0; i < ROWS * WIDTH; i++)
    if (fabs(x[i]) / 127 > wanted) wanted = fabs(x[i]) / 127;
  a.x = sent_bf16(x, ROWS * WIDTH), a.scale = out_floats(1);
  a.workspace_bytes = sana_edge_qkv_linear_attention_workspace(1, 1, 1);
  a.workspace = zeros(a.workspace_bytes), a.rows = ROWS, a.columns = WIDTH, a.type = SANA_EDGE_BF16;
  /* twice: the workspace is left as it must be */
  for (i = 0; i < 2; i++) RUN(tensor_scale, a);
  compare_fp32("tensor_scale", a.scale, &wanted, 1, 1e-6);
}

/* depthwise 5x5 of all channels of a map (TOKENS, columns) */
static void mix_depthwise(const float *map, const float *taps, double *out, int columns) {
  int t, c, i, j;
  for (t = 0; t < TOKENS; t++)
    for (c = 0; c < columns; c++) {
      double sum = 0;
      for (i = -2; i <= 2; i++)
        for (j = -2; j <= 2; j++) {
          const int y = t / ACROSS + i, x = t % ACROSS + j;
          if (y < 0 || y >= HEIGHT || x < 0 || x >= ACROSS) continue;
          sum += (double)map[(y * ACROSS + x) * columns + c] * taps[((i + 2) * 5 + j + 2) * columns + c];
        }
      out[t * columns + c] = sum;
    }
}

static void check_multiscale_linear_attention(void) {
  enum { COLUMNS = 3 * WIDTH, STATE = IMAGES * 2 * HEADS * 33 * 32, N = ROWS * 2 * WIDTH };
  float *qkv = numbers(ROWS * COLUMNS, 16, 0.25f), *taps = numbers(25 * COLUMNS, 6, 0.03125f);
  float *weight = numbers(COLUMNS * 32, 6, 0.03125f);
  NEW(double, deep, TOKENS * COLUMNS);
  NEW(double, q, N);
  NEW(double, state, STATE);
  sana_edge_multiscale_linear_attention_args a = {0};
  int image, t, scale, h, d, e, i;
  for (image = 0; image < IMAGES; image++) {
    mix_depthwise(qkv + image * TOKENS * COLUMNS, taps, deep, COLUMNS);
    for (t = 0; t < TOKENS; t++)
      for (scale = 0; scale < 2; scale++)
        for (h = 0; h < HEADS; h++) {
          double group[96], *sums = state + ((image * 2 + scale) * HEADS + h) * 33 * 32;
          for (d = 0; d < 96; d++) {
            group[d] = scale ? 0 : qkv[(image * TOKENS + t) * COLUMNS + h * 96 + d];
            for (i = 0; scale && i < 32; i++)
              group[d] += deep[t * COLUMNS + h * 96 + d / 32 * 32 + i] * weight[(h * 96 + d) * 32 + i];
          }
          for (d = 0; d < 32; d++) {
            const double key = group[32 + d] > 0 ? group[32 + d] : 0;
            q[((image * TOKENS + t) * 2 + scale) * WIDTH + h * 32 + d] = group[d];
            for (e = 0; e < 32; e++) sums[d * 32 + e] += key * group[64 + e];
            sums[32 * 32 + d] += key;
          }
        }
  }
  a.qkv = sent_bf16(qkv, ROWS * COLUMNS), a.depthwise = sent(taps, sizeof(float) * 25 * COLUMNS);
  a.pointwise = sent(weight, sizeof(float) * COLUMNS * 32), a.q = out_values(N * 2), a.state = out_floats(STATE);
  a.workspace_bytes = sana_edge_qkv_linear_attention_workspace(IMAGES, TOKENS, 2 * HEADS);
  a.workspace = zeros(a.workspace_bytes), a.images = IMAGES, a.height = HEIGHT, a.width = ACROSS, a.heads = HEADS;
  a.type = SANA_EDGE_BF16;
  for (i = 0; i < 2; i++) RUN(multiscale_linear_attention, a);
  compare_bf16("multiscale q", a.q, q, N, BF16, 1e-4);
  compare_fp32("multiscale state", a.state, state, STATE, 1e-2);
  free(deep), free(q), free(state);
}

/* rows in two digits give the numbers to half a step of the low one, and to sums in fp32 before it */
static void compare_digits(const char *what, const void *there, const void *gpu_steps, const double *wanted,
                           int rows, int columns) {
  int8_t *digits = malloc((size_t)rows * 2 * columns);
  float *steps = malloc(rows * sizeof *steps), *found = malloc((size_t)rows * columns * sizeof *found);
  double largest = 0;
  int i;
  if (!digits || !steps || !found) stop("memory", SANA_EDGE_OUT_OF_MEMORY);
  fetch(digits, there, (size_t)rows * 2 * columns);
  fetch(steps, gpu_steps, rows * sizeof *steps);
  for (i = 0; i < rows * columns; i++) {
    const int8_t *row = digits + i / columns * 2 * columns + i % columns;
    found[i] = (254.0f * row[0] + row[columns]) * steps[i / columns];
    if (fabs(wanted[i]) > largest) largest = fabs(wanted[i]);
  }
  compare(what, found, wanted, (size_t)rows * columns, SUMS, largest * (0.51 / 32258 + SUMS));
  free(digits), free(steps), free(found);
}

static double gelu(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / acos(-1.0)) * (x + 0.044715 * x * x * x))); }

static void check_quantize_digits(void) {
  enum { N = ROWS * WIDTH };
  float *x = numbers(2 * N, 100, 0.0625f);
  double wanted[N];
  sana_edge_quantize_digits_args a = {0};
  int i;
  for (i = 0; i < N; i++) {
    const float *gate = x + i / WIDTH * 2 * WIDTH + i % WIDTH;
    wanted[i] = gelu(gate[0]) * gate[WIDTH];
  }
  a.x = sent(x, sizeof(float) * 2 * N), a.digits = out_values(2 * N), a.steps = out_floats(ROWS);
  a.rows = ROWS, a.columns = WIDTH, a.gated = 1;
  RUN(quantize_digits, a);
  compare_digits("quantize_digits", a.digits, a.steps, wanted, ROWS, WIDTH);
}

/* x / sqrt(mean of squares + eps) * weight, of a row */
static void rms_normed(const double *x, const float *weight, double *out, int columns, double eps) {
  double squares = 0;
  int n;
  for (n = 0; n < columns; n++) squares += x[n] * x[n] / columns;
  for (n = 0; n < columns; n++) out[n] = x[n] / sqrt(squares + eps) * weight[n];
}

static void check_add_norm_digits(void) {
  enum { N = ROWS * WIDTH };
  float *x = numbers(N, 60, 0.25f), *y = numbers(N, 90, 0.5f), *post = numbers(WIDTH, 8, 0.25f);
  float *weight = numbers(WIDTH, 5, 0.5f);
  NEW(double, total, N);
  NEW(double, wanted, N);
  sana_edge_add_norm_digits_args a = {0};
  int row, n;
  for (row = 0; row < ROWS; row++) {
    double wide[WIDTH], *sum = total + row * WIDTH;
    for (n = 0; n < WIDTH; n++) wide[n] = y[row * WIDTH + n];
    rms_normed(wide, post, sum, WIDTH, 1e-6);
    for (n = 0; n < WIDTH; n++) sum[n] += x[row * WIDTH + n];
    rms_normed(sum, weight, wanted + row * WIDTH, WIDTH, 1e-6);
  }
  a.x = sent(x, sizeof(float) * N), a.y = sent(y, sizeof(float) * N);
  a.post_weight = sent(post, sizeof(float) * WIDTH), a.weight = sent(weight, sizeof(float) * WIDTH);
  a.total = out_floats(N), a.digits = out_values(2 * N), a.steps = out_floats(ROWS);
  a.rows = ROWS, a.columns = WIDTH, a.eps = 1e-6f;
  RUN(add_norm_digits, a);
  compare_fp32("add_norm_digits total", a.total, total, N, 1e-4);
  compare_digits("add_norm_digits", a.digits, a.steps, wanted, ROWS, WIDTH);
  free(total), free(wanted);
}

static void check_w8a16_linear(void) {
  enum { COLUMNS = 136, DEPTH = 80, PAIRS = 16, ROTATED = 96, N = ROWS * COLUMNS };
  int8_t *digits = int8_numbers(ROWS * 2 * DEPTH, 100), *weight = int8_numbers(COLUMNS * DEPTH, 90);
  float *steps = constant(ROWS, 0.03125f / 256), *weight_scales = constant(COLUMNS, 0.015625f);
  float *bias = numbers(COLUMNS, 9, 0.5f), *rotation = numbers(TOKENS * PAIRS * 2, 8, 0.125f);
  NEW(double, both, 2 * N);
  NEW(double, wanted, N);
  sana_edge_w8a16_linear_args a = {0};
  int i, row, n;
  multiply(digits, weight, both, 2 * ROWS, COLUMNS, DEPTH);
  for (i = 0; i < N; i++) {
    const double *high = both + i / COLUMNS * 2 * COLUMNS + i % COLUMNS;
    wanted[i] = (254 * high[0] + high[COLUMNS]) * 0.03125 / 256 * 0.015625 + bias[i % COLUMNS];
  }
  for (row = 0; row < ROWS; row++)
    for (n = 0; n < ROTATED; n += 2) {
      const float *angle = rotation + (row % TOKENS * PAIRS + n / 2 % PAIRS) * 2;
      double *pair = wanted + row * COLUMNS + n;
      const double first = pair[0];
      pair[0] = first * angle[0] - pair[1] * angle[1];
      pair[1] = pair[1] * angle[0] + first * angle[1];
    }
  a.digits = sent(digits, ROWS * 2 * DEPTH), a.weight = sent(weight, COLUMNS * DEPTH);
  a.steps = sent(steps, sizeof(float) * ROWS), a.weight_scales = sent(weight_scales, sizeof(float) * COLUMNS);
  a.bias = sent(bias, sizeof(float) * COLUMNS), a.rotation = sent(rotation, sizeof(float) * TOKENS * PAIRS * 2);
  a.out = out_floats(N), a.rows = ROWS, a.columns = COLUMNS, a.depth = DEPTH, a.tokens = TOKENS;
  a.pairs = PAIRS, a.rotated = ROTATED;
  RUN(w8a16_linear, a);
  compare_fp32("w8a16_linear", a.out, wanted, N, 1e-3);
  free(both), free(wanted);
}

static void check_soft_capped_attention(void) {
  enum { QUERIES = 2 * HEADS, CAPACITY = 40, KNOWN = 37, WINDOW = 50, WIDE = (QUERIES + 2 * HEADS) * 32 };
  enum { N = ROWS * QUERIES * 32, KEYS = HEADS * CAPACITY * 32 };
  float *qkv = numbers(ROWS * WIDE, 8, 0.25f), *keys = numbers(KEYS, 6, 0.25f), *values = numbers(KEYS, 30, 0.25f);
  const int32_t known = KNOWN;
  NEW(double, wanted, N);
  sana_edge_soft_capped_attention_args a = {0};
  int row, h, at, d;
  for (row = 0; row < ROWS; row++)
    for (h = 0; h < QUERIES; h++) {
      const int token = row % TOKENS, kv = h / 2, first = KNOWN + token - WINDOW + 1;
      double total = 0, *out = wanted + (row * QUERIES + h) * 32;
      for (at = first < 0 ? 0 : first; at <= KNOWN + token; at++) {
        const float *own = qkv + (row - token + at - KNOWN) * WIDE + (QUERIES + kv) * 32;
        const float *k = at < KNOWN ? keys + (kv * CAPACITY + at) * 32 : own;
        const float *v = at < KNOWN ? values + (kv * CAPACITY + at) * 32 : own + HEADS * 32;
        double score = 0, weight;
        for (d = 0; d < 32; d++) score += (double)qkv[row * WIDE + h * 32 + d] * k[d];
        weight = exp(5 * tanh(score / sqrt(32) / 5));
        total += weight;
        for (d = 0; d < 32; d++) out[d] += weight * v[d];
      }
      for (d = 0; d < 32; d++) out[d] /= total;
    }
  a.qkv = sent(qkv, sizeof(float) * ROWS * WIDE), a.prefix_keys = sent_bf16(keys, KEYS);
  a.prefix_values = sent_bf16(values, KEYS), a.known = sent(&known, sizeof known), a.out = out_floats(N);
  a.prompts = IMAGES, a.tokens = TOKENS, a.heads = QUERIES, a.kv_heads = HEADS, a.head_dim = 32;
  a.capacity = CAPACITY, a.window = WINDOW, a.type = SANA_EDGE_BF16, a.scale = (float)(1 / sqrt(32)), a.cap = 5;
  RUN(soft_capped_attention, a);
  compare_fp32("soft_capped_attention", a.out, wanted, N, 1e-4);
  free(wanted);
}

int main(void) {
  sana_edge_device_info device;
  const sana_edge_status status = sana_edge_device(0, &device);
  if (sana_edge_abi() != SANA_EDGE_ABI) {
    fprintf(stderr, "error: the library has interface %d, the header %d\n", sana_edge_abi(), SANA_EDGE_ABI);
    return 1;
  }
  if (status != SANA_EDGE_OK) stop("device 0", status);
  check_quantize_rows();
  check_norm_modulate_quantize();
  check_w8a8_linear();
  check_w8a8_linear_quantize();
  check_sampler_step();
  check_qkv_linear_attention();
  check_qk_norm_linear_attention();
  check_linear_attention_finish();
  check_cross_attention_quantize();
  check_dwconv_glu_quantize();
  check_patch_embed();
  check_velocity_head();
  check_w8a8_conv2d();
  check_norm_add_quantize();
  check_tensor_scale();
  check_multiscale_linear_attention();
  check_quantize_digits();
  check_add_norm_digits();
  check_w8a16_linear();
  check_soft_capped_attention();
  printf("compute capability %d.%d, %d wrong\n", device.capability / 10, device.capability % 10, failures);
  return failures ? 1 : 0;
}
