// The product that makes q, k and v, and never writes k and v: a tile of the weight has K and V of the same heads
// side by side, so that a block which has made them for some tokens of an image multiplies ReLU(K)^T V on tensor
// cores, from shared memory, and writes 33 x 32 sums per head. The last block of a head group adds up what all
// wrote. No weight is moved for that: the tile's rows are looked up.
#include "checks.h"
#include "gemm.h"
#include "gemm_tiles.h"
#include "linear_attention_parts.h"

namespace {

struct Product {
  sana_edge_qkv_linear_attention_args a;
  int row_tiles;  // of an image
};

// rows of a WeightTile
struct WeightRows {
  const int8_t* first;
  int to_values;  // rows from one of K, behind the tile's, to that of V
  int split, rows, depth;
  __device__ __forceinline__ const int8_t* chunk(int row, int k) const {
    const bool value = row >= split;
    if (row - (value ? split : 0) >= rows) return nullptr;
    // 32 bits for a whole weight
    return first + uint32_t((row + (value ? to_values : 0)) * depth + k);
  }
};

// what follows the product in fp32, rounded to the type: to shared memory
template <class T, class Shape>
__device__ __forceinline__ void stage(const Product& p, const int32_t (&sums)[Shape::MT][Shape::NT][4],
                                      const WeightTile<Shape::N>& tile, int64_t first, int rows) {
  const auto& a = p.a;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  float scales[Shape::MT][2];
#pragma unroll
  for (int m = 0; m < Shape::MT; m++)
    for (int half = 0; half < 2; half++) {
      const int row = tile_row<Shape>(threadIdx.x, m, 2 * half);
      scales[m][half] = row < rows ? a.scales[first + row] : 0;
    }
#pragma unroll
  for (int n = 0; n < Shape::NT; n++) {
    const int column = tile_column<Shape>(threadIdx.x, n, 0), weight = tile.row(column);
    const bool relu = column < tile.split;
    Float2 weight_scales{}, bias{};
    if (weight >= 0) {
      weight_scales = load_vector<Float2>(a.weight_scales + weight);
      // opaque, lest what has a bias and what has none get code of its own
      if (opaque(a.bias != nullptr)) bias = load_vector<Float2>(a.bias + weight);
    }
#pragma unroll
    for (int m = 0; m < Shape::MT; m++)
      for (int half = 0; half < 2; half++) {
        float values[2];
        for (int i = 0; i < 2; i++) {
          const float scaled = multiply(float(sums[m][n][2 * half + i]), scales[m][half]);
          values[i] = add(multiply(scaled, weight_scales.at[i]), bias.at[i]);
        }
        const uint32_t pair = pack_floats<T>(values[0], values[1]);
        store_vector(shared + staged<Shape::N>(tile_row<Shape>(threadIdx.x, m, 2 * half), column),
                     relu ? relu_pair<T>(pair) : pair);
      }
  }
}

// rows of a tile from this one on
template <class T, class Shape>
__device__ __forceinline__ void clear_rows(int first) {
  constexpr int VECTORS = Shape::N / 8;
  Bytes16* const shared = reinterpret_cast<Bytes16*>(shared_memory());
  for (int n = first * VECTORS + threadIdx.x; n < Shape::M * VECTORS; n += Shape::THREADS) shared[n] = Bytes16{};
}

template <class T, class Shape>
__device__ __forceinline__ void store_queries(const Product& p, const WeightTile<Shape::N>& tile, int64_t first,
                                              int rows) {
  constexpr int VECTORS = Shape::N / 8;
  const T* const shared = reinterpret_cast<const T*>(shared_memory());
  T* const q = static_cast<T*>(p.a.q);
#pragma unroll 4
  for (int n = threadIdx.x; n < Shape::M * VECTORS; n += Shape::THREADS) {
    const int row = n / VECTORS, column = n % VECTORS * 8;
    if (row < rows && column < tile.channels)
      store_vector(q + (first + row) * p.a.heads * HEAD + tile.first + column,
                   load_vector<Bytes16>(shared + staged<Shape::N>(row, column)));
  }
}

// one quarter (16, 16) of a head's K^T V, the first of a row also with sums of K, which are a product with ones
template <class T, class Shape>
__device__ __forceinline__ void multiply_quarter(int head, int quarter, float* part) {
  const T* const shared = reinterpret_cast<const T*>(shared_memory());
  const int lane = threadIdx.x % WARP, row = quarter / 2 * 16, column = quarter % 2 * 16;
  const T* keys = shared + staged<Shape::N>(key_row(lane), head * HEAD + row + key_column(lane));
  const T* values =
      shared + staged<Shape::N>(value_row(lane), Shape::N / 2 + head * HEAD + column + value_column(lane));
  const uint32_t one = from_float<T>(1.0f).bits;
  const uint32_t ones[2] = {one | one << 16, one | one << 16};
  float sums[2][4] = {}, key_sums[4] = {};
#pragma unroll
  for (int token = 0; token < Shape::M; token += 16) {
    uint32_t left[4], right[4];
    load_matrices_transposed(left, keys + token * Shape::N);
    load_matrices_transposed(right, values + token * Shape::N);
    for (int n = 0; n < 2; n++) multiply_16bit<T>(sums[n], left, {right[2 * n], right[2 * n + 1]});
    if (column == 0) multiply_16bit<T>(key_sums, left, ones);
  }
  for (int half = 0; half < 2; half++) {
    const int d = row + sum_row(lane, 2 * half);
    for (int n = 0; n < 2; n++)
      store_vector(part + d * HEAD + column + sum_column(lane, n, 0),
                   Float2{sums[n][2 * half], sums[n][2 * half + 1]});
    if (column == 0 && lane % 4 == 0) part[HEAD * HEAD + d] = key_sums[2 * half];
  }
}

template <class T, class Shape>
__device__ __forceinline__ void sum_heads(const Product& p, const WeightTile<Shape::N>& tile, int image,
                                          int part) {
  constexpr int WARPS = Shape::THREADS / WARP;
  const auto& a = p.a;
  const Parts parts = parts_of(a.workspace, p.row_tiles);
  const int heads = tile.channels / HEAD;
  const int64_t first = int64_t(image) * a.heads + tile.first / HEAD;
  for (int unit = threadIdx.x / WARP; unit < heads * 4; unit += WARPS)
    multiply_quarter<T, Shape>(unit / 4, unit % 4, parts.part(first + unit / 4, part));
  fence_device();
  // also: all have read K and V, which make room for one flag
  synchronize_block();
  int* const last = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *last = last_to_come(parts.counters + first, p.row_tiles);
  synchronize_block();
  if (!*last) return;
  fence_device();
  for (int head = 0; head < heads; head++) add_parts(parts, first + head, a.state, threadIdx.x, Shape::THREADS);
}

// registers for two large or four small blocks on an SM
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::THREADS, Shape::M == 64 ? 4 : 2)
    qkv_linear_attention_kernel(const Product p) {
  wait_for_kernels();
  if constexpr (!for_this_architecture<Shape>()) return;
  const auto& a = p.a;
  const TilePlace place =
      tile_of_block(blockIdx.x, unsigned(p.row_tiles * a.images), unsigned(weight_tiles<Shape::N>(a.heads)));
  const WeightTile<Shape::N> tile = weight_tile<Shape::N>(place.column, a.heads);
  const int image = place.row / p.row_tiles, part = place.row % p.row_tiles;
  const int64_t first = int64_t(image) * a.tokens + part * Shape::M;
  const int rows = smaller(Shape::M, a.tokens - part * Shape::M);
  const MatrixRows left{a.values + first * a.depth, rows, a.depth};
  const WeightRows right{a.weight + int64_t(tile.row(0)) * a.depth, tile.to_keys - tile.split, tile.split,
                         tile.channels, a.depth};
  int32_t sums[Shape::MT][Shape::NT][4] = {};
  multiply_tiles<Shape>(sums, left, right, a.depth);
  stage<T, Shape>(p, sums, tile, first, rows);
  synchronize_block();
  if (tile.keys && rows < Shape::M) {
    // beyond the image K and V are their biases, which are no part of the sums
    clear_rows<T, Shape>(rows);
    synchronize_block();
  }
  if (tile.keys)
    sum_heads<T, Shape>(p, tile, image, part);
  else
    store_queries<T, Shape>(p, tile, first, rows);
}

