// The decoder's convolutions as products without an unfolded map: a row is a pixel, and its 16 channels of a
// tap are read from where they are in the map, zeros where that is outside. The four corners of an upsampling
// are columns of one launch. What follows a convolution happens to its sums: activation and INT8 for the next
// convolution, or normalisation over all channels of a pixel and the sum with the block's input.
#include "checks.h"
#include "conv_maps.h"
#include "gemm.h"
#include "row_quantizer.h"

namespace {

// 128 x 128 with 4 warps: two blocks are on an SM, one multiplying while the other finishes its results. All of
// 256 columns where they are normalised, in two stages: three would leave an SM of 100 KiB room for one block.
// Turing has 64 KiB per SM and copies through registers, which 128 sums a thread leave none of: two stages, 8 warps.
template <int M_, int N_, int WARPS_M_, int WARPS_N_, int STAGES_>
struct Shape {
  static constexpr int M = M_, N = N_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
  static constexpr int THREADS = WARP * WARPS_M * WARPS_N;
};
using Wide = Shape<128, 128, 2, 2, 3>;
using Normed = Shape<64, 256, 1, 4, 2>;
using NormedTuring = Shape<64, 256, 2, 4, 2>;
using Narrow = Shape<128, 64, 2, 2, 4>;
using Few = Shape<128, 32, 4, 1, 4>;

template <class S, int ARCH = SANA_EDGE_ARCH>
using TileOf = Tile<S::M, S::N, 64, S::WARPS_M, S::WARPS_N, ARCH >= 800 ? S::STAGES : 2>;

// kernels are empty where the shape is another architecture's
template <class S>
HOST_DEVICE constexpr bool has_shape() {
  constexpr bool TURING = SANA_EDGE_ARCH < 800;
  return std::is_same_v<S, Normed> ? !TURING : !std::is_same_v<S, NormedTuring> || TURING;
}

struct Convolution {
  sana_edge_w8a8_conv2d_args a;
  Map map;
  int pixels, column_tiles, corners;
};

// the corner, pixels and columns of a block
struct Place {
  int corner, first_pixel, first_column;
};

template <class T>
__device__ __forceinline__ Place block_place(const Convolution& c) {
  // blocks in a row share pixels, so that a map is read from memory once
  const unsigned each = unsigned(c.column_tiles * c.corners), tile = blockIdx.x % each;
  return {int(tile) / c.column_tiles, int(blockIdx.x / each) * T::M, int(tile) % c.column_tiles * T::N};
}

// the windows of a block's pixels; which taps of them are in the map is known from the start, of the rows that
// this thread copies
template <class T>
struct Windows {
  const Map& map;
  const int8_t* first;
  int top, left;
  uint32_t masks[T::LEFT_COPIES];

  __device__ __forceinline__ Windows(const Convolution& c, const Place& at)
      : map(c.map),
        first(c.a.values + int64_t(at.first_pixel) * c.map.depth),
        top(window_start(c.map, c.a.upsample, at.corner / 2)),
        left(window_start(c.map, c.a.upsample, at.corner % 2)) {
#pragma unroll
    for (int n = 0; n < T::LEFT_COPIES; n++) {
      const int pixel = at.first_pixel + copied_row<T>(threadIdx.x, n);
      masks[n] = pixel < c.pixels ? window_mask(map, pixel, top, left) : 0;
    }
  }
  __device__ __forceinline__ const int8_t* chunk(int row, int k) const {
    const Sample sample = sample_at(map, k, top, left);
    const uint32_t mask = masks[(row - copied_row<T>(threadIdx.x, 0)) / (T::THREADS / T::PIECES)];
    if (!(mask >> sample.tap & 1)) return nullptr;
    return first + (int64_t(row + sample.shift) * map.depth + sample.channel);
  }
};

// the kernels of a block's columns: rows of the weight, every ``stride`` bytes
struct Kernels {
  const int8_t* first;
  int there;
  uint32_t stride;
  __device__ __forceinline__ const int8_t* chunk(int row, int k) const {
    // 32 bits within a tile: 256 rows of 4 * 131071
    return row < there ? first + (uint32_t(row) * stride + uint32_t(k)) : nullptr;
  }
};

__device__ __forceinline__ Kernels kernels_of(const Convolution& c, const Place& at, int depth) {
  const int first = weight_row(c.map, c.a.upsample, at.corner, at.first_column);
  const int step = weight_row(c.map, c.a.upsample, at.corner, at.first_column + 1) - first;
  return {c.a.weight + int64_t(first) * depth, c.map.columns - at.first_column, uint32_t(step * depth)};
}

__device__ __forceinline__ float activate(float y, int activation) {
  if (activation == SANA_EDGE_RELU) return y < 0 ? 0.0f : y;
  if (activation == SANA_EDGE_SILU) return quick_divide(y, 1.0f + quick_exponential(-y));
  return y;
}

// A thread's results: y[m][n][i] is where tile_row and tile_column say, 0 in columns that are not there
template <class T>
struct Results {
  float y[T::MT][T::NT][4];

