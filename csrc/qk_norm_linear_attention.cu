// Sums of linear attention where k is RMS-normalised over all heads: roots first, then K^T V in fp32, since
// ReLU(k / rms * norm) is not rounded. A warp takes a head of some tokens: it brings 16 of them to shared memory
// as fp32, while the next are on their way in registers, and a lane sums 8 x 8 of the 32 x 32 over every second
// token, 64 fused multiply-adds for each 16 numbers that it reads.
#include "checks.h"
#include "linear_attention_parts.h"

namespace {

// ---- 1 / rms of q and k ----

constexpr int ROOT_THREADS = 256;

template <class T>
struct alignas(16) Eight {
  T at[8];
};

// a warp takes q or k of a row
template <class T>
__global__ void __launch_bounds__(ROOT_THREADS) qk_roots_kernel(const sana_edge_qk_norm_linear_attention_args a) {
  wait_for_kernels();
  const int64_t unit = int64_t(blockIdx.x) * (ROOT_THREADS / WARP) + threadIdx.x / WARP;
  const int64_t rows = int64_t(a.images) * a.tokens;
  if (unit >= 2 * rows) return;
  const int lane = threadIdx.x % WARP, width = a.heads * HEAD;
  const T* from = static_cast<const T*>(a.qkv) + unit / 2 * 3 * width + unit % 2 * width;
  float sum = 0;
#pragma unroll 5
  for (int n = lane * 8; n < width; n += WARP * 8) {
    const auto x = load_vector<Eight<T>>(from + n);
    for (int i = 0; i < 8; i++) sum = fused_multiply_add(to_float(x.at[i]), to_float(x.at[i]), sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) a.roots[unit] = reciprocal_root(add(divide(sum, float(width)), a.norm_eps));
}

// ---- K^T V ----

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
// tokens in a warp's shared memory, and floats of one: k, then v
constexpr int TOKENS = 16;
constexpr int TOKEN = 2 * HEAD;
constexpr int MOST_PARTS = 32;

struct Sums {
  sana_edge_qk_norm_linear_attention_args a;
  int part_tokens;  // a multiple of TOKENS
  int parts;
};

// 8 elements of k or v of one token: a lane has four such pieces of 16 tokens
template <class T>
struct Pieces {
  static constexpr int COUNT = TOKENS * TOKEN / 8 / WARP;
  Eight<T> at[COUNT];
  float roots[COUNT];

  // lanes 0-3 have k of a token, 4-7 its v, the next 8 those of the next token
  static __device__ __forceinline__ int token(int lane, int n) { return n * (WARP / 8) + lane / 8; }

  __device__ __forceinline__ void load(const sana_edge_qk_norm_linear_attention_args& a, int64_t row, int count,
                                       int head, int lane) {
    const int width = a.heads * HEAD;
    const T* from = static_cast<const T*>(a.qkv) + (lane % 8 < 4 ? width : 2 * width) + head * HEAD + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      at[n] = {};
      roots[n] = 0;
      if (token(lane, n) >= count) continue;
      at[n] = load_vector<Eight<T>>(from + (row + token(lane, n)) * 3 * width);
      roots[n] = a.roots[2 * (row + token(lane, n)) + 1];
    }
  }
  // v as it is, and ReLU(k * root * norm)
  __device__ __forceinline__ void store(const float (&norm)[8], float* shared, int lane) const {
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      Float4 out[2];
      for (int i = 0; i < 8; i++) {
        float value = to_float(at[n].at[i]);
        if (lane % 8 < 4) {
          value = multiply(multiply(value, roots[n]), norm[i]);
          // NaN stays NaN
          value = value < 0 ? 0 : value;
        }
        out[i / 4].at[i % 4] = value;
      }
      float* to = shared + token(lane, n) * TOKEN + lane % 8 * 8;
      store_vector(to, out[0]);
      store_vector(to + 4, out[1]);
    }
  }
};

// what a lane sums: rows 8 (lane / 4 % 4) and on, columns 8 (lane % 4) and on, of tokens lane / 16 + 2 n
struct LaneSums {
  float products[8][8], keys[8];

