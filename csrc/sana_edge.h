/* The C interface of sana-edge's CUDA kernels: SANA's operations in INT8, on raw device memory.
 *
 * Every operation takes a struct and a stream (a cudaStream_t as void *; NULL is the default stream), checks what
 * can be checked without reading device memory, starts its kernels and returns without waiting. Nothing is
 * allocated. Pointers are to memory of the current device; matrices are row-major without gaps unless a stride is
 * named; "may be NULL" stands where that is so. Addresses of matrices are multiples of 16 bytes, and so are the
 * bytes of a row and, of products, gates and constants. A call with no rows does nothing. What each
 * operation computes, and in which order it rounds, says the function of the same name in kernels/reference.py;
 * sums over rows and channels are made in a fixed order, so that the same input gives the same bytes.
 *
 * Activations x are of one 16-bit type (or fp32 where that is said), INT8 activations have an fp32 scale per row,
 * weights are INT8 (out, in) with an fp32 scale per output channel. Vectors (bias, gate, norms) are fp32.
 * "per image" vectors: ``tokens`` consecutive rows share one; image i has it at pointer + i * stride floats, so
 * stride 0 is one for all.
 */
#ifndef SANA_EDGE_H
#define SANA_EDGE_H

#include <stdint.h>

#ifdef _WIN32
#ifdef SANA_EDGE_BUILDING
#define SANA_EDGE_API __declspec(dllexport)
#else
#define SANA_EDGE_API __declspec(dllimport)
#endif
#else
#define SANA_EDGE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* changes whenever a struct or a meaning does: a caller compares it with sana_edge_abi() */
#define SANA_EDGE_ABI 3

typedef enum {
  SANA_EDGE_OK = 0,
  SANA_EDGE_NULL_POINTER = 1,       /* a pointer that is needed is NULL */
  SANA_EDGE_BAD_SHAPE = 2,          /* a size is negative, too large, or does not suit another */
  SANA_EDGE_BAD_ALIGNMENT = 3,      /* an address or a row is not a multiple of 16 bytes */
  SANA_EDGE_BAD_TYPE = 4,           /* a data type that the operation does not have */
  SANA_EDGE_WORKSPACE = 5,          /* the workspace is smaller than asked for */
  SANA_EDGE_UNSUPPORTED_DEVICE = 6, /* the GPU is older than compute capability 7.5, lacks shared memory, or bf16 */
  SANA_EDGE_NO_DEVICE = 7,          /* no GPU, or no driver */
  SANA_EDGE_OLD_DRIVER = 8,         /* the driver is older than the CUDA runtime in this library */
  SANA_EDGE_OUT_OF_MEMORY = 9,
  SANA_EDGE_DEVICE_LOST = 10,       /* an earlier kernel failed, or the GPU is gone: the process must end */
  SANA_EDGE_LAUNCH_FAILED = 11
} sana_edge_status;

typedef enum { SANA_EDGE_FP32 = 0, SANA_EDGE_FP16 = 1, SANA_EDGE_BF16 = 2 } sana_edge_type;

/* ---- the library ---- */

SANA_EDGE_API int sana_edge_abi(void);
/* version of sana-edge that it was built from */
SANA_EDGE_API const char *sana_edge_version(void);
/* architectures in it, as "75 80 86 89 90 ptx90 120" */
SANA_EDGE_API const char *sana_edge_architectures(void);
/* what a status means, in English, never NULL */
SANA_EDGE_API const char *sana_edge_status_text(int status);
/* 0, or the architecture that the CPU emulator stands for, when it was built for tests */
SANA_EDGE_API int sana_edge_emulated(void);

typedef struct {
  int32_t capability;    /* 89 for compute capability 8.9 */
  int32_t processors;    /* streaming multiprocessors */
  int32_t shared_memory; /* bytes that a block can have */
} sana_edge_device_info;

/* what a device is; also tells whether this library can run on it */
SANA_EDGE_API sana_edge_status sana_edge_device(int device, sana_edge_device_info *out);

/* ---- rows to INT8 ---- */