  __device__ __forceinline__ void take(const int32_t (&sums)[T::MT][T::NT][4], const Convolution& c,
                                       const Place& at) {
    const float scale = *c.a.scale;
#pragma unroll
    for (int n = 0; n < T::NT; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = at.first_column + tile_column<T>(threadIdx.x, n, j);
        const bool there = column < c.map.columns;
        const int channel = there ? weight_row(c.map, c.a.upsample, at.corner, column) : 0;
        const int biased = c.a.upsample == SANA_EDGE_UPSAMPLE_PHASES ? column : channel;
        const float weight_scale = c.a.weight_scales[channel];
        const float bias = c.a.bias && there ? c.a.bias[biased] : 0.0f;
#pragma unroll
        for (int m = 0; m < T::MT; m++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int i = 2 * half + j;
            const float product = multiply(multiply(float(sums[m][n][i]), scale), weight_scale);
            y[m][n][i] = there ? activate(add(product, bias), c.a.activation) : 0.0f;
          }
        }
      }
    }
  }

  // RMS over the columns, which are all in the tile; uses partial (M, WARPS_N) of shared memory
  __device__ __forceinline__ void normalise(const Convolution& c, const float* weights, const float* biases,
                                            float* partial) {
    const int warp = warp_column<T>(threadIdx.x) / (T::NT * 8);
#pragma unroll
    for (int m = 0; m < T::MT; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float squares = 0;
#pragma unroll
        for (int n = 0; n < T::NT; n++)
          for (int j = 0; j < 2; j++)
            squares = fused_multiply_add(y[m][n][2 * half + j], y[m][n][2 * half + j], squares);
        // the four lanes of a row
        squares = add(squares, shuffle_xor(squares, 1));
        squares = add(squares, shuffle_xor(squares, 2));
        if (threadIdx.x % 4 == 0) partial[tile_row<T>(threadIdx.x, m, 2 * half) * T::WARPS_N + warp] = squares;
      }
    }
    synchronize_block();
#pragma unroll
    for (int m = 0; m < T::MT; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float* row = partial + tile_row<T>(threadIdx.x, m, 2 * half) * T::WARPS_N;
        float squares = 0;
#pragma unroll
        for (int n = 0; n < T::WARPS_N; n++) squares = add(squares, row[n]);
        const float root = reciprocal_root(add(divide(squares, float(c.map.columns)), c.a.norm_eps));
#pragma unroll
        for (int n = 0; n < T::NT; n++)
          for (int j = 0; j < 2; j++) y[m][n][2 * half + j] = multiply(y[m][n][2 * half + j], root);
      }
    }
#pragma unroll
    for (int n = 0; n < T::NT; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = tile_column<T>(threadIdx.x, n, j);
        const bool there = column < c.map.columns;
        const float weight = there ? weights[column] : 0.0f;
        const float bias = there && biases ? biases[column] : 0.0f;
#pragma unroll
        for (int m = 0; m < T::MT; m++)
          for (int i = j; i < 4; i += 2) y[m][n][i] = add(multiply(y[m][n][i], weight), bias);
      }
    }
    synchronize_block();
  }

  template <class Function>
  __device__ __forceinline__ void each(const Function& function) {
#pragma unroll
    for (int m = 0; m < T::MT; m++)
#pragma unroll
      for (int n = 0; n < T::NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          function(y[m][n][i], tile_row<T>(threadIdx.x, m, i), tile_column<T>(threadIdx.x, n, i));
  }
};

