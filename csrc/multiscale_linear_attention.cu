// The sums of EfficientViT's linear attention, and of its second, wider scale: depthwise 5x5 over the map, then
// 32x32 within each head's q, k and v. A block has one head's 96 channels of some patches of 8x8 pixels: it brings a
// patch and the 2 pixels around it to shared memory once, so that q, k and v of the second scale, but for its q,
// are never written. The sums of both scales stay in registers from patch to patch. Everything after the 16-bit
// map is fp32, so that all architectures and both types compute the same.
#include "checks.h"
#include "linear_attention_parts.h"
#include "multiscale_maps.h"

namespace {

constexpr int THREADS = 2 * GROUP;  // a channel's upper and lower half of a patch
constexpr int WEIGHTS = 3 * HEAD * HEAD;
// threads with sums: of a scale 4 rows and 2 columns of the 32 x 32 each
constexpr int SUMMING = HEAD / 4 * HEAD / 2;

struct Scales {
  sana_edge_multiscale_linear_attention_args a;
  PatchRows patches;
};

template <class T>
struct alignas(8) Four {
  T at[4];
};
template <class T>
struct alignas(4) Two {
  T at[2];
};
struct alignas(8) Pair {
  float at[2];
};

// a patch with its surroundings, then its fp32 numbers; behind them the 32x32 weights of q, k and v, inputs first
template <class T>
struct Shared {
  T* window;
  float* mixed;
  float* weights;