/* x (rows, columns) to values and scales: absmax / 127 of each row, or static_scale for all */
typedef struct {
  const void *x;
  const float *static_scale; /* one number; may be NULL */
  int8_t *values;
  float *scales;
  int64_t rows;
  int32_t columns; /* a multiple of 16, at most 16384 */
  int32_t type;    /* fp32, fp16, bf16 */
} sana_edge_quantize_rows_args;
SANA_EDGE_API sana_edge_status sana_edge_quantize_rows(const sana_edge_quantize_rows_args *, void *stream);

/* LayerNorm without weights, * scale + shift, rows to INT8 */
typedef struct {
  const void *x;       /* (rows, columns) */
  const float *scale;  /* per image, (columns); the 1 of 1 + scale is in it */
  const float *shift;  /* per image, (columns) */
  const float *static_scale; /* may be NULL */
  int8_t *values;
  float *scales;
  int64_t rows;
  int32_t columns; /* a multiple of 16, at most 8192 */
  int32_t tokens;
  int64_t stride; /* of scale and of shift */
  float eps;
  int32_t type; /* fp32, fp16, bf16 */
} sana_edge_norm_modulate_quantize_args;
SANA_EDGE_API sana_edge_status sana_edge_norm_modulate_quantize(const sana_edge_norm_modulate_quantize_args *,
                                                                 void *stream);

/* ---- products ---- */

/* out = residual + gate * clip(silu(values weight^T * scales * weight_scales + bias)) + constant */
typedef struct {
  const int8_t *values;       /* (rows, depth) */
  const float *scales;        /* (rows) */
  const int8_t *weight;       /* (columns, depth) */
  const float *weight_scales; /* (columns) */
  const float *bias;          /* (columns); may be NULL */
  const float *gate;          /* per image, (columns); may be NULL */
  const void *residual;       /* (rows, columns); may be NULL, may be out */
  const float *constant;      /* per image, (columns), added last; may be NULL */
  void *out;                  /* (rows, columns) */
  int64_t rows;
  int32_t columns; /* a multiple of 8 */
  int32_t depth;   /* a multiple of 16, at most 131071 */
  int32_t tokens;  /* rows of an image; used with gate and constant */
  int32_t type;    /* of residual and out: fp16, bf16 */
  int64_t gate_stride;
  int64_t constant_stride;
  float limit;  /* clips to +-limit; 0 leaves it out */
  int32_t silu; /* 1 applies it */
  int32_t tile; /* of sana_edge_w8a8_linear_tiles; 0 is the first of them. The result is the same. */
} sana_edge_w8a8_linear_args;
SANA_EDGE_API sana_edge_status sana_edge_w8a8_linear(const sana_edge_w8a8_linear_args *, void *stream);

/* A product made in tiles, and the clocks that it takes on a device by counting, of the SM with the most tiles:
 * csrc/tile_times.h, without a GPU. A tile is all results of ``rows`` by ``columns``. */
typedef struct {
  int64_t count;         /* tiles of the product */
  int32_t rows;
  int32_t columns;
  int32_t depth;         /* of the product */
  int32_t warps_down;
  int32_t warps_across;
  int32_t stages;        /* tiles of both operands in shared memory, 64 deep */
  int32_t instructions;  /* of a warp for 32 results, behind the sums */
  int32_t moved;         /* bytes of a result that are read and written behind the sums */
} sana_edge_tile;
typedef struct {
  int32_t tile;     /* for sana_edge_w8a8_linear_args */
  int32_t rows;
  int32_t columns;
  int32_t resident; /* blocks that are on an SM together */
  int64_t rounds;   /* tiles of the SM that has most */
  double products;  /* of a tile, on tensor cores */
  double l2;        /* of a tile, the operands */
  double shared;    /* of a tile, what its warps read and its copies write */
  double epilogue;  /* of a tile, behind the sums */
  double total;
} sana_edge_tile_time;
SANA_EDGE_API sana_edge_status sana_edge_time_tile(const sana_edge_tile *, const sana_edge_device_info *,
                                                   sana_edge_tile_time *out);