template <class Number>
struct alignas(4) Pair {
  Number first, second;
};
struct alignas(2) Levels {
  int8_t first, second;
};
template <class Number>
struct alignas(16) Eight {
  Number element[8];
};
struct alignas(8) EightLevels {
  int8_t element[8];
};

// what is added, of 8 columns of a pixel: the residual, or repeated channels of the shortcut
template <class Number>
__device__ __forceinline__ Eight<Number> addend(const Convolution& c, const Place& at, int pixel, int column) {
  const Map& map = c.map;
  if (c.a.residual) {
    const Number* from = static_cast<const Number*>(c.a.residual) + int64_t(pixel) * map.columns + column;
    if (map.columns % 8 == 0) return load_vector<Eight<Number>>(from);
    Eight<Number> found{};
    for (int i = 0; i < 8; i++)
      if (column + i < map.columns) found.element[i] = from[i];
    return found;
  }
  const int channels = map.columns * 4 / c.a.repeats;
  const Number* from = static_cast<const Number*>(c.a.shortcut) + int64_t(pixel) * channels;
  Eight<Number> found{};
  for (int i = 0; i < 8; i++)
    if (column + i < map.columns) found.element[i] = from[(4 * (column + i) + at.corner) / c.a.repeats];
  return found;
}

// adds to the results what addend() says, through shared memory
template <class T, class Number>
__device__ __forceinline__ void add_map(Results<T>& results, const Convolution& c, const Place& at,
                                        char* memory) {
  constexpr int GROUPS = T::N / 8;
  for (int item = threadIdx.x; item < T::M * GROUPS; item += T::THREADS) {
    const int row = item / GROUPS, column = item % GROUPS * 8;
    if (at.first_pixel + row < c.pixels && at.first_column + column < c.map.columns)
      store_vector(memory + result_offset(row, column, T::N, sizeof(Number)),
                   addend<Number>(c, at, at.first_pixel + row, at.first_column + column));
  }
  synchronize_block();
#pragma unroll
  for (int m = 0; m < T::MT; m++) {
#pragma unroll
    for (int n = 0; n < T::NT; n++) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        // beyond the map this reads anything
        const int row = tile_row<T>(threadIdx.x, m, i), column = tile_column<T>(threadIdx.x, n, i);
        const auto pair = load_vector<Pair<Number>>(memory + result_offset(row, column, T::N, sizeof(Number)));
        const int there = c.map.columns - at.first_column - column;
        if (there > 0) results.y[m][n][i] = add(results.y[m][n][i], to_float(pair.first));
        if (there > 1) results.y[m][n][i + 1] = add(results.y[m][n][i + 1], to_float(pair.second));
      }
    }
  }
  synchronize_block();
}

// copies a tile of results (M, N) of Element from shared memory to its pixels
template <class T, class Element>
__device__ __forceinline__ void store_tile(const Convolution& c, const Place& at, const char* memory, void* out) {
  constexpr int EACH = 16 / sizeof(Element), GROUPS = T::N / EACH;
  const int columns = c.map.columns;
  for (int item = threadIdx.x; item < T::M * GROUPS; item += T::THREADS) {
    const int row = item / GROUPS, pixel = at.first_pixel + row, first = item % GROUPS * EACH;
    const int column = at.first_column + first;
    if (pixel >= c.pixels || column >= columns) continue;
    const int64_t target = c.corners == 1 ? pixel : upsampled_pixel(c.map, pixel, at.corner);
    Element* to = static_cast<Element*>(out) + target * columns + column;
    const char* from = memory + result_offset(row, first, T::N, sizeof(Element));
    if (columns % EACH == 0) {
      store_vector(to, load_vector<Bytes16>(from));
    } else {
      for (int i = 0; i < EACH && column + i < columns; i++) to[i] = reinterpret_cast<const Element*>(from)[i];
    }
  }
}

// results to their place in shared memory, as numbers of 16 bits
template <class T, class Number>
__device__ __forceinline__ void stage_numbers(const Results<T>& results, char* memory) {
#pragma unroll
  for (int m = 0; m < T::MT; m++)
#pragma unroll
    for (int n = 0; n < T::NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = tile_row<T>(threadIdx.x, m, i), column = tile_column<T>(threadIdx.x, n, i);
        store_vector(memory + result_offset(row, column, T::N, sizeof(Number)),
                     Pair<Number>{from_float<Number>(results.y[m][n][i]), from_float<Number>(results.y[m][n][i + 1])});
      }
}