  __device__ __forceinline__ void add_token(const float* token, int lane) {
    float k[8], v[8];
    for (int half = 0; half < 2; half++) {
      const Float4 key = load_vector<Float4>(token + lane / 4 % 4 * 8 + half * 4);
      const Float4 value = load_vector<Float4>(token + HEAD + lane % 4 * 8 + half * 4);
      for (int i = 0; i < 4; i++) k[half * 4 + i] = key.at[i], v[half * 4 + i] = value.at[i];
    }
    for (int i = 0; i < 8; i++) {
      keys[i] = add(keys[i], k[i]);
      for (int j = 0; j < 8; j++) products[i][j] = fused_multiply_add(k[i], v[j], products[i][j]);
    }
  }
  // adds the two halves of the warp, each of which writes half of the rows
  __device__ __forceinline__ void store(float* part, int lane) {
    const int row = lane / 4 % 4 * 8, column = lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      keys[i] = add(keys[i], shuffle_xor(keys[i], 16));
      Float4 out[2];
      for (int j = 0; j < 8; j++)
        out[j / 4].at[j % 4] = add(products[i][j], shuffle_xor(products[i][j], 16));
      if (lane / 16 != i / 4) continue;
      store_vector(part + (row + i) * HEAD + column, out[0]);
      store_vector(part + (row + i) * HEAD + column + 4, out[1]);
      if (lane % 4 == 0) part[HEAD * HEAD + row + i] = keys[i];
    }
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS) qk_norm_linear_attention_kernel(const Sums s) {
  wait_for_kernels();
  const auto& a = s.a;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int head = blockIdx.x * WARPS + warp, image = blockIdx.y / s.parts, part = blockIdx.y % s.parts;
  // warps do not meet
  if (head >= a.heads) return;
  float* const shared = reinterpret_cast<float*>(shared_memory()) + warp * TOKENS * TOKEN;
  const int first = part * s.part_tokens, tokens = smaller(s.part_tokens, a.tokens - first);
  const int64_t row = int64_t(image) * a.tokens + first;

  float norm[8];
  for (int half = 0; half < 2; half++) {
    const Float4 weight = load_vector<Float4>(a.norm_k + head * HEAD + lane % 4 * 8 + half * 4);
    for (int i = 0; i < 4; i++) norm[half * 4 + i] = weight.at[i];
  }
  LaneSums sums{};
  Pieces<T> pieces;
  pieces.load(a, row, tokens, head, lane);
  for (int token = 0; token < tokens; token += TOKENS) {
    pieces.store(norm, shared, lane);
    synchronize_warp();
    pieces.load(a, row + token + TOKENS, tokens - token - TOKENS, head, lane);
#pragma unroll 2
    for (int n = 0; n < TOKENS; n += 2) sums.add_token(shared + (n + lane / 16) * TOKEN, lane);
    synchronize_warp();
  }
  const Parts parts = parts_of(a.workspace, s.parts);
  const int64_t place = int64_t(image) * a.heads + head;
  sums.store(parts.part(place, part), lane);
  fence_device();
  synchronize_warp();
  int last = 0;
  if (lane == 0) last = last_to_come(parts.counters + place, s.parts);
  if (!shuffle(last, 0)) return;
  fence_device();
  add_parts(parts, place, a.state, lane, WARP);
}

template <class T>
sana_edge_status start(const sana_edge_qk_norm_linear_attention_args& a, void* stream) {
  const int64_t units = int64_t(a.images) * a.tokens * 2;
  const dim3 roots{unsigned(blocks_of(units, int64_t(ROOT_THREADS / WARP))), 1, 1};
  const sana_edge_status status = launch(qk_roots_kernel<T>, roots, ROOT_THREADS, 0, stream, a, BEGINS_EARLY);
  if (status != SANA_EDGE_OK) return status;
  // parts of 128 tokens, of more where there were too many
  const int tokens = larger(128, blocks_of(blocks_of(a.tokens, MOST_PARTS), TOKENS) * TOKENS);
  const Sums s{a, tokens, blocks_of(a.tokens, tokens)};
  const dim3 grid{unsigned(blocks_of(a.heads, WARPS)), unsigned(s.parts) * unsigned(a.images), 1};
  if (grid.y > 65535) return SANA_EDGE_BAD_SHAPE;
  return launch(qk_norm_linear_attention_kernel<T>, grid, THREADS, WARPS * TOKENS * TOKEN * sizeof(float), stream,
                s, BEGINS_EARLY);
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_qk_norm_linear_attention(const sana_edge_qk_norm_linear_attention_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->images >= 0 && a->tokens >= 0 && int64_t(a->images) * a->tokens < LARGEST,
                  SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a->heads > 0 && a->heads <= 256 && int64_t(a->images) * a->heads <= COUNTERS,
                  SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->tokens == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->qkv, a->norm_k, a->roots, a->state, a->workspace}), SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->qkv, a->norm_k, a->state, a->workspace}) && aligned({a->roots}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  SANA_EDGE_CHECK(
      a->workspace_bytes >= sana_edge_qkv_linear_attention_workspace(a->images, a->tokens, a->heads),
      SANA_EDGE_WORKSPACE);
  return a->type == SANA_EDGE_FP16 ? start<Half>(*a, stream) : start<BFloat16>(*a, stream);
}