/* the tiles that a device has room for, that which is chosen first; writes at most 4, says how many */
SANA_EDGE_API int32_t sana_edge_w8a8_linear_tiles(const sana_edge_w8a8_linear_args *, const sana_edge_device_info *,
                                                  sana_edge_tile_time *out);

/* out as above, without SiLU; then out's rows to INT8, after LayerNorm, * scale + shift, or as they are */
typedef struct {
  const int8_t *values;       /* (rows, depth) */
  const float *scales;        /* (rows) */
  const int8_t *weight;       /* (columns, depth) */
  const float *weight_scales; /* (columns) */
  const float *bias;          /* (columns); may be NULL */
  const float *gate;          /* per image, (columns); may be NULL */
  const void *residual;       /* (rows, columns); may be NULL, may be out */
  const float *constant;      /* per image, (columns), added last; may be NULL */
  const float *scale;         /* per image, (columns); the 1 of 1 + scale is in it; NULL where no row is normalised */
  const float *shift;         /* per image, (columns); NULL where scale is */
  const float *static_scale;  /* of rows that are normalised; may be NULL */
  const float *plain_static_scale; /* of the others; may be NULL */
  void *out;                  /* (rows, columns) */
  int8_t *next_values;        /* (rows, columns) */
  float *next_scales;         /* (rows) */
  void *workspace;            /* that of qkv_linear_attention, of any sizes */
  int64_t workspace_bytes;
  int64_t rows;
  int64_t gate_stride;
  int64_t constant_stride;
  int64_t scale_stride;
  int64_t shift_stride;
  int32_t columns; /* a multiple of 16, at most 2304 */
  int32_t depth;   /* a multiple of 16, at most 131071 */
  int32_t tokens;  /* rows of an image */
  int32_t type;    /* of residual and out: fp16, bf16 */
  int32_t plain_first; /* images whose rows are not normalised: this one and those up to plain_end */
  int32_t plain_end;
  float limit; /* clips to +-limit; 0 leaves it out */
  float eps;
  int32_t tile; /* as above */
} sana_edge_w8a8_linear_quantize_args;
SANA_EDGE_API sana_edge_status sana_edge_w8a8_linear_quantize(const sana_edge_w8a8_linear_quantize_args *,
                                                              void *stream);

/* ---- ReLU linear attention, heads of 32 ---- */

/* q, k, v = values weight^T * ... + bias; writes ReLU(q) and of every head sum ReLU(k)^T v and sum ReLU(k) */
typedef struct {
  const int8_t *values;       /* (images * tokens, depth) */
  const float *scales;        /* (images * tokens) */
  const int8_t *weight;       /* (3 * heads * 32, depth): all of q, then k, then v */
  const float *weight_scales; /* (3 * heads * 32) */
  const float *bias;          /* (3 * heads * 32); may be NULL */
  void *q;                    /* out: (images * tokens, heads * 32) */
  float *state;               /* out: (images, heads, 33, 32): row d of 32 is sum ReLU(k_d) v, row 32 sum ReLU(k) */
  void *workspace;            /* zeros before its first use; it is zeros where that matters after every use */
  int64_t workspace_bytes;
  int32_t images;
  int32_t tokens;
  int32_t heads;
  int32_t depth; /* a multiple of 16 */
  int32_t type;  /* fp16, bf16; k and v are rounded to it too */
} sana_edge_qkv_linear_attention_args;
SANA_EDGE_API int64_t sana_edge_qkv_linear_attention_workspace(int32_t images, int32_t tokens, int32_t heads);
SANA_EDGE_API sana_edge_status sana_edge_qkv_linear_attention(const sana_edge_qkv_linear_attention_args *,
                                                              void *stream);