// the same as INT8 of a scale
template <class T>
__device__ __forceinline__ void stage_levels(const Results<T>& results, const float* scale, char* memory) {
  const RowScale levels = row_scale(0, scale);
#pragma unroll
  for (int m = 0; m < T::MT; m++)
#pragma unroll
    for (int n = 0; n < T::NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = tile_row<T>(threadIdx.x, m, i), column = tile_column<T>(threadIdx.x, n, i);
        store_vector(memory + result_offset(row, column, T::N, 1),
                     Levels{quantize(results.y[m][n][i], levels), quantize(results.y[m][n][i + 1], levels)});
      }
}

// numbers of 16 bits in shared memory (M, N) to their pixels, as INT8 of a scale
template <class T, class Number>
__device__ __forceinline__ void store_levels(const Convolution& c, const Place& at, const char* memory,
                                             const float* scale, int8_t* out) {
  constexpr int EACH = 8, GROUPS = T::N / EACH;
  const RowScale levels = row_scale(0, scale);
  const int columns = c.map.columns;
  for (int item = threadIdx.x; item < T::M * GROUPS; item += T::THREADS) {
    const int row = item / GROUPS, pixel = at.first_pixel + row, first = item % GROUPS * EACH;
    const int column = at.first_column + first;
    if (pixel >= c.pixels || column >= columns) continue;
    const int64_t target = c.corners == 1 ? pixel : upsampled_pixel(c.map, pixel, at.corner);
    const auto from = load_vector<Eight<Number>>(memory + result_offset(row, first, T::N, sizeof(Number)));
    EightLevels found;
#pragma unroll
    for (int i = 0; i < EACH; i++) found.element[i] = quantize(to_float(from.element[i]), levels);
    int8_t* to = out + target * columns + column;
    if (columns % EACH == 0) {
      store_vector(to, found);
    } else {
      for (int i = 0; i < EACH && column + i < columns; i++) to[i] = found.element[i];
    }
  }
}

// results of 16 bits and sums of squares take the place of the operands
template <class T>
constexpr int shared_bytes() {
  return larger(T::SHARED, T::M * T::N * 2);
}

template <class S, class Number>
__global__ void __launch_bounds__(S::THREADS) conv2d_kernel(const Convolution c) {
  if constexpr (!has_shape<S>()) return;
  using T = TileOf<S>;
  const Place at = block_place<T>(c);
  const int depth = c.map.kernel * c.map.kernel * c.map.depth;
  const Windows<T> windows(c, at);
  int32_t sums[T::MT][T::NT][4] = {};
  multiply_tiles<T>(sums, windows, kernels_of(c, at, depth), depth);

  Results<T> results;
  results.take(sums, c, at);
  char* const memory = shared_memory();
  float* const partial = reinterpret_cast<float*>(memory);
  if (c.a.norm_weight) results.normalise(c, c.a.norm_weight, c.a.norm_bias, partial);
  if (c.a.residual || c.a.shortcut) add_map<T, Number>(results, c, at, memory);
  if (c.a.out_norm_weight) {
    results.normalise(c, c.a.out_norm_weight, c.a.out_norm_bias, partial);
    results.each([&](float& y, int, int) { y = activate(y, c.a.out_activation); });
  }
  if (c.a.finite) {
    results.each([&](float& y, int row, int column) {
      const bool there = at.first_pixel + row < c.pixels && at.first_column + column < c.map.columns;
      // all that write write the same
      if (there && !(larger_or_nan(0.0f, y) <= 3.402823466e38f)) *c.a.finite = not_a_number();
    });
  }
  if (c.a.out_scale) {
    stage_levels<T>(results, c.a.out_scale, memory);
    synchronize_block();
    store_tile<T, int8_t>(c, at, memory, c.a.out);
    return;
  }
  stage_numbers<T, Number>(results, memory);
  synchronize_block();
  store_tile<T, Number>(c, at, memory, c.a.out);
  if (c.a.next_scale) store_levels<T, Number>(c, at, memory, c.a.next_scale, c.a.next_values);
}

