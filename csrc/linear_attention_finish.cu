// Linear attention's read: a block has the q of some tokens of an image in shared memory, 16 bits a number, and
// puts the outputs in their place, where they wait for their rows' absmax. A warp takes a head: a lane sums 4
// channels of every fourth token, so that 16 bytes of q and 16 of the state serve 32 and 4 fused multiply-adds,
// and the state is read from L2 once per block. 1 / rms and the norm's weight need no second form of q: weights
// lose their signs to q and multiply the state, roots multiply the two sums.
#include "checks.h"
#include "linear_attention_parts.h"
#include "row_quantizer.h"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
// lanes with the 32 channels of a token, and tokens that a warp is at
constexpr int LANES = 8;
constexpr int GROUPS = WARP / LANES;

template <class T>
struct alignas(16) Eight {
  T at[8];
};
template <class T>
struct alignas(8) Four {
  T at[4];
};

struct Finish {
  sana_edge_linear_attention_finish_args a;
  int tiles;  // of tokens in an image
};

// rows are 16 bytes longer than they need be: those of neighbouring tokens begin in other banks
HOST_DEVICE int row_elements(int heads) { return heads * HEAD + 8; }

// rows, each warp's absmax of each of them, and their scales
constexpr size_t shared_bytes(int tokens, int heads) {
  return size_t(tokens) * ((heads * HEAD + 8) * 2 + WARPS * sizeof(float) + sizeof(RowScale));
}

__device__ __forceinline__ float size_of(float weight) { return weight < 0 ? -weight : weight; }

// ReLU(q), or of q with the signs of the norm's weights: to shared memory, zeros for tokens that are not there
template <class T, bool NORM, int TOKENS>
__device__ __forceinline__ void load_queries(const Finish& f, int64_t first_row, int tokens, T* shared) {
  const auto& a = f.a;
  const unsigned vectors = a.heads * HEAD / 8;
#pragma unroll 6
  for (unsigned n = threadIdx.x; n < TOKENS * vectors; n += THREADS) {
    const int token = n / vectors, column = n % vectors * 8;
    Eight<T> q{};
    if (token < tokens)
      q = load_vector<Eight<T>>(static_cast<const T*>(a.q) + (first_row + token) * a.q_stride + column);
    float weight[8];
    if (NORM) {
      const Float4 low = load_vector<Float4>(a.norm_q + column), high = load_vector<Float4>(a.norm_q + column + 4);
      for (int i = 0; i < 4; i++) weight[i] = low.at[i], weight[i + 4] = high.at[i];
    }
    for (int i = 0; i < 8; i++) {
      if (NORM && weight[i] < 0) q.at[i].bits ^= 0x8000;
      // NaN stays NaN
      if (to_float(q.at[i]) < 0) q.at[i].bits = 0;
    }
    store_vector(shared + token * row_elements(a.heads) + column, q);
  }
}

// 4 channels of 8 rows of a head's state
struct StateRows {
  Float4 at[8];
  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int i = 0; i < 8; i++) at[i] = load_vector<Float4>(from + i * HEAD);
  }
  __device__ __forceinline__ void scale(const float* norm) {
    const Float4 low = load_vector<Float4>(norm), high = load_vector<Float4>(norm + 4);
#pragma unroll
    for (int i = 0; i < 8; i++)
      for (int c = 0; c < 4; c++) at[i].at[c] *= size_of(i < 4 ? low.at[i] : high.at[i - 4]);
  }
};

// The heads of a warp: their outputs take the place of their q. most[j] becomes the absmax of the lane's j-th
// token. The next rows of the state are on their way while the present ones are multiplied.
template <class T, bool NORM, int MINE>
__device__ __forceinline__ void read_heads(const Finish& f, int image, int64_t first_row, int tokens, T* shared,
                                           float (&most)[MINE]) {
  const auto& a = f.a;
  const int lane = threadIdx.x % WARP, channel = lane % LANES * 4;
  const float* image_state = a.state + int64_t(image) * a.heads * STATE;
  float roots[MINE];
  for (int j = 0; j < MINE; j++) {
    const int token = lane / LANES + j * GROUPS;
    roots[j] = NORM && token < tokens ? a.roots[2 * (first_row + token)] : 1;
  }
  const int next_token = GROUPS * row_elements(a.heads);
  int head = threadIdx.x / WARP;
  StateRows rows[2];
  if (head < a.heads) rows[0].load(image_state + head * STATE + channel);
  for (; head < a.heads; head += WARPS) {
    const float* state = image_state + head * STATE + channel;
    const float* norm = NORM ? a.norm_q + head * HEAD : nullptr;
    T* const q = shared + lane / LANES * row_elements(a.heads) + head * HEAD;
    Float4 keys = load_vector<Float4>(state + HEAD * HEAD);
    float sums[MINE][4] = {};
#pragma unroll
    for (int eight = 0; eight < HEAD / 8; eight++) {
      if (eight < HEAD / 8 - 1)
        rows[(eight + 1) % 2].load(state + (eight + 1) * 8 * HEAD);
      else if (head + WARPS < a.heads)
        rows[0].load(state + WARPS * STATE);
      if (NORM) rows[eight % 2].scale(norm + eight * 8);
#pragma unroll
      for (int j = 0; j < MINE; j++) {
        const auto some = load_vector<Eight<T>>(q + j * next_token + eight * 8);
        for (int i = 0; i < 8; i++) {
          const float value = to_float(some.at[i]);
          for (int c = 0; c < 4; c++)
            sums[j][c] = fused_multiply_add(value, rows[eight % 2].at[i].at[c], sums[j][c]);
        }
      }
    }
    // divisors: a lane has 4 of the 32 terms
    if (NORM) {
      const Float4 weight = load_vector<Float4>(norm + channel);
      for (int c = 0; c < 4; c++) keys.at[c] *= size_of(weight.at[c]);
    }
    float divisors[MINE];
#pragma unroll
    for (int j = 0; j < MINE; j++) {
      const auto some = load_vector<Four<T>>(q + j * next_token + channel);
      divisors[j] = 0;
      for (int c = 0; c < 4; c++) divisors[j] = fused_multiply_add(to_float(some.at[c]), keys.at[c], divisors[j]);
      for (int other = 1; other < LANES; other *= 2)
        divisors[j] = add(divisors[j], shuffle_xor(divisors[j], other));
    }
    // all lanes have read the q that outputs take the place of
    synchronize_warp();
#pragma unroll
    for (int j = 0; j < MINE; j++) {
      const float inverse = divide(roots[j], fused_multiply_add(roots[j], divisors[j], a.eps));
      Four<T> out;
      for (int c = 0; c < 4; c++) {
        out.at[c] = from_float<T>(multiply(sums[j][c], inverse));
        most[j] = larger_or_nan(most[j], to_float(out.at[c]));
      }
      store_vector(q + j * next_token + channel, out);
    }
  }
}