/* the same sums for models with RMSNorm over all heads of q and of k, from what w8a8_linear made */
typedef struct {
  const void *qkv;     /* (images * tokens, 3 * heads * 32) */
  const float *norm_k; /* (heads * 32), weights of k's norm */
  float *roots;        /* out: (images * tokens, 2), 1 / rms of q and of k */
  float *state;        /* out: as above */
  void *workspace;     /* as above, and of the same size */
  int64_t workspace_bytes;
  int32_t images;
  int32_t tokens;
  int32_t heads;
  float norm_eps;
  int32_t type; /* fp16, bf16 */
} sana_edge_qk_norm_linear_attention_args;
SANA_EDGE_API sana_edge_status sana_edge_qk_norm_linear_attention(const sana_edge_qk_norm_linear_attention_args *,
                                                                  void *stream);

/* (ReLU(q) state) / (ReLU(q) . sum ReLU(k) + eps), rounded to the type, rows to INT8 */
typedef struct {
  const void *q;      /* (images * tokens, heads * 32) with rows q_stride elements apart */
  const float *roots; /* (images * tokens, 2), the first of each row multiplies q; may be NULL */
  const float *norm_q; /* (heads * 32), multiplies q after that; NULL where roots is */
  const float *state; /* (images, heads, 33, 32) */
  const float *static_scale; /* may be NULL */
  int8_t *values;     /* (images * tokens, heads * 32) */
  float *scales;      /* (images * tokens) */
  int32_t images;
  int32_t tokens;
  int32_t heads; /* at most 256 */
  int32_t type;  /* fp16, bf16 */
  int64_t q_stride;
  float eps;
} sana_edge_linear_attention_finish_args;
SANA_EDGE_API sana_edge_status sana_edge_linear_attention_finish(const sana_edge_linear_attention_finish_args *,
                                                                 void *stream);

/* ---- cross-attention ---- */

/* softmax(q k^T / sqrt(head_dim)) v, rounded to the type, rows to INT8 */
typedef struct {
  const void *q;       /* (prompts * tokens, heads * head_dim) */
  const float *norm_q; /* (heads * head_dim), weights of an RMSNorm over all heads of q; may be NULL */
  const void *keys;    /* (prompts, heads, capacity, head_dim) */
  const void *values_transposed; /* (prompts, heads, head_dim, capacity), finite also beyond the length */
  const int32_t *lengths;        /* (prompts), in device memory: 1 to capacity keys count */
  const float *static_scale;     /* may be NULL */
  int8_t *values; /* (prompts * tokens, heads * head_dim) */
  float *scales;  /* (prompts * tokens) */
  int32_t prompts;
  int32_t tokens; /* of all images of a prompt */
  int32_t heads;  /* at most 16, 20 of 112; heads * head_dim is a multiple of 16 */
  int32_t head_dim; /* a multiple of 8, at most 128 */
  int32_t capacity; /* a multiple of 16 */
  int32_t type;     /* fp16, bf16 */
  float norm_eps;
} sana_edge_cross_attention_quantize_args;
SANA_EDGE_API sana_edge_status sana_edge_cross_attention_quantize(const sana_edge_cross_attention_quantize_args *,
                                                                   void *stream);

/* ---- the middle of the Mix-FFN ---- */

/* depthwise 3x3 of x, which SiLU has been applied to, + bias; value * SiLU(gate), rounded to the type, to INT8 */
typedef struct {
  const void *x;      /* (images, height, width, 2 * hidden): values, then gates */
  const void *weight; /* (3, 3, 2 * hidden), of the type */
  const float *bias;  /* (2 * hidden) */
  const float *static_scale; /* may be NULL */
  int8_t *values; /* (images, height, width, hidden) */
  float *scales;  /* (images, height, width) */
  int32_t images;
  int32_t height;
  int32_t width;
  int32_t hidden; /* a multiple of 16, at most 8192 */
  int32_t type;   /* fp16, bf16 */
} sana_edge_dwconv_glu_quantize_args;
SANA_EDGE_API sana_edge_status sana_edge_dwconv_glu_quantize(const sana_edge_dwconv_glu_quantize_args *,
                                                             void *stream);

/* ---- the denoiser's first and last layer ---- */

