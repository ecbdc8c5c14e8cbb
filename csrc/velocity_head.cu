// The denoiser's last layer. With guidance the halves' rows are combined before the product, which is linear: half
// the products, and nothing but the result is written. A block has up to 8 tokens' rows in shared memory; a warp
// multiplies them by 4 output channels at a time, its lanes side by side along the columns.
#include "checks.h"
#include "row_quantizer.h"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int CHUNK = 8;     // elements that a lane reads of x at a time
constexpr int OUTPUTS = 4;   // channels that a warp computes at a time
constexpr int SHARED = 40 << 10;

using Arguments = sana_edge_velocity_head_args;

struct alignas(16) Four {
  float element[4];
};

struct Moments {
  float mean, root;  // 1 / standard deviation
};

// of a row, by a warp
template <class T>
__device__ __forceinline__ Moments moments(const T* x, int columns, float eps) {
  const int lane = threadIdx.x % WARP;
  float sum = 0, squares = 0, chunk[CHUNK];
  for (int column = lane * CHUNK; column < columns; column += WARP * CHUNK) {
    load_group(chunk, x + column);
    for (int i = 0; i < CHUNK; i++) sum = add(sum, chunk[i]);
  }
  const float mean = divide(warp_sum(sum), float(columns));
  for (int column = lane * CHUNK; column < columns; column += WARP * CHUNK) {
    load_group(chunk, x + column);
    for (int i = 0; i < CHUNK; i++) {
      const float centred = add(chunk[i], -mean);
      squares = fused_multiply_add(centred, centred, squares);
    }
  }
  return {mean, reciprocal_root(add(divide(warp_sum(squares), float(columns)), eps))};
}

// a chunk of an image's row, normalised and modulated
template <class T>
__device__ __forceinline__ void modulated(float (&to)[CHUNK], const Arguments& a, int64_t image, int64_t token,
                                          int column, const Moments& found) {
  float scale[CHUNK], shift[CHUNK];
  load_group(to, static_cast<const T*>(a.x) + (image * a.tokens + token) * a.columns + column);
  load_group(scale, a.scale + image * a.stride + column);
  load_group(shift, a.shift + image * a.stride + column);
  for (int i = 0; i < CHUNK; i++)
    to[i] = add(multiply(multiply(add(to[i], -found.mean), found.root), scale[i]), shift[i]);
}

// a token's row, of both halves where there is guidance, to shared memory; by a warp
template <class T>
__device__ __forceinline__ void make_row(float* row, const Arguments& a, int64_t image, int64_t token) {
  const T* x = static_cast<const T*>(a.x) + token * a.columns;
  const int64_t size = int64_t(a.tokens) * a.columns, prompted = a.images + image;
  const Moments first = moments(x + image * size, a.columns, a.eps);
  const Moments second = a.guidance ? moments(x + prompted * size, a.columns, a.eps) : Moments{};
  const float guidance = a.guidance ? *a.guidance : 0.0f;
  for (int column = threadIdx.x % WARP * CHUNK; column < a.columns; column += WARP * CHUNK) {
    float values[CHUNK], others[CHUNK];
    modulated<T>(values, a, image, token, column, first);
    if (a.guidance) {
      modulated<T>(others, a, prompted, token, column, second);
      for (int i = 0; i < CHUNK; i++)
        values[i] = fused_multiply_add(guidance, add(others[i], -values[i]), values[i]);
    }
    for (int n = 0; n < CHUNK / 4; n++)
      store_vector(row + column + 4 * n,
                   Four{values[4 * n], values[4 * n + 1], values[4 * n + 2], values[4 * n + 3]});
  }
}

template <class T, int TOKENS>
__global__ void __launch_bounds__(THREADS) velocity_head_kernel(const Arguments a) {
  wait_for_kernels();
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t image = blockIdx.y, first = int64_t(blockIdx.x) * TOKENS;
  float* rows = reinterpret_cast<float*>(shared_memory());
  for (int n = warp; n < TOKENS; n += WARPS) {
    if (first + n < a.tokens)
      make_row<T>(rows + n * a.columns, a, image, first + n);
    else
      for (int column = lane; column < a.columns; column += WARP) rows[n * a.columns + column] = 0;
  }
  synchronize_block();
  for (int channel = warp * OUTPUTS; channel < a.channels; channel += WARPS * OUTPUTS) {
    float sums[OUTPUTS][TOKENS] = {};
    for (int column = lane * 4; column < a.columns; column += WARP * 4) {
      Four weight[OUTPUTS];
#pragma unroll
      for (int n = 0; n < OUTPUTS; n++)
        weight[n] = load_vector<Four>(a.weight + int64_t(smaller(channel + n, a.channels - 1)) * a.columns + column);
#pragma unroll
      for (int token = 0; token < TOKENS; token++) {
        const Four row = load_vector<Four>(rows + token * a.columns + column);
#pragma unroll
        for (int n = 0; n < OUTPUTS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            sums[n][token] = fused_multiply_add(row.element[i], weight[n].element[i], sums[n][token]);
      }
    }
    // every lane has the sums, and lane TOKENS n + token writes its own
    float mine = 0;
#pragma unroll
    for (int n = 0; n < OUTPUTS; n++)
#pragma unroll
      for (int token = 0; token < TOKENS; token++) {
        const float sum = warp_sum(sums[n][token]);
        if (lane == n * TOKENS + token) mine = sum;
      }
    const int output = channel + lane / TOKENS;
    const int64_t token = first + lane % TOKENS;
    if (lane < OUTPUTS * TOKENS && output < a.channels && token < a.tokens)
      a.out[(image * a.channels + output) * a.tokens + token] = add(mine, a.bias[output]);
  }
}

template <class T, int TOKENS>
sana_edge_status start(const Arguments& a, void* stream) {
  return launch(velocity_head_kernel<T, TOKENS>, dim3{unsigned(blocks_of(a.tokens, TOKENS)), unsigned(a.images), 1},
                THREADS, TOKENS * size_t(a.columns) * sizeof(float), stream, a, BEGINS_EARLY);
}

template <class T>
sana_edge_status start(const Arguments& a, void* stream) {
  const int most = SHARED / int(sizeof(float)) / a.columns;
  if (most >= 8) return start<T, 8>(a, stream);
  if (most >= 4) return start<T, 4>(a, stream);
  return most >= 2 ? start<T, 2>(a, stream) : start<T, 1>(a, stream);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_velocity_head(const sana_edge_velocity_head_args* a,
                                                                  void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->images >= 0 && a->images <= 65535 && a->tokens >= 0 && a->columns > 0 && a->columns % 16 == 0 &&
                      a->columns <= 8192 && a->channels > 0 && a->channels <= 256 && a->stride >= 0,
                  SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->tokens == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->x, a->scale, a->shift, a->weight, a->bias, a->out}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->x, a->scale, a->shift, a->weight}) && a->stride % 4 == 0 &&
                      aligned({a->bias, a->guidance, a->out}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  return a->type == SANA_EDGE_FP16 ? start<Half>(*a, stream) : start<BFloat16>(*a, stream);
}
