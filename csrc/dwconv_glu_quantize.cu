// The middle of the Mix-FFN in one pass. A block has a patch of 4 rows and 4 columns of pixels with all their
// channels, so that it knows the absmax of a pixel; a thread has 2 values and their 2 gates, with the 36 weights
// in registers, and slides along the patch: a column of 6 pixels is loaded once and goes to all sums that need
// it, up to 9 a pixel. The rounded products wait for the absmax in shared memory, 2 bytes a channel.
//
// 36 pixels are loaded for 16, 20 of them from L2 since neighbours load them too, and weights as large as 9
// pixels: L2 gives 3.4 times what DRAM does, and about 105 instructions, of which 36 multiply, make 2 channels of
// a pixel.
#include "checks.h"
#include "dwconv_maps.h"
#include "row_quantizer.h"

namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = PATCH_ROWS;
// channels of a thread: the first two are values, the others their gates
constexpr int CHANNELS = 4;

struct Arguments {
  sana_edge_dwconv_glu_quantize_args a;
  PatchGrid grid;
};

struct alignas(8) Two {
  float element[2];
};

using Sums = float[ROWS][CHANNELS];

// shared memory of a patch: its products (pixels, hidden), then of every pixel and warp an absmax
HOST_DEVICE int64_t pixel_bytes(int hidden) { return 2 * int64_t(hidden) + WARPS * sizeof(uint32_t); }

// two values and two gates of a channel pair
__device__ __forceinline__ void take(float (&to)[CHANNELS], const float* from, int hidden) {
#pragma unroll
  for (int gate = 0; gate < 2; gate++) {
    const Two two = load_vector<Two>(from + gate * hidden);
    to[2 * gate] = two.element[0];
    to[2 * gate + 1] = two.element[1];
  }
}

template <class T>
__device__ __forceinline__ void take(float (&to)[CHANNELS], const T* from, int hidden) {
#pragma unroll
  for (int gate = 0; gate < 2; gate++) {
    const uint32_t two = load_vector<uint32_t>(from + gate * hidden);
    to[2 * gate] = unpack<T>(two, 0);
    to[2 * gate + 1] = unpack<T>(two, 1);
  }
}

// products of a column that is complete, to shared memory; their absmax to that of this warp
template <class T, int COLUMNS>
__device__ __forceinline__ void finish(const Sums& sums, T* products, uint32_t* most, int rows, int hidden,
                                       bool active) {
  const int lane = threadIdx.x % WARP;
  // bits of a positive number: those of NaN are larger than infinity's
  uint32_t mine = 0;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    float product[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float gate = sums[row][2 + i];
      product[i] = multiply(sums[row][i], quick_divide(gate, 1.0f + quick_exponential(-gate)));
    }
    const uint32_t largest = warp_largest(float_bits(larger_size(product[0], product[1])));
    if (lane == row) mine = largest;
    if (active && row < rows)
      store_vector(products + row * COLUMNS * hidden, pack_floats<T>(product[0], product[1]));
  }
  if (lane < ROWS) {
    uint32_t* warp = most + lane * COLUMNS * WARPS;
    *warp = larger(*warp, mine);
  }
}

// this thread's two channels of a patch: COLUMNS + 2 columns of pixels come one after the other; when one has
// been added to the sums of the column before it (tap 2), of its own (1) and of the next (0), its registers take
// the next
template <class T, int COLUMNS>
__device__ __forceinline__ void make_products(const sana_edge_dwconv_glu_quantize_args& a, const Patch& patch,
                                              int channel, bool active, T* products, uint32_t* most) {
  const unsigned pixel_stride = 2 * a.hidden, row_stride = a.width * pixel_stride;
  const int64_t corner = (int64_t(patch.image) * a.height + patch.row - 1) * a.width + patch.column - 1;
  // the pixel above and left of the patch; it may lie outside of x. From there 32 bits are enough.
  const T* x = opaque(static_cast<const T*>(a.x) + corner * pixel_stride);
  unsigned place = channel;
  // bit n is set where row n of a column is in the picture
  uint32_t there = 0;
#pragma unroll
  for (int n = 0; n < ROWS + 2; n++)
    if (unsigned(patch.row - 1 + n) < unsigned(a.height)) there |= 1u << n;
  there = opaque(there);
  uint32_t pixel[ROWS + 2][2];
  const auto load = [&](int at) {
    // opaque, lest addresses of all columns, and what they ask, be kept in registers
    const unsigned next_row = opaque(row_stride), hidden = opaque(a.hidden);
    const uint32_t valid = unsigned(patch.column + at) < unsigned(a.width) ? opaque(there) : 0;
#pragma unroll
    for (int n = 0; n < ROWS + 2; n++) {
      const unsigned value = place + n * next_row, gate = value + hidden;
      pixel[n][0] = valid & 1u << n ? load_vector<uint32_t>(x + value) : 0;
      pixel[n][1] = valid & 1u << n ? load_vector<uint32_t>(x + gate) : 0;
    }
    place = opaque(place + pixel_stride);
  };
  load(-1);
  float weight[9][CHANNELS], bias[CHANNELS];
#pragma unroll
  for (int tap = 0; tap < 9; tap++)
    take(weight[tap], static_cast<const T*>(a.weight) + tap * 2 * a.hidden + channel, a.hidden);
  take(bias, a.bias + channel, a.hidden);
  float sums[COLUMNS][ROWS][CHANNELS];
#pragma unroll
  for (int at = -1; at <= COLUMNS; at++) {
#pragma unroll
    for (int n = 0; n < ROWS + 2; n++) {
      float value[CHANNELS];
#pragma unroll
      for (int i = 0; i < CHANNELS; i++) value[i] = unpack<T>(pixel[n][i / 2], i % 2);
#pragma unroll
      for (int tap = 0; tap < 3; tap++) {
        const int column = at + 1 - tap;
        if (column < 0 || column >= COLUMNS) continue;
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
          const int above = n - row;
          if (above < 0 || above > 2) continue;
#pragma unroll
          for (int i = 0; i < CHANNELS; i++) {
            float& sum = sums[column][row][i];
            sum = fused_multiply_add(value[i], weight[3 * above + tap][i], tap + above ? sum : bias[i]);
          }
        }
      }
    }
    if (at < COLUMNS) load(at + 1);
    // opaque, lest what all columns ask be kept in registers
    const int hidden = opaque(a.hidden);
    if (at >= 1 && at - 1 < int(opaque(patch.columns)))
      finish<T, COLUMNS>(sums[at - 1], products + (at - 1) * hidden + channel, most + (at - 1) * WARPS,
                         int(opaque(patch.rows)), hidden, active);
  }
}

