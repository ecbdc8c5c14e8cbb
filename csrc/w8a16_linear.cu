// Product of two-digit activations with INT8 weights. 16 rows of a tile are the high digits of 8 tokens, then
// their low ones, so that a thread has both sums of a number, and both numbers that rotate together: the epilogue
// needs no shared memory. A prompt of 32 tokens is one tile of 64 rows, which takes as long as reading the weight.
#include "checks.h"
#include "digits.h"
#include "gemm.h"
#include "tile_times.h"

namespace {

using Arguments = sana_edge_w8a16_linear_args;

// the left operand: as MatrixRows, of tokens (2, depth)
struct DigitRows {
  const int8_t* first;
  int tokens;  // that are there
  int depth;
  __device__ __forceinline__ const int8_t* chunk(int row, int k) const {
    const int token = row / 16 * 8 + row % 8, digit = row / 8 % 2;
    return token < tokens ? first + uint32_t((2 * token + digit) * depth + k) : nullptr;
  }
};

struct alignas(8) Pair {
  float element[2];
};

// two neighbours of a row from both digits' sums, in the reference's order
__device__ __forceinline__ Pair finish(const int32_t (&sums)[4], float step, const Arguments& a, int64_t token,
                                       int column) {
  float x[2];
  for (int i = 0; i < 2; i++) {
    const float both = add(multiply(float(sums[i]), LOW), float(sums[2 + i]));
    x[i] = multiply(multiply(both, step), a.weight_scales[column + i]);
    if (a.bias) x[i] = add(x[i], a.bias[column + i]);
  }
  if (!a.rotation || column >= a.rotated) return {{x[0], x[1]}};
  const uint32_t position = uint32_t(token) % uint32_t(a.tokens), pair = uint32_t(column) / 2 % uint32_t(a.pairs);
  const Pair angle = load_vector<Pair>(a.rotation + (int64_t(position) * a.pairs + pair) * 2);
  const float cosine = angle.element[0], sine = angle.element[1];
  return {{add(multiply(x[0], cosine), -multiply(x[1], sine)), add(multiply(x[1], cosine), multiply(x[0], sine))}};
}

template <class T>
__global__ void __launch_bounds__(T::THREADS) w8a16_linear_kernel(const Arguments a) {
  wait_for_kernels();
  if constexpr (!for_this_architecture<T>()) return;
  constexpr int TOKENS = T::M / 2;
  const unsigned down = unsigned(blocks_of<int64_t>(a.rows, TOKENS));
  const TilePlace place = tile_of_block(blockIdx.x, down, blocks_of(unsigned(a.columns), unsigned(T::N)));
  const int64_t token = int64_t(place.row) * TOKENS, column = int64_t(place.column) * T::N;
  int32_t sums[T::MT][T::NT][4] = {};
  multiply_tiles<T>(
      sums, DigitRows{a.digits + token * 2 * a.depth, int(smaller<int64_t>(a.rows - token, TOKENS)), a.depth},
      MatrixRows{a.weight + column * a.depth, int(smaller<int64_t>(a.columns - column, T::N)), a.depth}, a.depth);
#pragma unroll
  for (int m = 0; m < T::MT; m++) {
    // of the high digits' rows
    const int64_t row = token + warp_row<T>(threadIdx.x) / 2 + m * 8 + threadIdx.x % WARP / 4;
    if (row >= a.rows) continue;
    const float step = a.steps[row];
#pragma unroll
    for (int n = 0; n < T::NT; n++) {
      const int64_t at = column + tile_column<T>(threadIdx.x, n, 0);
      if (at >= a.columns) continue;
      store_vector(a.out + row * a.columns + at, finish(sums[m][n], step, a, row, int(at)));
    }
  }
}

template <class T>
sana_edge_status start(const Arguments& a, void* stream) {
  const int64_t blocks = blocks_of<int64_t>(a.rows, T::M / 2) * blocks_of<int64_t>(a.columns, T::N);
  SANA_EDGE_CHECK(blocks < LARGEST, SANA_EDGE_BAD_SHAPE);
  return launch(w8a16_linear_kernel<T>, dim3{unsigned(blocks), 1, 1}, T::THREADS, T::SHARED, stream, a,
                BEGINS_EARLY);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_w8a16_linear(const sana_edge_w8a16_linear_args* a,
                                                                 void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(a->rows >= 0 && a->rows < LARGEST / 2 && a->columns > 0 && a->columns % 8 == 0 &&
                      a->columns < LARGEST / 2 && a->depth > 0 && a->depth % 16 == 0 && a->depth <= EXACT_DEPTH,
                  SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a->tokens > 0 && a->pairs >= 0 && a->rotated >= 0 && a->rotated <= a->columns &&
                      a->rotated % 2 == 0 && (a->pairs > 0 || !a->rotation),
                  SANA_EDGE_BAD_SHAPE);
  if (a->rows == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->digits, a->steps, a->weight, a->weight_scales, a->out}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->digits, a->weight, a->out}) && aligned({a->rotation}, 8) &&
                      aligned({a->steps, a->weight_scales, a->bias}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  sana_edge_device_info device;
  const sana_edge_status status = current_device(&device);
  SANA_EDGE_CHECK(status == SANA_EDGE_OK, status);
  // as of so many rows with one digit: a sum of two is 4 bytes, too
  sana_edge_w8a8_linear_args product{};
  product.rows = 2 * a->rows, product.columns = a->columns, product.depth = a->depth;
  const int tile = pick_tile(product, device);
  SANA_EDGE_CHECK(tile, SANA_EDGE_UNSUPPORTED_DEVICE);
  switch (TileName(tile - 1)) {
    case LARGE:
      return start<TileLarge>(*a, stream);
    case MIDDLE:
      return start<TileMiddle>(*a, stream);
    case NARROW:
      return start<TileNarrow>(*a, stream);
    case SMALL:
      return start<TileSmall>(*a, stream);
    case TURING:
      return start<TileTuring>(*a, stream);
    default:
      return start<TileTuringSmall>(*a, stream);
  }
}