template <class T, class Shape>
sana_edge_status start(Product p, void* stream) {
  static_assert(Shape::M >= PART_TOKENS && Shape::M % 16 == 0, "the workspace is for parts of PART_TOKENS");
  constexpr size_t STAGED = size_t(Shape::M) * Shape::N * 2;
  p.row_tiles = blocks_of(p.a.tokens, Shape::M);
  const int64_t blocks = int64_t(p.row_tiles) * p.a.images * weight_tiles<Shape::N>(p.a.heads);
  if (blocks >= LARGEST) return SANA_EDGE_BAD_SHAPE;
  return launch(qkv_linear_attention_kernel<T, Shape>, dim3{unsigned(blocks), 1, 1}, Shape::THREADS,
                larger(size_t(Shape::SHARED), STAGED), stream, p, BEGINS_EARLY);
}

// The size of a shape's tiles is the same on every GPU, so that what is added to what depends on the shape only:
// small ones where blocks would be few.
constexpr int64_t FEW_BLOCKS = 96;

template <class T>
sana_edge_status start(const Product& p, bool turing, void* stream) {
  const int64_t row_tiles = blocks_of(p.a.tokens, TileMiddle::M);
  const bool few = row_tiles * p.a.images * weight_tiles<TileMiddle::N>(p.a.heads) < FEW_BLOCKS;
  static_assert(TileMiddle::M == TileTuring::M && TileMiddle::N == TileTuring::N);
  static_assert(TileSmall::M == TileTuringSmall::M && TileSmall::N == TileTuringSmall::N);
  if (turing) return few ? start<Half, TileTuringSmall>(p, stream) : start<Half, TileTuring>(p, stream);
  return few ? start<T, TileSmall>(p, stream) : start<T, TileMiddle>(p, stream);
}

}  // namespace