/* a latent's cells to tokens, each written ``copies`` times: out image c * images + i is of latent i */
typedef struct {
  const float *latent;    /* (images, channels, height, width); rounded to the type */
  const float *weight;    /* (channels, columns): the linear layer's weight transposed */
  const float *bias;      /* (columns) */
  const float *positions; /* (height * width, columns), added; may be NULL */
  void *out;              /* (copies * images, height * width, columns) */
  int32_t images;
  int32_t copies;
  int32_t channels; /* at most 256 */
  int32_t height;
  int32_t width;
  int32_t columns; /* a multiple of 8 */
  int32_t type;    /* fp16, bf16 */
} sana_edge_patch_embed_args;
SANA_EDGE_API sana_edge_status sana_edge_patch_embed(const sana_edge_patch_embed_args *, void *stream);

/* LayerNorm, * scale + shift, linear layer; with guidance g: u + g (c - u) of the halves u, c of x's images */
typedef struct {
  const void *x;         /* (images, tokens, columns); with guidance (2 * images, tokens, columns) */
  const float *scale;    /* per image of x, (columns) */
  const float *shift;    /* per image of x, (columns) */
  const float *weight;   /* (channels, columns) */
  const float *bias;     /* (channels) */
  const float *guidance; /* one number in device memory; may be NULL */
  float *out;            /* (images, channels, tokens) */
  int64_t stride;        /* of scale and of shift */
  int32_t images;
  int32_t tokens;
  int32_t columns;  /* a multiple of 16, at most 8192 */
  int32_t channels; /* at most 256 */
  float eps;
  int32_t type; /* fp16, bf16 */
} sana_edge_velocity_head_args;
SANA_EDGE_API sana_edge_status sana_edge_velocity_head(const sana_edge_velocity_head_args *, void *stream);

/* ---- the sampler ---- */

/* c of model_input, predict_x, predict_output, carry, clean, previous, noise: x0 = c1 x + c2 velocity is written to
 * clean, c3 x + c4 x0 + c5 before + c6 noise to out; before and noise count where their number is not 0 */
typedef struct {
  const float *x;            /* (size) */
  const float *velocity;     /* (size) */
  const float *before;       /* (size), clean of the step before */
  const float *noise;        /* (size) */
  const float *coefficients; /* (7) in device memory */
  float *out;                /* (size), may be x */
  float *clean;              /* (size), may be before */
  int64_t size;
} sana_edge_sampler_step_args;
SANA_EDGE_API sana_edge_status sana_edge_sampler_step(const sana_edge_sampler_step_args *, void *stream);

/* ---- the decoder's convolutions, channels last ---- */

typedef enum {
  SANA_EDGE_UPSAMPLE_NONE = 0,
  SANA_EDGE_UPSAMPLE_PHASES = 1, /* weight has the kernels (4, columns, 2, 2) of even and odd rows and columns */
  SANA_EDGE_UPSAMPLE_SHUFFLE = 2 /* weight has (4 * columns): channel 4 c + n goes to corner n of 2x2 pixels */
} sana_edge_upsample;

typedef enum { SANA_EDGE_IDENTITY = 0, SANA_EDGE_RELU = 1, SANA_EDGE_SILU = 2 } sana_edge_activation;

/* convolution of stride 1 with zero padding: y = activation(sums * scale * weight_scales + bias);
 * with norm_weight y is RMS-normalised over its channels, * norm_weight + norm_bias, then + residual;
 * upsampled, y gets shortcut channel (4 c + n) / repeats of the pixel that it came from; with out_norm_weight the
 * sum is RMS-normalised as well, out_activation(* out_norm_weight + out_norm_bias) */