// registers for two blocks on an SM, of which one loads or stores while the other multiplies
template <class T, bool NORM, int TOKENS>
__global__ void __launch_bounds__(THREADS, TOKENS > 4 ? 2 : 1) linear_attention_finish_kernel(const Finish f) {
  wait_for_kernels();
  constexpr int MINE = TOKENS / GROUPS;
  const auto& a = f.a;
  const int image = blockIdx.x / f.tiles, first = blockIdx.x % f.tiles * TOKENS;
  const int tokens = smaller(TOKENS, a.tokens - first);
  const int64_t first_row = int64_t(image) * a.tokens + first;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  float* const warps = reinterpret_cast<float*>(shared + TOKENS * row_elements(a.heads));
  RowScale* const scales = reinterpret_cast<RowScale*>(warps + WARPS * TOKENS);

  load_queries<T, NORM, TOKENS>(f, first_row, tokens, shared);
  synchronize_block();
  float most[MINE] = {};
  read_heads<T, NORM, MINE>(f, image, first_row, tokens, shared, most);
#pragma unroll
  for (int j = 0; j < MINE; j++) {
    for (int other = 1; other < LANES; other *= 2) most[j] = larger_or_nan(most[j], shuffle_xor(most[j], other));
    if (lane % LANES == 0) warps[warp * TOKENS + lane / LANES + j * GROUPS] = most[j];
  }
  synchronize_block();
  if (int(threadIdx.x) < tokens) {
    float largest = warps[threadIdx.x];
    for (int n = 1; n < WARPS; n++) largest = larger_or_nan(largest, warps[n * TOKENS + threadIdx.x]);
    scales[threadIdx.x] = row_scale(largest, a.static_scale);
    a.scales[first_row + threadIdx.x] = scales[threadIdx.x].stored;
  }
  synchronize_block();
  const unsigned groups = a.heads * HEAD / 16;
  for (unsigned n = threadIdx.x; n < tokens * groups; n += THREADS) {
    const int token = n / groups, column = n % groups * 16;
    float values[16];
    load_group(values, shared + token * row_elements(a.heads) + column);
    store_vector(a.values + (first_row + token) * a.heads * HEAD + column, quantize_group(values, scales[token]));
  }
}

template <class T, int TOKENS>
sana_edge_status start(Finish f, void* stream) {
  f.tiles = blocks_of(f.a.tokens, TOKENS);
  const dim3 grid{unsigned(f.tiles) * unsigned(f.a.images), 1, 1};
  const auto kernel = f.a.roots ? linear_attention_finish_kernel<T, true, TOKENS>
                                : linear_attention_finish_kernel<T, false, TOKENS>;
  return launch(kernel, grid, THREADS, shared_bytes(TOKENS, f.a.heads), stream, f, BEGINS_EARLY);
}

// the most tokens that a block has shared memory for: each reads the whole state
template <class T>
sana_edge_status start(const Finish& f, void* stream) {
  sana_edge_status status = start<T, 16>(f, stream);
  if (status == SANA_EDGE_UNSUPPORTED_DEVICE) status = start<T, 8>(f, stream);
  if (status == SANA_EDGE_UNSUPPORTED_DEVICE) status = start<T, 4>(f, stream);
  return status;
}

}  // namespace

extern "C" SANA_EDGE_API sana_edge_status
sana_edge_linear_attention_finish(const sana_edge_linear_attention_finish_args* a, void* stream) {
  SANA_EDGE_CHECK(a, SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(is_16_bit(a->type), SANA_EDGE_BAD_TYPE);
  SANA_EDGE_CHECK(a->images >= 0 && a->tokens >= 0 && int64_t(a->images) * a->tokens < LARGEST,
                  SANA_EDGE_BAD_SHAPE);
  SANA_EDGE_CHECK(a->heads > 0 && a->heads <= 256 && a->q_stride >= a->heads * HEAD, SANA_EDGE_BAD_SHAPE);
  if (a->images == 0 || a->tokens == 0) return SANA_EDGE_OK;
  SANA_EDGE_CHECK(given({a->q, a->state, a->values, a->scales}) && !a->roots == !a->norm_q,
                  SANA_EDGE_NULL_POINTER);
  SANA_EDGE_CHECK(aligned({a->q, a->norm_q, a->state, a->values}) && a->q_stride % 8 == 0 &&
                      aligned({a->roots, a->static_scale, a->scales}, 4),
                  SANA_EDGE_BAD_ALIGNMENT);
  const Finish f{*a, 0};
  return a->type == SANA_EDGE_FP16 ? start<Half>(f, stream) : start<BFloat16>(f, stream);
}
