// One scale of a whole map: blocks leave the absmax of what they read, the last of them makes the scale of all.
#include "checks.h"
#include "linear_attention_parts.h"
#include "row_quantizer.h"

namespace {

constexpr int THREADS = 256;
constexpr int MOST_BLOCKS = 512;
static_assert(MOST_BLOCKS <= STATE, "the workspace of one head has a float for each block");

struct Pieces {
  sana_edge_tensor_scale_args a;
  int64_t groups;  // of 16 elements
};

template <class T>
__global__ void __launch_bounds__(THREADS) tensor_scale_kernel(const Pieces p) {
  wait_for_kernels();
  const auto& a = p.a;
  float most = 0;
  for (int64_t group = int64_t(blockIdx.x) * THREADS + threadIdx.x; group < p.groups;
       group += int64_t(gridDim.x) * THREADS) {
    float kept[16];
    load_group(kept, static_cast<const T*>(a.x) + group * 16);
    for (int i = 0; i < 16; i++) most = larger_or_nan(most, kept[i]);
  }
  most = block_max<THREADS>(most);
  const Parts parts = parts_of(a.workspace, 1);
  float* const found = parts.part(0, 0);
  int* const flag = reinterpret_cast<int*>(shared_memory());
  // all have read what the flag takes the place of
  synchronize_block();
  if (threadIdx.x == 0) {
    found[blockIdx.x] = most;
    fence_device();
    *flag = last_to_come(parts.counters, gridDim.x);
  }
  synchronize_block();
  if (!*flag) return;
  fence_device();
  // all have read the flag
  synchronize_block();
  most = 0;
  for (unsigned n = threadIdx.x; n < gridDim.x; n += THREADS) most = larger_or_nan(most, found[n]);
  most = block_max<THREADS>(most);
  if (threadIdx.x == 0) *a.scale = row_scale(most, nullptr).stored;
}

template <class T>
sana_edge_status start(const Pieces& p, void* stream) {
  const int64_t blocks = smaller(int64_t(MOST_BLOCKS), blocks_of(p.groups, int64_t(THREADS)));
  return launch(tensor_scale_kernel<T>, dim3{unsigned(blocks), 1, 1}, THREADS, block_max_bytes(THREADS), stream, p,
                BEGINS_EARLY);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status sana_edge_tensor_scale(const sana_edge_tensor_scale_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_float(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->rows >= 0 && a->rows < LARGEST && a->columns > 0 && a->columns % 16 == 0, SANA_EDGE_BAD_SHAPE);
  if (a->rows == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->x, a->scale, a->workspace}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->x, a->workspace}) && aligned({a->scale}, 4), SANA_EDGE_BAD_ALIGNMENT);
  SANA_EDGE_CHECK(a->workspace_bytes >= sana_edge_qkv_linear_attention_workspace(1, 1, 1), SANA_EDGE_WORKSPACE);
  const Pieces p{*a, a->rows * (a->columns / 16)};
  if (a->type == SANA_EDGE_FP16) return start<Half>(p, stream);
  if (a->type == SANA_EDGE_BF16) return start<BFloat16>(p, stream);
  return start<float>(p, stream);
}