template <class S>
int64_t block_count(const Convolution& c) {
  return int64_t(blocks_of(c.pixels, S::M)) * blocks_of(c.map.columns, S::N) * c.corners;
}

template <class S, class Number>
sana_edge_status start(Convolution& c, const sana_edge_device_info& device, void* stream) {
  c.column_tiles = blocks_of(c.map.columns, S::N);
  const int64_t blocks = block_count<S>(c);
  SANA_EDGE_CHECK(blocks < LARGEST, SANA_EDGE_BAD_SHAPE);
  const int shared = device.capability >= 80 ? shared_bytes<TileOf<S, 800>>() : shared_bytes<TileOf<S, 750>>();
  return launch(conv2d_kernel<S, Number>, dim3{unsigned(blocks), 1, 1}, S::THREADS, shared, stream, c);
}

template <class Number>
sana_edge_status choose(Convolution& c, const sana_edge_device_info& device, void* stream) {
  const int columns = c.map.columns;
  if (columns <= 32) return start<Few, Number>(c, device, stream);
  if (columns <= 64) return start<Narrow, Number>(c, device, stream);
  const bool normed = c.a.norm_weight || c.a.out_norm_weight;
  if (normed && columns > 128)
    return device.capability < 80 ? start<NormedTuring, Number>(c, device, stream)
                                  : start<Normed, Number>(c, device, stream);
  // a small map has too few wide tiles for all SMs
  const bool small = !normed && block_count<Wide>(c) <= device.processors;
  return small ? start<Narrow, Number>(c, device, stream) : start<Wide, Number>(c, device, stream);
}

bool sizes_fit(const sana_edge_w8a8_conv2d_args& a) {
  const bool phases = a.upsample == SANA_EDGE_UPSAMPLE_PHASES;
  if (a.upsample < SANA_EDGE_UPSAMPLE_NONE || a.upsample > SANA_EDGE_UPSAMPLE_SHUFFLE) return false;
  if (a.activation < SANA_EDGE_IDENTITY || a.activation > SANA_EDGE_SILU) return false;
  if (a.out_activation < SANA_EDGE_IDENTITY || a.out_activation > SANA_EDGE_SILU) return false;
  if (phases ? a.kernel != 2 : a.kernel != 1 && a.kernel != 3) return false;
  if (a.images < 0 || a.height < 0 || a.width < 0 || a.depth <= 0 || a.depth % 16 || a.columns <= 0) return false;
  // sums of 127^2 stay within 32 bits
  if (int64_t(a.kernel) * a.kernel * a.depth > 131071 || a.columns > 1 << 20) return false;
  // pixels are counted in 32 bits, up to the end of the last tile
  const int64_t most = LARGEST - 1024;
  if (a.height && a.width && int64_t(a.images) * a.height > most / a.width) return false;
  if ((a.norm_weight || a.out_norm_weight) && a.columns > 256) return false;
  if (a.next_scale && a.out_scale) return false;
  if (a.upsample == SANA_EDGE_UPSAMPLE_NONE) return !a.shortcut;
  if (a.shortcut && (a.repeats <= 0 || a.columns * 4 % a.repeats)) return false;
  return !a.residual;
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_w8a8_conv2d(const sana_edge_w8a8_conv2d_args* a,
                                                                void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(sizes_fit(*a), SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->height == 0 || a->width == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->values, a->scale, a->weight, a->weight_scales, a->out}) && !a->next_scale == !a->next_values,
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->values, a->weight, a->residual, a->shortcut, a->out, a->next_values}),
                  SANA_EDGE_BAD_ALIGNMENT);
  SANA_EDGE_CHECK(aligned({a->scale, a->weight_scales, a->bias, a->norm_weight, a->norm_bias, a->out_norm_weight,
                           a->out_norm_bias, a->out_scale, a->next_scale, a->finite}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  Convolution c{*a,
                conv_map(a->height, a->width, a->depth, a->kernel, a->columns),
                a->images * a->height * a->width,
                0,
                a->upsample == SANA_EDGE_UPSAMPLE_NONE ? 1 : 4};
  sana_edge_device_info device;
  const sana_edge_status status = current_device(&device);
  if (status != SANA_EDGE_OK) return status;
  return a->type == SANA_EDGE_FP16 ? choose<Half>(c, device, stream) : choose<BFloat16>(c, device, stream);
}