template <class T, int COLUMNS>
__global__ void __launch_bounds__(THREADS) dwconv_glu_quantize_kernel(const Arguments arguments) {
  wait_for_kernels();
  constexpr int PIXELS = ROWS * COLUMNS;
  const auto& a = arguments.a;
  const Patch patch = patch_of(arguments.grid, a.height, a.width, blockIdx.x);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  T* products = reinterpret_cast<T*>(shared_memory());
  uint32_t* most = reinterpret_cast<uint32_t*>(products + PIXELS * a.hidden);
  if (lane < PIXELS) most[lane * WARPS + warp] = 0;
  synchronize_warp();
  for (int first = 0; first + 2 * WARP * warp < a.hidden; first += 2 * THREADS) {
    // lanes beyond the last channel do what the last of all does, and write nothing
    const int own = first + 2 * int(threadIdx.x), channel = smaller(own, a.hidden - 2);
    make_products<T, COLUMNS>(a, patch, channel, own == channel, products, most + warp);
  }
  synchronize_block();
  const int64_t corner = (int64_t(patch.image) * a.height + patch.row) * a.width + patch.column;
  if (threadIdx.x < PIXELS) {
    const int row = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
    uint32_t* warps = most + threadIdx.x * WARPS;
    uint32_t largest = warps[0];
    for (int n = 1; n < WARPS; n++) largest = larger(largest, warps[n]);
    // rounding keeps the order of numbers: the largest before is the largest after
    const RowScale scale = row_scale(to_float(from_float<T>(float_of_bits(largest))), a.static_scale);
    if (row < patch.rows && column < patch.columns)
      a.scales[corner + int64_t(row) * a.width + column] = scale.stored;
    warps[0] = float_bits(scale.inverse);
  }
  synchronize_block();
  const int groups = a.hidden / 16;
  for (int n = threadIdx.x; n < PIXELS * groups; n += THREADS) {
    const int pixel = n / groups, row = pixel / COLUMNS, column = pixel % COLUMNS;
    if (row >= patch.rows || column >= patch.columns) continue;
    float values[16];
    load_group(values, products + n * 16);
    store_vector(a.values + (corner + int64_t(row) * a.width + column) * a.hidden + (n - pixel * groups) * 16,
                 quantize_group(values, RowScale{0, float_of_bits(most[pixel * WARPS])}));
  }
}

template <class T>
sana_edge_status start(const Arguments& arguments, void* stream) {
  const auto& a = arguments.a;
  const PatchGrid& grid = arguments.grid;
  const auto kernel = grid.columns == 1   ? dwconv_glu_quantize_kernel<T, 1>
                      : grid.columns == 2 ? dwconv_glu_quantize_kernel<T, 2>
                                          : dwconv_glu_quantize_kernel<T, 4>;
  const int64_t blocks = int64_t(a.images) * grid.strips * grid.segments;
  SANA_EDGE_CHECK(blocks < LARGEST, SANA_EDGE_BAD_SHAPE);
  const size_t shared = size_t(pixel_bytes(a.hidden)) * ROWS * grid.columns;
  return launch(kernel, dim3{unsigned(blocks), 1, 1}, THREADS, shared, stream, arguments, BEGINS_EARLY);
}

sana_edge_status start(const sana_edge_dwconv_glu_quantize_args& a, void* stream) {
  sana_edge_device_info device;
  const sana_edge_status status = current_device(&device);
  if (status != SANA_EDGE_OK) return status;
  const int64_t most = device.shared_memory / pixel_bytes(a.hidden) / ROWS;
  SANA_EDGE_CHECK(most >= 1, SANA_EDGE_UNSUPPORTED_DEVICE);
  const Arguments arguments{a, best_patch_grid(a.images, a.height, a.width, int(smaller<int64_t>(most, 4)),
                                               larger(device.processors, 1))};
  return a.type == SANA_EDGE_FP16 ? start<Half>(arguments, stream) : start<BFloat16>(arguments, stream);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_dwconv_glu_quantize(const sana_edge_dwconv_glu_quantize_args* a,
                                                                        void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->images >= 0 && a->height >= 0 && a->width >= 0 && a->hidden > 0 && a->hidden % 16 == 0 &&
                      a->hidden <= 8192,
                  SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->height == 0 || a->width == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(int64_t(a->height) * a->width < LARGEST &&
                      int64_t(a->height) * a->width <= LARGEST / a->images &&
                      int64_t(a->width) * 2 * a->hidden < LARGEST / (ROWS + 2),
                  SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(given({a->x, a->weight, a->bias, a->values, a->scales}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->x, a->weight, a->bias, a->values}) && aligned({a->scales, a->static_scale}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  return start(*a, stream);
}