  __device__ __forceinline__ Shared()
      : window(reinterpret_cast<T*>(shared_memory())),
        mixed(reinterpret_cast<float*>(shared_memory())),
        weights(reinterpret_cast<float*>(shared_memory() + WINDOW_BYTES)) {}
};

template <class T>
__device__ __forceinline__ void load_window(const Scales& s, const PatchPlace& at, int image, int head, T* window) {
  constexpr int PIECES = GROUP / 8;
  const int64_t width = 3 * HEAD * int64_t(s.a.heads);
  const T* map = static_cast<const T*>(s.a.qkv) + int64_t(image) * s.a.height * s.a.width * width + head * GROUP;
  for (int n = threadIdx.x; n < SPAN * SPAN * PIECES; n += THREADS) {
    const int pixel = n / PIECES, piece = n % PIECES;
    const int row = at.row + pixel / SPAN - HALO, column = at.column + pixel % SPAN - HALO;
    const bool there = unsigned(row) < unsigned(s.a.height) && unsigned(column) < unsigned(s.a.width);
    const int64_t from = there ? (int64_t(row) * s.a.width + column) * width + piece * 8 : 0;
    copy_async16(window + pixel * GROUP + piece * 8, map + from, there);
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// q as it is, to the first half of a row
template <class T>
__device__ __forceinline__ void store_queries(const Scales& s, const PatchPlace& at, int image, int head,
                                              const T* window) {
  constexpr int PIECES = HEAD / 8;
  for (int n = threadIdx.x; n < PIXELS * PIECES; n += THREADS) {
    const int pixel = n / PIECES, piece = n % PIECES;
    if (!at.has(pixel)) continue;
    T* to = static_cast<T*>(s.a.q) + query_place(s.a, at, image, head, pixel, 0) + piece * 8;
    store_vector(to, load_vector<Bytes16>(window + centre(pixel) * GROUP + piece * 8));
  }
}

// A thread's sums of one scale over the pixels of a block
struct LaneSums {
  float products[4][2], keys[4];

  __device__ __forceinline__ void add_pixel(const float (&k)[4], const float (&v)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      keys[i] = add(keys[i], k[i]);
      for (int j = 0; j < 2; j++) products[i][j] = fused_multiply_add(k[i], v[j], products[i][j]);
    }
  }
  __device__ __forceinline__ void store(float* part) const {
    const int row = sum_rows(threadIdx.x), column = sum_columns(threadIdx.x);
#pragma unroll
    for (int i = 0; i < 4; i++)
      store_vector(part + (row + i) * HEAD + column, Pair{{products[i][0], products[i][1]}});
    if (column == 0) store_vector(part + HEAD * HEAD + row, Float4{{keys[0], keys[1], keys[2], keys[3]}});
  }
};

__device__ __forceinline__ float relu(float x) { return x < 0 ? 0.0f : x; }

// k and v of the map itself; pixels outside of it are zeros
template <class T>
__device__ __forceinline__ void sum_window(LaneSums& sums, const T* window) {
  if (threadIdx.x >= SUMMING) return;
  const int row = sum_rows(threadIdx.x), column = sum_columns(threadIdx.x);
#pragma unroll 4
  for (int pixel = 0; pixel < PIXELS; pixel++) {
    const T* from = window + centre(pixel) * GROUP;
    const auto keys = load_vector<Four<T>>(from + HEAD + row);
    const auto values = load_vector<Two<T>>(from + 2 * HEAD + column);
    float k[4], v[2];
    for (int i = 0; i < 4; i++) k[i] = relu(to_float(keys.at[i]));
    for (int j = 0; j < 2; j++) v[j] = to_float(values.at[j]);
    sums.add_pixel(k, v);
  }
}

__device__ __forceinline__ void sum_mixed(LaneSums& sums, const float* mixed) {
  if (threadIdx.x >= SUMMING) return;
  const int row = sum_rows(threadIdx.x), column = sum_columns(threadIdx.x);
#pragma unroll 4
  for (int pixel = 0; pixel < PIXELS; pixel++) {
    const float* from = mixed + pixel * MIXED;
    const auto keys = load_vector<Float4>(from + HEAD + row);
    const auto values = load_vector<Pair>(from + 2 * HEAD + column);
    sums.add_pixel(keys.at, values.at);
  }
}

// The depthwise 5x5 of a channel and half of a patch: a number goes to all sums that need it.
template <class T>
__device__ __forceinline__ void mix_depthwise(float (&sums)[PATCH / 2][PATCH], const Scales& s, int head,
                                              const T* window) {
  const int channel = threadIdx.x % GROUP, top = threadIdx.x / GROUP * (PATCH / 2);
  const int64_t width = 3 * HEAD * int64_t(s.a.heads);
  // for every patch anew: the registers are needed between
  float taps[KERNEL * KERNEL];
#pragma unroll
  for (int tap = 0; tap < KERNEL * KERNEL; tap++) taps[tap] = s.a.depthwise[tap * width + head * GROUP + channel];
#pragma unroll
  for (int y = 0; y < PATCH / 2 + 2 * HALO; y++) {
#pragma unroll
    for (int x = 0; x < SPAN; x++) {
      const float value = to_float(window[((top + y) * SPAN + x) * GROUP + channel]);
#pragma unroll
      for (int tap = 0; tap < KERNEL * KERNEL; tap++) {
        const int row = y - tap / KERNEL, column = x - tap % KERNEL;
        if (row < 0 || row >= PATCH / 2 || column < 0 || column >= PATCH) continue;
        sums[row][column] = fused_multiply_add(value, taps[tap], sums[row][column]);
      }
    }
  }
}

// 8 pixels and 4 output channels of a thread
constexpr int OUTPUTS = GROUP / 4;
using Pointwise = float[PATCH][4];

__device__ __forceinline__ void mix_pointwise(Pointwise& sums, const float* mixed, const float* weights) {
  const int output = threadIdx.x % OUTPUTS * 4, group = output / HEAD, first = threadIdx.x / OUTPUTS * PATCH;
#pragma unroll 2
  for (int in = 0; in < HEAD; in += 4) {
    Float4 weight[4];
    for (int i = 0; i < 4; i++)
      weight[i] = load_vector<Float4>(weights + (group * HEAD + in + i) * HEAD + output % HEAD);
#pragma unroll
    for (int pixel = 0; pixel < PATCH; pixel++) {
      const auto value = load_vector<Float4>(mixed + (first + pixel) * MIXED + group * HEAD + in);
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
          sums[pixel][j] = fused_multiply_add(value.at[i], weight[i].at[j], sums[pixel][j]);
    }
  }
}

// q to global memory, ReLU(k) and v to shared memory, zeros for pixels that are not there
template <class T>
__device__ __forceinline__ void store_mixed(const Scales& s, const PatchPlace& at, int image, int head,
                                            const Pointwise& sums, float* mixed) {
  const int output = threadIdx.x % OUTPUTS * 4, group = output / HEAD, first = threadIdx.x / OUTPUTS * PATCH;
#pragma unroll
  for (int n = 0; n < PATCH; n++) {
    const int pixel = first + n;
    const bool there = at.has(pixel);
    if (group == 0) {
      Four<T> q;
      for (int i = 0; i < 4; i++) q.at[i] = from_float<T>(sums[n][i]);
      if (there) store_vector(static_cast<T*>(s.a.q) + query_place(s.a, at, image, head, pixel, 1) + output, q);
      continue;
    }
    Float4 out;
    for (int i = 0; i < 4; i++) out.at[i] = !there ? 0.0f : group == 1 ? relu(sums[n][i]) : sums[n][i];
    store_vector(mixed + pixel * MIXED + output, out);
  }
}

template <class T>
__device__ __forceinline__ void add_second_scale(LaneSums& sums, const Scales& s, const PatchPlace& at, int image,
                                                 int head, const Shared<T>& shared) {
  float depthwise[PATCH / 2][PATCH] = {};
  mix_depthwise<T>(depthwise, s, head, shared.window);
  // all have read the window, whose place these take
  synchronize_block();
  const int channel = threadIdx.x % GROUP, top = threadIdx.x / GROUP * (PATCH / 2);
#pragma unroll
  for (int n = 0; n < PATCH / 2 * PATCH; n++)
    shared.mixed[(top * PATCH + n) * MIXED + channel] = depthwise[n / PATCH][n % PATCH];
  synchronize_block();
  Pointwise outputs = {};
  mix_pointwise(outputs, shared.mixed, shared.weights);
  synchronize_block();
  store_mixed<T>(s, at, image, head, outputs, shared.mixed);
  synchronize_block();
  sum_mixed(sums, shared.mixed);
}

template <class T, bool MULTISCALE>
__global__ void __launch_bounds__(THREADS, 2) multiscale_linear_attention_kernel(const Scales s) {
  wait_for_kernels();
  const auto& a = s.a;
  const int part = blockIdx.x, image = blockIdx.y / a.heads, head = blockIdx.y % a.heads;
  const Shared<T> shared;
  if (MULTISCALE) {
    for (int n = threadIdx.x; n < WEIGHTS; n += THREADS)
      shared.weights[transposed_weight(n)] = a.pointwise[int64_t(head) * WEIGHTS + n];
  }
  LaneSums sums[MULTISCALE ? 2 : 1] = {};
  const int last = smaller((part + 1) * s.patches.each, s.patches.count());
  for (int patch = part * s.patches.each; patch < last; patch++) {
    const PatchPlace at = s.patches.place(patch, a.height, a.width);
    load_window<T>(s, at, image, head, shared.window);
    synchronize_block();
    store_queries<T>(s, at, image, head, shared.window);
    sum_window<T>(sums[0], shared.window);
    if constexpr (MULTISCALE) add_second_scale<T>(sums[1], s, at, image, head, shared);
    // all have read what the next window takes the place of
    synchronize_block();
  }
  const Parts parts = parts_of(a.workspace, s.patches.parts());
  constexpr int SCALES = MULTISCALE ? 2 : 1;
  const int64_t place = int64_t(image) * SCALES * a.heads + head;
  if (threadIdx.x < SUMMING) {
#pragma unroll
    for (int scale = 0; scale < SCALES; scale++) sums[scale].store(parts.part(place + scale * a.heads, part));
  }
  fence_device();
  synchronize_block();
  int* const flag = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *flag = last_to_come(parts.counters + place, s.patches.parts());
  synchronize_block();
  if (!*flag) return;
  fence_device();
  for (int scale = 0; scale < SCALES; scale++)
    add_parts(parts, place + scale * a.heads, a.state, threadIdx.x, THREADS);
}

template <class T>
sana_edge_status start(const sana_edge_multiscale_linear_attention_args& a, void* stream) {
  const Scales s{a, patch_rows(a.height, a.width)};
  const dim3 grid{unsigned(s.patches.parts()), unsigned(a.images) * unsigned(a.heads), 1};
  if (grid.y > 65535) return SANA_EDGE_BAD_SHAPE;
  if (!a.depthwise)
    return launch(multiscale_linear_attention_kernel<T, false>, grid, THREADS, WINDOW_BYTES, stream, s,
                  BEGINS_EARLY);
  const size_t shared = WINDOW_BYTES + WEIGHTS * sizeof(float);
  return launch(multiscale_linear_attention_kernel<T, true>, grid, THREADS, shared, stream, s, BEGINS_EARLY);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_multiscale_linear_attention(const sana_edge_multiscale_linear_attention_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->images >= 0 && a->height >= 0 && a->width >= 0 && a->heads > 0 && a->heads <= 128 &&
                      int64_t(a->images) * 2 * a->heads <= COUNTERS,
                  SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->height == 0 || a->width == 0) return SANA_EDGE_OK;
  const int64_t tokens = int64_t(a->height) * a->width;
  SANA_EDGE_CHECK(tokens < LARGEST / a->images, SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(given({a->qkv, a->q, a->state, a->workspace}) && !a->depthwise == !a->pointwise,
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->qkv, a->q, a->state, a->workspace}) && aligned({a->depthwise, a->pointwise}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  const int scales = a->depthwise ? 2 : 1;
  SANA_EDGE_CHECK(a->workspace_bytes >= sana_edge_qkv_linear_attention_workspace(
                                               a->images, int32_t(smaller(tokens, MOST_TOKENS)), scales * a->heads),
                  SANA_EDGE_WORKSPACE);
  return a->type == SANA_EDGE_FP16 ? start<Half>(*a, stream) : start<BFloat16>(*a, stream);
}