extern "C" SANA_EDGE_API int64_t sana_edge_qkv_linear_attention_workspace(int32_t images, int32_t tokens,
                                                                          int32_t heads) {
  if (images < 0 || tokens < 0 || heads < 0) return 0;
  const int64_t parts = int64_t(blocks_of(tokens, PART_TOKENS)) * images * heads;
  return COUNTERS * int64_t(sizeof(int)) + parts * STATE * int64_t(sizeof(float));
}

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_qkv_linear_attention(const sana_edge_qkv_linear_attention_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->images >= 0 && a->tokens >= 0 && int64_t(a->images) * a->tokens < LARGEST,
                  SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a->heads > 0 && a->heads <= 256 && int64_t(a->images) * a->heads <= COUNTERS,
                  SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a->depth > 0 && a->depth % 16 == 0 && 3 * HEAD * int64_t(a->heads) * a->depth < LARGEST,
                  SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->tokens == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->values, a->scales, a->weight, a->weight_scales, a->q, a->state, a->workspace}),
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->values, a->weight, a->weight_scales, a->bias, a->q, a->state, a->workspace}) &&
                      aligned({a->scales}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  SANA_EDGE_CHECK(
      a->workspace_bytes >= sana_edge_qkv_linear_attention_workspace(a->images, a->tokens, a->heads),
      SANA_EDGE_WORKSPACE);
  sana_edge_device_info device;
  const sana_edge_status status = current_device(&device);
  SANA_EDGE_CHECK(status == SANA_EDGE_OK, status);
  const bool turing = device.capability < 80;
  const Product p{*a, 0};
  if (a->type == SANA_EDGE_FP16) return start<Half>(p, turing, stream);
  // its tensor cores do not multiply BFloat16
  SANA_EDGE_CHECK(!turing, SANA_EDGE_UNSUPPORTED_DEVICE);
  return start<BFloat16>(p, turing, stream);
}
