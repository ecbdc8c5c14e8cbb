// A latent's cells to tokens: a block has 32 cells in shared memory and 256 columns, a thread 4 cells and 8
// columns, so that a weight serves 4 products and a cell 8. Writing the tokens, 16 bytes at a time, is what takes
// the time.
#include "checks.h"
#include "row_quantizer.h"

namespace {

constexpr int COLUMNS = 8;
constexpr int CELLS = 4;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int BLOCK_COLUMNS = WARP * COLUMNS;
constexpr int BLOCK_CELLS = WARPS * CELLS;

struct alignas(16) Four {
  float element[4];
};

template <class T>
struct alignas(16) Row {
  T element[COLUMNS];
};

template <class T>
__global__ void __launch_bounds__(THREADS) patch_embed_kernel(const sana_edge_patch_embed_args a) {
  wait_for_kernels();
  const int64_t tokens = int64_t(a.height) * a.width;
  const int64_t first = int64_t(blockIdx.x) * BLOCK_CELLS;
  const int image = blockIdx.z;
  // (channels, BLOCK_CELLS), zeros beyond the last cell
  float* cells = reinterpret_cast<float*>(shared_memory());
  for (int n = threadIdx.x; n < a.channels * BLOCK_CELLS; n += THREADS) {
    const int64_t token = first + n % BLOCK_CELLS;
    const int64_t channel = int64_t(image) * a.channels + n / BLOCK_CELLS;
    cells[n] = token < tokens ? to_float(from_float<T>(a.latent[channel * tokens + token])) : 0.0f;
  }
  synchronize_block();
  const int column = blockIdx.y * BLOCK_COLUMNS + threadIdx.x % WARP * COLUMNS;
  if (column >= a.columns) return;
  const int cell = threadIdx.x / WARP * CELLS;
  float sums[CELLS][COLUMNS] = {};
  for (int channel = 0; channel < a.channels; channel++) {
    float weight[COLUMNS];
    load_group(weight, a.weight + int64_t(channel) * a.columns + column);
    const Four four = load_vector<Four>(cells + channel * BLOCK_CELLS + cell);
#pragma unroll
    for (int n = 0; n < CELLS; n++)
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) sums[n][i] = fused_multiply_add(four.element[n], weight[i], sums[n][i]);
  }
  float bias[COLUMNS];
  load_group(bias, a.bias + column);
#pragma unroll
  for (int n = 0; n < CELLS; n++) {
    const int64_t token = first + cell + n;
    if (token >= tokens) continue;
    float position[COLUMNS] = {};
    if (a.positions) load_group(position, a.positions + token * a.columns + column);
    Row<T> row;
    for (int i = 0; i < COLUMNS; i++) row.element[i] = from_float<T>(add(add(sums[n][i], bias[i]), position[i]));
    for (int copy = 0; copy < a.copies; copy++)
      store_vector(static_cast<T*>(a.out) + ((int64_t(copy) * a.images + image) * tokens + token) * a.columns + column,
                   row);
  }
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_patch_embed(const sana_edge_patch_embed_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->images >= 0 && a->images <= 65535 && a->copies >= 0 && a->channels > 0 && a->channels <= 256 &&
                      a->height >= 0 && a->width >= 0 && a->columns > 0 && a->columns % COLUMNS == 0 &&
                      a->columns <= 65535 * BLOCK_COLUMNS && int64_t(a->height) * a->width < LARGEST,
                  SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->copies == 0 || a->height == 0 || a->width == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->latent, a->weight, a->bias, a->out}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->weight, a->bias, a->positions, a->out}) && aligned({a->latent}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  const int64_t tokens = int64_t(a->height) * a->width;
  const dim3 grid{unsigned(blocks_of(tokens, int64_t(BLOCK_CELLS))), unsigned(blocks_of(a->columns, BLOCK_COLUMNS)),
                  unsigned(a->images)};
  const size_t shared = size_t(a->channels) * BLOCK_CELLS * sizeof(float);
  const auto kernel = a->type == SANA_EDGE_FP16 ? patch_embed_kernel<Half> : patch_embed_kernel<BFloat16>;
  return launch(kernel, grid, THREADS, shared, stream, *a, BEGINS_EARLY);
}