typedef struct {
  const int8_t *values;       /* (images, height, width, depth) */
  const float *scale;         /* one number in device memory, of the whole map */
  const int8_t *weight;       /* (columns, kernel, kernel, depth), more of it where it upsamples */
  const float *weight_scales; /* of each of weight's output channels */
  const float *bias;          /* (columns), of SHUFFLE (4 * columns); may be NULL */
  const float *norm_weight;   /* (columns), at most 256 of them; may be NULL */
  const float *norm_bias;     /* (columns); may be NULL */
  const float *out_norm_weight; /* (columns), at most 256 of them; may be NULL */
  const float *out_norm_bias; /* (columns); may be NULL */
  const void *residual;       /* of out's shape and of type, may be out; where it does not upsample; may be NULL */
  const void *shortcut;       /* (images, height, width, 4 * columns / repeats), where it upsamples; may be NULL */
  const float *out_scale;     /* one number: out is INT8 of this scale; may be NULL */
  const float *next_scale;    /* one number, of next_values, where out is not INT8; may be NULL */
  float *finite;              /* one number, becomes NaN where an output is not finite; may be NULL */
  void *out;                  /* (images, height, width, columns), twice as high and wide where it upsamples */
  int8_t *next_values;        /* of out's shape: out as it is rounded, in INT8; NULL where next_scale is */
  int32_t images;
  int32_t height;
  int32_t width;
  int32_t depth;   /* a multiple of 16; kernel * kernel * depth at most 131071 */
  int32_t columns; /* any number; fast are multiples of 8, of 16 with out_scale */
  int32_t kernel;  /* 1 or 3; 2 with PHASES */
  int32_t upsample;
  int32_t activation;
  int32_t out_activation; /* used with out_norm_weight */
  int32_t repeats;
  float norm_eps;
  int32_t type; /* of residual, shortcut and out: fp16, bf16 */
} sana_edge_w8a8_conv2d_args;
SANA_EDGE_API sana_edge_status sana_edge_w8a8_conv2d(const sana_edge_w8a8_conv2d_args *, void *stream);

/* ---- the rest of the decoder ---- */

/* y RMS-normalised over its columns, * weight + bias, + x, rounded to the type; that in INT8 rows too */
typedef struct {
  const void *y;       /* (rows, columns) */
  const void *x;       /* (rows, columns) */
  const float *weight; /* (columns) */
  const float *bias;   /* (columns) */
  const float *static_scale; /* may be NULL */
  void *out;      /* (rows, columns), may be x */
  int8_t *values; /* (rows, columns) */
  float *scales;  /* (rows) */
  int64_t rows;
  int32_t columns; /* a multiple of 16, at most 2560 */
  float eps;
  int32_t type; /* fp16, bf16 */
} sana_edge_norm_add_quantize_args;
SANA_EDGE_API sana_edge_status sana_edge_norm_add_quantize(const sana_edge_norm_add_quantize_args *, void *stream);

/* one scale for all of x: absmax / 127, NaN where x is not finite */
typedef struct {
  const void *x;   /* (rows, columns) */
  float *scale;    /* one number */
  void *workspace; /* of qkv_linear_attention for one image, token and head */
  int64_t workspace_bytes;
  int64_t rows;
  int32_t columns; /* a multiple of 16 */
  int32_t type;    /* fp32, fp16, bf16 */
} sana_edge_tensor_scale_args;
SANA_EDGE_API sana_edge_status sana_edge_tensor_scale(const sana_edge_tensor_scale_args *, void *stream);

/* q and the sums of ReLU linear attention, heads of 32, of a map and of its second scale: depthwise 5x5 with zero
 * padding, then 32x32 within each head's q, k and v, fp32 in between; of its q, k, v only q is rounded to the type */
typedef struct {
  const void *qkv;        /* (images, height, width, 3 * heads * 32): q, k and v of each head side by side */
  const float *depthwise; /* (5, 5, 3 * heads * 32); may be NULL: there is no second scale */
  const float *pointwise; /* (3 * heads * 32, 32): output, input channel of its 32; NULL where depthwise is */
  void *q;                /* out: (images, height, width, scales * heads * 32), without ReLU */
  float *state;           /* out: (images, scales * heads, 33, 32), as of qkv_linear_attention */
  void *workspace;        /* as of qkv_linear_attention, for scales * heads and at most 2048 tokens */
  int64_t workspace_bytes;
  int32_t images;
  int32_t height;
  int32_t width;
  int32_t heads; /* at most 128 */
  int32_t type;  /* fp16, bf16 */
} sana_edge_multiscale_linear_attention_args;
SANA_EDGE_API sana_edge_status
sana_edge_multiscale_linear_attention(const sana_edge_multiscale_linear_attention_args *, void *stream);

/* ---- Gemma-2, activations in fp32 and, where they are multiplied, in two INT8 digits ---- */

/* x (rows, columns), or GELU of its first half times its second half, to digits: step * (254 * high + low) */
typedef struct {
  const float *x;  /* (rows, columns); gated (rows, 2 * columns) */
  int8_t *digits;  /* (rows, 2, columns): high, then low */
  float *steps;    /* (rows): absmax / 32258 */
  int64_t rows;
  int32_t columns; /* a multiple of 16, at most 16384 */
  int32_t gated;   /* 1: tanh's GELU */
} sana_edge_quantize_digits_args;
SANA_EDGE_API sana_edge_status sana_edge_quantize_digits(const sana_edge_quantize_digits_args *, void *stream);

/* total = x + RMSNorm(y) * post_weight; RMSNorm(total) * weight to digits */
typedef struct {
  const float *x;           /* (rows, columns) */
  const float *y;           /* (rows, columns); may be NULL: total is x */
  const float *post_weight; /* (columns); NULL where y is */
  const float *weight;      /* (columns); the 1 of 1 + weight is in both */
  float *total;             /* (rows, columns) */
  int8_t *digits;           /* (rows, 2, columns) */
  float *steps;             /* (rows) */
  int64_t rows;
  int32_t columns; /* a multiple of 16, at most 8192 */
  float eps;
} sana_edge_add_norm_digits_args;
SANA_EDGE_API sana_edge_status sana_edge_add_norm_digits(const sana_edge_add_norm_digits_args *, void *stream);

/* out = (254 * high + low) weight^T * steps * weight_scales + bias; neighbours 2 i and 2 i + 1 rotated */
typedef struct {
  const int8_t *digits;       /* (rows, 2, depth) */
  const float *steps;         /* (rows) */
  const int8_t *weight;       /* (columns, depth) */
  const float *weight_scales; /* (columns) */
  const float *bias;          /* (columns); may be NULL */
  const float *rotation;      /* (tokens, pairs, 2): cosine and sine, of heads of 2 * pairs; may be NULL */
  float *out;                 /* (rows, columns) */
  int64_t rows;
  int32_t columns; /* a multiple of 8 */
  int32_t depth;   /* a multiple of 16, at most 131071 */
  int32_t tokens;  /* row r is token r % tokens */
  int32_t pairs;
  int32_t rotated; /* so many of the first columns rotate */
} sana_edge_w8a16_linear_args;
SANA_EDGE_API sana_edge_status sana_edge_w8a16_linear(const sana_edge_w8a16_linear_args *, void *stream);

/* softmax(cap * tanh(scale * q k^T / cap)) v of tokens behind the first ``known`` of a prefix, causal */
typedef struct {
  const float *qkv; /* (prompts, tokens, (heads + 2 * kv_heads) * head_dim): all of q, then k, then v */
  const void *prefix_keys;   /* (kv_heads, capacity, head_dim) */
  const void *prefix_values; /* (kv_heads, capacity, head_dim) */
  const int32_t *known;      /* one number in device memory: 0 to capacity */
  float *out;                /* (prompts, tokens, heads * head_dim) */
  int32_t prompts;
  int32_t tokens;
  int32_t heads;    /* at most 256; heads / kv_heads share one of k and v */
  int32_t kv_heads;
  int32_t head_dim; /* 8, 16, 32, 64, 128 or 256 */
  int32_t capacity;
  int32_t window; /* a token reads itself and window - 1 before it; 0: all */
  int32_t type;   /* of prefix_keys and prefix_values: fp32, fp16, bf16 */
  float scale;
  float cap; /* 0 leaves scores as they are */
} sana_edge_soft_capped_attention_args;
SANA_EDGE_API sana_edge_status sana_edge_soft_capped_attention(const sana_edge_soft_capped_attention_args *,
                                                               void *stream);

#ifdef __cplusplus
}
#endif
#endif
